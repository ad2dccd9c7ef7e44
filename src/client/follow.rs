//! Streams the metrics of every run of a service to Weights & Biases, whoever trains it: follows each run's
//! operations and logs their results, as a Rust client with a [`WandbConfig`] does for its own run.
//!
//! A run has a child process from its first operation on until it is deleted, breaks or falls asleep, or the service
//! stops. When it goes on, so does its run on Weights & Biases.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::{sync::watch, task::JoinHandle};

use crate::{
    protocol::{
        ClientRequest, ClientResponse, OperationResult, OperationSeq, OperationStatus, Payload, RunInfo,
        decode_compressed,
    },
    types::{ErrorKind, ForwardBackwardOutput, OperationError, RunId, WandbConfig},
};

use super::{
    ClientError, ServiceClient,
    service::{blocking, unexpected},
    wandb::WandbLogger,
};

/// How often new runs and operations are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long the service holds a wait for an outcome.
const HOLD_MS: u32 = 20_000;

/// Runs followed at a time: each has a Python process of some 100 MB.
const FOLLOWED_MAX: usize = 64;

/// How long a run whose child can't start is left alone.
const START_AGAIN: Duration = Duration::from_secs(300);

/// Follows all runs until it is told to finish.
pub struct RunFollower {
    stop: watch::Sender<bool>,
    looking: JoinHandle<()>,
}

impl RunFollower {
    /// Refuses if Python or the package `wandb` is missing.
    pub async fn require_package() -> Result<(), ClientError> {
        blocking(WandbLogger::require_package).await
    }

    /// Begins with what is submitted from now on. `cluster` tells the runs of this service from those of others
    /// in the same project.
    pub fn start(service: ServiceClient, config: WandbConfig, cluster: &str) -> Result<Self, ClientError> {
        config.validate()?;
        let (stop, stopping) = watch::channel(false);
        let following = Following { service, config, cluster: cluster.to_owned(), stopping };
        Ok(Self { stop, looking: tokio::spawn(following.look()) })
    }

    /// Lets every child upload what it has.
    pub async fn finish(self) {
        // Nobody listens only if the task is gone.
        let _ = self.stop.send(true);
        let _ = self.looking.await;
    }
}

/// What the tasks of all runs share.
#[derive(Clone)]
struct Following {
    service: ServiceClient,
    config: WandbConfig,
    cluster: String,
    stopping: watch::Receiver<bool>,
}

impl Following {
    /// Looks for runs with operations that nobody has logged.
    async fn look(mut self) {
        let mut next: Option<HashMap<RunId, u64>> = None;
        let mut tasks: HashMap<RunId, JoinHandle<u64>> = HashMap::new();
        while !*self.stopping.borrow() {
            if let Ok(status) = self.service.cluster_status().await {
                let there: HashSet<RunId> = status.runs.iter().map(|run| run.run).collect();
                let next = next.get_or_insert_with(|| {
                    status.runs.iter().map(|run| (run.run, run.accepted + 1)).collect()
                });
                next.retain(|run, _| there.contains(run));
                for (run, task) in tasks.extract_if(|_, task| task.is_finished()).collect::<Vec<_>>() {
                    // It ended with where to go on.
                    if let Ok(seq) = task.await {
                        next.insert(run, seq);
                    }
                }
                for run in status.runs {
                    let from = next.get(&run.run).copied().unwrap_or(1);
                    let due = run.accepted >= from && !tasks.contains_key(&run.run);
                    if due && tasks.len() < FOLLOWED_MAX {
                        tasks.insert(run.run, tokio::spawn(self.clone().follow(run, from)));
                    }
                }
            }
            let _ = tokio::time::timeout(LOOK_EVERY, self.stopping.wait_for(|stop| *stop)).await;
        }
        for task in tasks.into_values() {
            let _ = task.await;
        }
    }

    /// Logs one run from operation `seq` on; the operation to go on from.
    async fn follow(mut self, run: RunInfo, mut seq: u64) -> u64 {
        let config = WandbConfig { name: Some(self.name(&run)), ..self.config.clone() };
        let (id, described) = (format!("{}-{}", self.cluster, run.run), run.clone());
        let start = move || {
            let logger = WandbLogger::resume(&config, &id, &described.base_model, &described.lora)?;
            logger.describe(&described);
            Ok(logger)
        };
        let logger = match blocking(start).await {
            Ok(logger) => logger,
            Err(error) => {
                tracing::warn!(run = %run.run, "its metrics are not streamed: {error}");
                let _ = tokio::time::timeout(START_AGAIN, self.stopping.wait_for(|stop| *stop)).await;
                return seq;
            }
        };
        while !*self.stopping.borrow() {
            match self.outcome(run.run, seq).await {
                Ok(OperationStatus::Done(result)) => {
                    self.log(&logger, result).await;
                    seq += 1;
                }
                Ok(OperationStatus::Failed(_)) => seq += 1,
                Ok(OperationStatus::Pending) => {}
                Err(error) if error.kind == ErrorKind::NotFound => match self.is_over(run.run, seq).await {
                    true => break,
                    false => {
                        let _ = tokio::time::timeout(LOOK_EVERY, self.stopping.wait_for(|stop| *stop)).await;
                    }
                },
                Err(error) => {
                    tracing::warn!(run = %run.run, "its metrics are not streamed: {error}");
                    break;
                }
            }
        }
        // Its drop waits for the child.
        let _ = tokio::task::spawn_blocking(move || drop(logger)).await;
        seq
    }

    /// The outcome of an operation, unless the service stops before.
    async fn outcome(&mut self, run: RunId, seq: u64) -> Result<OperationStatus, OperationError> {
        let wait = ClientRequest::WaitOperation { run, seq: OperationSeq(seq), hold_ms: HOLD_MS };
        let waited = tokio::select! {
            waited = self.service.request(wait) => waited?,
            _ = self.stopping.wait_for(|stop| *stop) => return Ok(OperationStatus::Pending),
        };
        match waited {
            ClientResponse::Operation(status) => Ok(status),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn log(&self, logger: &WandbLogger, result: OperationResult) {
        match result {
            OperationResult::OptimStep(step) => logger.log_step(&step.metrics),
            OperationResult::ForwardBackward(payload) => {
                let bytes = match payload {
                    Payload::Inline(bytes) => Ok(bytes),
                    Payload::Blob(blob) => self.service.blob(blob).await,
                };
                let output = bytes.and_then(|bytes| {
                    Ok(decode_compressed::<ForwardBackwardOutput>("forward_backward output", &bytes)?)
                });
                match output {
                    Ok(output) => logger.log(&output.metrics),
                    Err(error) => tracing::warn!("the metrics of a pass can't be read: {error}"),
                }
            }
            OperationResult::Init(_)
            | OperationResult::SaveState(_)
            | OperationResult::SaveWeightsForSampler(_)
            | OperationResult::LoadState(_) => {}
        }
    }

    /// Whether a run that has no operation `seq` won't have one soon.
    async fn is_over(&self, run: RunId, seq: u64) -> bool {
        match self.service.run_info(run).await {
            Ok(run) => run.accepted < seq && (run.phase == "asleep" || run.phase.starts_with("broken")),
            // Deleted, most likely; if not, the next look finds it again.
            Err(_) => true,
        }
    }

    fn name(&self, run: &RunInfo) -> String {
        let name = format!("{} {}", run.run, run.name);
        name.chars().take(WandbConfig::NAME_MAX).collect()
    }
}

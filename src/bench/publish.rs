//! How long it takes until a new version is served everywhere: from `optim_step` done to the publish done,
//! which is when every replica serves it. Real processes: a coordinator, and a node for each replica.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{BenchError, Machine, figures::median, folder::TemporaryFolder, machine::round};
use crate::{
    client::{LoraOptions, ServiceClient, TrainingClient},
    model::{ComputeOptions, ModelConfig, ModelSource, tiny},
    service::{DataDirectory, Supervisor, SupervisorConfig, run_here, wait_until_joined},
    transport::CERTIFICATE_LIFE,
    types::{AdamParams, Datum, LossFn, LossSpec, ModelInput, SampleFlags, SamplingParams},
};

/// What is published.
#[derive(Debug, Clone)]
pub struct PublishConfig {
    /// This program, which the parts are.
    pub program: PathBuf,
    /// Ranks of the LoRA, which decide its size: see [`adapter_mb`].
    pub ranks: Vec<u32>,
    /// Numbers of replicas, each on a node process of its own.
    pub replicas: Vec<u32>,
    pub repeats: u32,
    pub threads: usize,
}

/// Everything that one run measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PublishReport {
    pub bench: &'static str,
    pub machine: Machine,
    pub repeats: u32,
    pub results: Vec<PublishResult>,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PublishResult {
    pub adapter_mb: f64,
    pub rank: u32,
    pub replicas: u32,
    /// From `optim_step` done to every replica serving; median and range.
    pub seconds: f64,
    pub seconds_min: f64,
    pub seconds_max: f64,
    /// Of the last version, after a replica's process was killed: to it being served by that replica's node,
    /// started again (model loaded, adapter fetched by digest). Of one replica only, since then nobody else
    /// can answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_after_kill_s: Option<f64>,
}

/// Model and folder of the measurement.
const MODEL: &str = "bench/publish";

/// For a killed node to be back, model and all.
const COMEBACK: Duration = Duration::from_secs(120);

/// A base of 55 million random parameters, whose LoRA grows with its rank from kilobytes past its own size.
fn shape() -> ModelConfig {
    ModelConfig {
        hidden_size: 512,
        intermediate_size: 1536,
        num_layers: 16,
        num_heads: 8,
        num_kv_heads: 8,
        head_dim: 64,
        ..tiny::config()
    }
}

/// Bytes of an adapter of this rank, f32, in MB (10^6).
pub fn adapter_mb(rank: u32) -> f64 {
    let shape = shape();
    let (hidden, inner) = (shape.hidden_size, shape.intermediate_size);
    let a_layer = 4 * (hidden + hidden) + 3 * (hidden + inner);
    (rank as usize * shape.num_layers * a_layer * size_of::<f32>()) as f64 / 1e6
}

/// Runs it all; `each` gets every row as it is there.
pub fn publish(
    config: &PublishConfig,
    mut each: impl FnMut(&PublishResult),
) -> Result<PublishReport, BenchError> {
    let refused = |flag, problem: String| Err(BenchError::Refused { flag, problem });
    if config.repeats == 0 {
        return refused("--repeats", "a median takes at least one".into());
    }
    if config.replicas.iter().any(|n| !(1..=64).contains(n)) {
        return refused("--replicas", "1 to 64".into());
    }
    let most = shape().hidden_size as u32;
    if config.ranks.iter().any(|rank| !(1..=most).contains(rank)) {
        return refused("--rank", format!("1 to {most}"));
    }
    let machine = Machine::here();
    let folder = TemporaryFolder::new("publish");
    let model = folder.path().join("model");
    tiny::write(&model, &shape(), 0)
        .map_err(|source| BenchError::File { what: format!("writing {}", model.display()), source })?;
    let mut results = Vec::new();
    for &replicas in &config.replicas {
        let data = folder.path().join(format!("data-{replicas}"));
        run_here("bench", async {
            results.extend(with_cluster(config, replicas, &model, &data, &mut each).await?);
            Ok::<_, BenchError>(())
        })?;
    }
    Ok(PublishReport { bench: "publish", machine, repeats: config.repeats, results })
}

async fn with_cluster(
    config: &PublishConfig,
    replicas: u32,
    model: &Path,
    data: &Path,
    each: &mut impl FnMut(&PublishResult),
) -> Result<Vec<PublishResult>, BenchError> {
    let data = DataDirectory::open(data)?;
    let supervisor = Supervisor::start(SupervisorConfig {
        program: config.program.clone(),
        data: data.clone(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        join: None,
        history: 1,
        store: None,
        certificate_life: CERTIFICATE_LIFE,
        nodes: replicas,
        trainers: 1,
        samplers: replicas,
        threads: config.threads,
        compute: ComputeOptions::default(),
        models: vec![ModelSource::new(MODEL, model)],
        logs_to_files: true,
        log_format: "text".into(),
    })
    .await?;
    let measured = async {
        let service = wait_until_joined(data.path(), replicas).await?;
        let mut rows = Vec::new();
        for &rank in &config.ranks {
            let row = measure(&service, rank, replicas, config.repeats).await?;
            each(&row);
            rows.push(row);
        }
        Ok(rows)
    };
    let measured = measured.await;
    supervisor.shutdown().await;
    measured
}

async fn measure(
    service: &ServiceClient,
    rank: u32,
    replicas: u32,
    repeats: u32,
) -> Result<PublishResult, BenchError> {
    let options = LoraOptions { replicas: Some(1), ..LoraOptions::default() };
    let training = service.create_lora_training_client(MODEL, rank, options).await?;
    let mut seconds = Vec::new();
    for repeat in 0..=repeats {
        step(&training).await?;
        let begun = Instant::now();
        training.save_weights_and_get_sampling_client(&format!("publish-{repeat}")).await?;
        // The first also loads the model in the replicas.
        if repeat > 0 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    let back_after_kill_s = match replicas {
        1 => Some(round(comeback(service, &training).await?, 2)),
        _ => None,
    };
    Ok(PublishResult {
        adapter_mb: round(adapter_mb(rank), 1),
        rank,
        replicas,
        seconds: round(median(seconds.iter().copied()), 4),
        seconds_min: round(seconds.iter().copied().fold(f64::INFINITY, f64::min), 4),
        seconds_max: round(seconds.iter().copied().fold(0.0, f64::max), 4),
        back_after_kill_s,
    })
}

/// One step on a datum of a few tokens: what is trained does not matter here.
async fn step(training: &TrainingClient) -> Result<(), BenchError> {
    let datum = Datum { model_input: prompt(), loss_fn_inputs: Default::default() };
    training.forward_backward(vec![datum], LossSpec::new(LossFn::CrossEntropy)).await?;
    training.optim_step(AdamParams::default()).await?;
    Ok(())
}

/// Kills the only node; seconds until the version that it served is served again.
async fn comeback(service: &ServiceClient, training: &TrainingClient) -> Result<f64, BenchError> {
    let sampling = training.save_weights_and_get_sampling_client("before-the-kill").await?;
    let draw = || {
        let params = SamplingParams { max_tokens: Some(1), ..SamplingParams::default() };
        sampling.sample(prompt(), 1, params, SampleFlags::default())
    };
    draw().await?;
    let status = service.cluster_status().await?;
    let node = status.nodes.first().ok_or_else(|| BenchError::worker("the node", "it is not there"))?;
    // SAFETY: sends a signal to a process that this one's supervisor started; touches no memory.
    unsafe { libc::kill(node.pid as libc::pid_t, libc::SIGKILL) };
    let begun = Instant::now();
    // A request that was on its way to the killed replica may fail; what counts is when one is answered.
    let answered = async {
        while draw().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(COMEBACK, answered).await {
        Ok(()) => Ok(begun.elapsed().as_secs_f64()),
        Err(_) => Err(BenchError::worker("the node", format!("it was not back within {COMEBACK:?}"))),
    }
}

fn prompt() -> ModelInput {
    ModelInput::from_ints((100..116).collect())
}

use std::sync::Arc;

use candle_core::Tensor;
use tokenizers::Tokenizer;
use tokio::sync::mpsc;

use crate::{
    protocol::{ClientRequest, ClientResponse, Operation, OperationResult, RunInfo, SampleTarget},
    types::{
        AdamParams, DataLimits, Datum, ErrorKind, ForwardBackwardFuture, InitTrainerServerResponse,
        LoadWeightsResponse, LoraConfig, LossSpec, OperationCompleter, OperationError, OperationFuture,
        OptimStepResponse, PolicyId, RunId, SaveWeightsForSamplerResponse, SaveWeightsResponse,
    },
};

use super::{
    ClientError, CustomLoss, CustomLossFn, SamplingClient,
    custom::{self, join_parts, split},
    service::{Shared, tokenizer, unexpected},
    submit::{self, Job, Submit},
    wandb::WandbLogger,
};

/// Operations that may wait in this client to be accepted. They hold their data, so the bound
/// is about memory; a loop that runs so far ahead has lost its own results.
const MAX_AHEAD: usize = 1024;

/// Trains one run. Methods return at once; the run executes them in the order of the calls.
#[derive(Clone)]
pub struct TrainingClient {
    shared: Arc<Shared>,
    info: RunInfo,
    jobs: mpsc::Sender<Job>,
}

/// What a training client is bound to.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingInfo {
    pub run: RunId,
    pub base_model: String,
    pub lora: LoraConfig,
    pub replicas: u32,
    pub max_seq_len: u32,
}

impl TrainingClient {
    pub(super) fn new(shared: Arc<Shared>, info: RunInfo, logger: Option<WandbLogger>) -> Self {
        if let Some(logger) = &logger {
            logger.describe(&info);
        }
        let (jobs, queue) = mpsc::channel(MAX_AHEAD);
        shared.runtime.spawn(submit::run(shared.link.clone(), info.run, queue, logger));
        Self { shared, info, jobs }
    }

    /// The run.
    pub fn run(&self) -> RunId {
        self.info.run
    }

    /// Model, adapter and limits of the run.
    pub fn get_info(&self) -> TrainingInfo {
        TrainingInfo {
            run: self.info.run,
            base_model: self.info.base_model.clone(),
            lora: self.info.lora.clone(),
            replicas: self.info.replicas,
            max_seq_len: self.info.max_seq_len,
        }
    }

    /// Loss and log-probabilities of `data`; touches no gradient.
    pub fn forward(&self, data: Vec<Datum>, loss: LossSpec) -> ForwardBackwardFuture {
        self.pass(data, loss, custom::Pass::Forward)
    }

    /// Loss and log-probabilities of `data`, and adds the gradient of the loss's sum.
    pub fn forward_backward(&self, data: Vec<Datum>, loss: LossSpec) -> ForwardBackwardFuture {
        self.pass(data, loss, custom::Pass::ForwardBackward)
    }

    fn pass(&self, data: Vec<Datum>, loss: LossSpec, pass: custom::Pass) -> ForwardBackwardFuture {
        // Before anything is cut off and sent: a call is refused whole, or taken whole. The size
        // of the vocabulary is the service's to know.
        let limits =
            DataLimits { vocab_size: u32::MAX as usize, max_seq_len: self.info.max_seq_len as usize };
        if let Err(invalid) = loss.check_data(limits, &data) {
            return OperationFuture::ready(Err(invalid.into()));
        }
        let together = loss.loss_fn.datums_together();
        let mut parts: Vec<_> = split(data, together)
            .into_iter()
            .map(|part| {
                let (completer, future) = OperationFuture::pair();
                let loss = loss.clone();
                self.enqueue(Job::Pass { pass, loss, data: part, completer });
                future
            })
            .collect();
        match parts.len() {
            1 => parts.remove(0),
            _ => self.then(async move {
                let mut outputs = Vec::with_capacity(parts.len());
                for part in parts {
                    outputs.push(part.await?);
                }
                Ok(join_parts(outputs, loss.skip_token_normalization))
            }),
        }
    }

    /// A loss of your own over the log-probabilities: a `forward`, then `loss_fn` on this
    /// machine, then a backward pass with the gradient that candle's autograd finds from the
    /// returned loss to the log-probabilities.
    ///
    /// Each datum needs `target_tokens`; `loss_fn` gets one float32 tensor of shape `[N]` per
    /// datum. Gradients are added unscaled (`skip_token_normalization`). Operations called
    /// later wait for the closure, as they must come after its backward pass.
    pub fn forward_backward_custom<F>(&self, data: Vec<Datum>, loss_fn: F) -> ForwardBackwardFuture
    where
        F: FnOnce(&[Datum], &[Tensor]) -> candle_core::Result<CustomLoss> + Send + 'static,
    {
        let (completer, future) = OperationFuture::pair();
        self.enqueue(Job::Custom { data, loss_fn: Box::new(loss_fn) as CustomLossFn, completer });
        future
    }

    /// One Adam step; the step count, which is the policy version, rises by 1.
    pub fn optim_step(&self, adam: AdamParams) -> OperationFuture<OptimStepResponse> {
        self.operate(Operation::OptimStep { adam }, |result| match result {
            OperationResult::OptimStep(response) => Some(response),
            _ => None,
        })
    }

    /// Resets the run to a fresh adapter: step 0, no moments, no gradient.
    pub fn init(&self, lora: LoraConfig) -> OperationFuture<InitTrainerServerResponse> {
        self.operate(Operation::Init { lora }, |result| match result {
            OperationResult::Init(response) => Some(response),
            _ => None,
        })
    }

    /// Saves adapter, moments and step under `name`.
    pub fn save_state(&self, name: &str) -> OperationFuture<SaveWeightsResponse> {
        self.operate(Operation::SaveState { name: name.into(), ttl_seconds: None }, |result| match result {
            OperationResult::SaveState(response) => Some(response),
            _ => None,
        })
    }

    /// Loads the weights of a checkpoint; moments are dropped and the step is 0 again.
    pub fn load_state(&self, path: &str) -> OperationFuture<LoadWeightsResponse> {
        self.load(path, false)
    }

    /// Loads weights, moments and step of a trainer checkpoint.
    pub fn load_state_with_optimizer(&self, path: &str) -> OperationFuture<LoadWeightsResponse> {
        self.load(path, true)
    }

    fn load(&self, path: &str, with_optimizer: bool) -> OperationFuture<LoadWeightsResponse> {
        let operation = Operation::LoadState { path: path.into(), with_optimizer, source: None };
        self.operate(operation, |result| match result {
            OperationResult::LoadState(response) => Some(response),
            _ => None,
        })
    }

    /// Saves the adapter as a sampler checkpoint without serving it.
    pub fn save_weights_for_sampler(&self, name: &str) -> OperationFuture<SaveWeightsForSamplerResponse> {
        self.save_for_sampler(name, false)
    }

    fn save_for_sampler(&self, name: &str, publish: bool) -> OperationFuture<SaveWeightsForSamplerResponse> {
        let operation = Operation::SaveWeightsForSampler { name: name.into(), publish, ttl_seconds: None };
        self.operate(operation, |result| match result {
            OperationResult::SaveWeightsForSampler(response) => Some(response),
            _ => None,
        })
    }

    /// Saves the adapter, publishes it to every sampler replica, and resolves to a client that
    /// is pinned to it once it is being served.
    pub fn save_weights_and_get_sampling_client(&self, name: &str) -> OperationFuture<SamplingClient> {
        let saved = self.save_for_sampler(name, true);
        let this = self.clone();
        self.then(async move {
            let version = saved.await?.version;
            let info = this.refresh_on_link().await?;
            let live = if version == 0 { info.initial } else { info.live };
            let Some(policy) = live.filter(|policy| policy.step >= version) else {
                let message = format!("version {version} of {} was published but is not live", info.run);
                return Err(OperationError::new(ErrorKind::Internal, message));
            };
            Ok(this.sampling_client(policy))
        })
    }

    fn sampling_client(&self, policy: PolicyId) -> SamplingClient {
        let base_model = self.info.base_model.clone();
        SamplingClient::new(self.shared.clone(), base_model, SampleTarget::Policy(policy), Some(policy))
    }

    /// Optimiser steps applied to the run so far. Not ordered behind queued operations.
    pub async fn policy_version(&self) -> Result<u64, ClientError> {
        Ok(self.refresh().await?.step)
    }

    /// Where the run stands now. Not ordered behind queued operations.
    pub async fn refresh(&self) -> Result<RunInfo, ClientError> {
        let this = self.clone();
        self.shared.runtime.run(async move { this.refresh_on_link().await }).await
    }

    async fn refresh_on_link(&self) -> Result<RunInfo, ClientError> {
        match self.shared.link.request(ClientRequest::RunInfo { run: self.info.run }).await? {
            ClientResponse::Run(info) => Ok(info),
            other => Err(unexpected(&other)),
        }
    }

    /// The base model's tokenizer.
    pub async fn get_tokenizer(&self) -> Result<Tokenizer, ClientError> {
        tokenizer(&self.shared, &self.info.base_model).await
    }

    /// Queues an operation whose result is one variant.
    fn operate<T: Clone + Send + 'static>(
        &self,
        operation: Operation,
        pick: fn(OperationResult) -> Option<T>,
    ) -> OperationFuture<T> {
        let (completer, future) = OperationFuture::pair();
        self.enqueue(Job::Operation(Submit { operation, finish: finish(completer, pick) }));
        future
    }

    /// Hands a job to the submitting task; a full queue fails it at once.
    fn enqueue(&self, job: Job) {
        if let Err(refused) = self.jobs.try_send(job) {
            let (job, error) = match refused {
                mpsc::error::TrySendError::Full(job) => {
                    let message = format!(
                        "more than {MAX_AHEAD} operations of {} wait; take results first",
                        self.run()
                    );
                    (job, OperationError::new(ErrorKind::ResourceExhausted, message))
                }
                mpsc::error::TrySendError::Closed(job) => {
                    (job, OperationError::new(ErrorKind::Internal, "the client's submitting task has died"))
                }
            };
            job.fail(error);
        }
    }

    /// A future of its own for what is done after other operations.
    fn then<T: Clone + Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, OperationError>> + Send + 'static,
    ) -> OperationFuture<T> {
        let (completer, future) = OperationFuture::pair();
        self.shared.runtime.spawn(async move { completer.complete(work.await) });
        future
    }
}

/// Completes an operation with the one variant that answers it.
fn finish<T: Send + 'static>(
    completer: OperationCompleter<T>,
    pick: fn(OperationResult) -> Option<T>,
) -> submit::Finish {
    Box::new(move |outcome| {
        completer.complete(outcome.and_then(|result| {
            pick(result).ok_or_else(|| {
                OperationError::new(
                    ErrorKind::Internal,
                    "the service answered with another operation's result",
                )
            })
        }))
    })
}

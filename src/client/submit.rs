//! The task that submits one run's operations, one after the other.
//!
//! Order is kept by waiting for each acceptance before the next submission; outcomes are
//! waited for on the side. Each submission has a key of its own, so that repeating it after a
//! lost connection never runs it twice.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    protocol::{
        ClientRequest, ClientResponse, MAX_INLINE_PAYLOAD, Operation, OperationKey, OperationResult,
        OperationSeq, OperationStatus, Payload, SubmitOperation, decode_compressed, encode_compressed,
    },
    types::{
        Datum, ErrorKind, ForwardBackwardOutput, LossFn, LossSpec, OperationCompleter, OperationError, RunId,
    },
};

use super::{
    ClientError, CustomLossFn, Link,
    custom::{self, Pass},
    service::unexpected,
    wandb::WandbLogger,
};

/// How long one `WaitOperation` is held by the service.
const HOLD_MS: u32 = 20_000;

/// What becomes of an operation's result.
pub type Finish = Box<dyn FnOnce(Result<OperationResult, OperationError>) + Send>;

/// An operation without data.
pub struct Submit {
    pub operation: Operation,
    pub finish: Finish,
}

/// One call of a training client.
pub enum Job {
    Operation(Submit),
    Pass {
        pass: Pass,
        loss: LossSpec,
        data: Vec<Datum>,
        completer: OperationCompleter<ForwardBackwardOutput>,
    },
    Custom {
        data: Vec<Datum>,
        loss_fn: CustomLossFn,
        completer: OperationCompleter<ForwardBackwardOutput>,
    },
}

impl Job {
    /// Fails a job that could not be queued.
    pub fn fail(self, error: OperationError) {
        match self {
            Self::Operation(submit) => (submit.finish)(Err(error)),
            Self::Pass { completer, .. } | Self::Custom { completer, .. } => completer.complete(Err(error)),
        }
    }
}

/// What the jobs of one run share.
struct Submitter {
    link: Arc<Link>,
    run: RunId,
    logger: Option<WandbLogger>,
}

/// Submits jobs in order until every client of the run is gone.
pub async fn run(link: Arc<Link>, run: RunId, mut jobs: mpsc::Receiver<Job>, logger: Option<WandbLogger>) {
    let submitter = Arc::new(Submitter { link, run, logger });
    while let Some(job) = jobs.recv().await {
        match job {
            Job::Operation(Submit { operation, finish }) => submitter.submit(operation, finish).await,
            Job::Pass { pass, loss, data, completer } => {
                let reader = submitter.clone();
                let accepted = submitter.submit_pass(pass, loss, data).await;
                tokio::spawn(async move { completer.complete(reader.output(accepted).await) });
            }
            Job::Custom { data, loss_fn, completer } => match submitter.custom(data, loss_fn).await {
                Ok((accepted, metrics)) => {
                    let reader = submitter.clone();
                    tokio::spawn(async move {
                        let output = reader.output(Ok(accepted)).await;
                        completer.complete(output.map(|output| with_metrics(output, metrics)));
                    });
                }
                Err(error) => completer.complete(Err(error)),
            },
        }
    }
}

impl Submitter {
    async fn submit(self: &Arc<Self>, operation: Operation, finish: Finish) {
        match self.accept(operation).await {
            Err(error) => finish(Err(error)),
            Ok(seq) => {
                let this = self.clone();
                tokio::spawn(async move {
                    let outcome = this.outcome(seq).await;
                    if let (Some(logger), Ok(OperationResult::OptimStep(step))) = (&this.logger, &outcome) {
                        logger.log_step(&step.metrics);
                    }
                    finish(outcome)
                });
            }
        }
    }

    /// Stores the data, then submits the pass over it.
    async fn submit_pass(
        &self,
        pass: Pass,
        loss: LossSpec,
        data: Vec<Datum>,
    ) -> Result<OperationSeq, OperationError> {
        let data = self.payload(data).await?;
        let operation = match pass {
            Pass::Forward => Operation::Forward { loss, data },
            Pass::ForwardBackward => Operation::ForwardBackward { loss, data },
        };
        self.accept(operation).await
    }

    /// Forward, the caller's loss, and the backward pass that its gradient drives.
    async fn custom(
        &self,
        data: Vec<Datum>,
        loss_fn: CustomLossFn,
    ) -> Result<(OperationSeq, BTreeMap<String, f64>), OperationError> {
        let loss = LossSpec {
            loss_fn: LossFn::CrossEntropy,
            config: BTreeMap::new(),
            skip_token_normalization: true,
            top_k_logprobs: 0,
        };
        let scored = custom::without_weights(&data)?;
        let forward = self.submit_pass(Pass::Forward, loss.clone(), scored).await?;
        let output = self.output(Ok(forward)).await?;
        let (weighted, metrics) =
            tokio::task::spawn_blocking(move || custom::evaluate(data, &output, loss_fn))
                .await
                .unwrap_or_else(|e| {
                    Err(OperationError::new(
                        ErrorKind::InvalidInput,
                        format!("the custom loss panicked: {e}"),
                    ))
                })?;
        Ok((self.submit_pass(Pass::ForwardBackward, loss, weighted).await?, metrics))
    }

    async fn payload(&self, data: Vec<Datum>) -> Result<Payload, OperationError> {
        // Compressing megabytes takes milliseconds: off the runtime's threads.
        let bytes = tokio::task::spawn_blocking(move || encode_compressed(&data)).await.map_err(|e| {
            OperationError::new(ErrorKind::Internal, format!("encoding the data failed: {e}"))
        })?;
        if bytes.len() <= MAX_INLINE_PAYLOAD {
            return Ok(Payload::Inline(bytes));
        }
        Ok(Payload::Blob(self.link.put_blob(Bytes::from(bytes)).await?))
    }

    async fn accept(&self, operation: Operation) -> Result<OperationSeq, OperationError> {
        let submit = SubmitOperation { run: self.run, key: fresh_key()?, operation };
        match self.link.request(ClientRequest::Submit(submit)).await? {
            ClientResponse::Accepted { seq } => Ok(seq),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn outcome(&self, seq: OperationSeq) -> Result<OperationResult, OperationError> {
        loop {
            let wait = ClientRequest::WaitOperation { run: self.run, seq, hold_ms: HOLD_MS };
            match self.link.request(wait).await? {
                ClientResponse::Operation(OperationStatus::Pending) => {}
                ClientResponse::Operation(OperationStatus::Done(result)) => return Ok(result),
                ClientResponse::Operation(OperationStatus::Failed(error)) => return Err(error),
                other => return Err(unexpected(&other).into()),
            }
        }
    }

    /// The outcome of a forward pass, read from wherever it is.
    async fn output(
        &self,
        accepted: Result<OperationSeq, OperationError>,
    ) -> Result<ForwardBackwardOutput, OperationError> {
        let bytes = match self.outcome(accepted?).await? {
            OperationResult::ForwardBackward(Payload::Inline(bytes)) => bytes,
            OperationResult::ForwardBackward(Payload::Blob(blob)) => self.link.get_blob(blob).await?,
            other => {
                let message = format!("a forward pass was answered with {other:?}");
                return Err(OperationError::new(ErrorKind::Internal, message));
            }
        };
        let output: ForwardBackwardOutput =
            decode_compressed("forward_backward output", &bytes).map_err(ClientError::from)?;
        if let Some(logger) = &self.logger {
            logger.log(&output.metrics);
        }
        Ok(output)
    }
}

fn with_metrics(mut output: ForwardBackwardOutput, metrics: BTreeMap<String, f64>) -> ForwardBackwardOutput {
    if let Some(loss) = metrics.get("loss") {
        output.loss = *loss;
    }
    output.metrics.extend(metrics);
    output
}

/// A key that no other submission has.
pub fn fresh_key() -> Result<OperationKey, OperationError> {
    let mut key = [0; 16];
    getrandom::fill(&mut key)
        .map_err(|e| OperationError::new(ErrorKind::Internal, format!("no randomness for a key: {e}")))?;
    Ok(OperationKey(key))
}

//! What each operation makes of a run's state.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    model::{Adapter, LoraLayout, TrainState},
    protocol::{
        ADAPTER_FILE, BlobRef, LoadSource, OpToken, Operation, OperationResult, RankIndex, STATE_FILE, Saved,
        SavedFile,
    },
    types::{
        CheckpointTarget, Digest, ErrorKind, InitTrainerServerResponse, LoadWeightsResponse, LoraConfig,
        OperationError, SaveWeightsForSamplerResponse, SaveWeightsResponse,
    },
};

use super::{
    Blobs, Failure,
    compute::{HeldRun, Tools},
    forward_backward::{self, Mode},
};

/// PEFT's description of an adapter, beside [`ADAPTER_FILE`].
const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// What an operation leads to if it is committed.
pub(super) struct Outcome {
    pub(super) next: TrainState,
    pub(super) result: OperationResult,
    pub(super) saved: Option<Saved>,
}

/// Computes `operation` on the committed state, which stays as it is.
pub(super) fn run(
    run: &mut HeldRun,
    tools: &mut Tools,
    token: OpToken,
    operation: Operation,
) -> Result<Outcome, Failure> {
    match operation {
        Operation::Init { lora } => init(run, &lora),
        Operation::Forward { loss, data } => {
            forward_backward::run(run, tools, token, &loss, &data, Mode::Forward)
        }
        Operation::ForwardBackward { loss, data } => {
            forward_backward::run(run, tools, token, &loss, &data, Mode::ForwardBackward)
        }
        Operation::OptimStep { adam } => {
            let (next, response) = run.state.optim_step(&adam)?;
            Ok(Outcome { next, result: OperationResult::OptimStep(response), saved: None })
        }
        Operation::SaveState { name, .. } => save_state(run, &*tools.config.blobs, &name),
        Operation::SaveWeightsForSampler { name, .. } => {
            save_weights_for_sampler(run, &*tools.config.blobs, &name)
        }
        Operation::LoadState { path, with_optimizer, source } => {
            load_state(run, &*tools.config.blobs, &path, with_optimizer, source)
        }
    }
}

/// Stores `bytes` if this is rank 0; every rank names them.
pub(super) fn store(run: &HeldRun, blobs: &dyn Blobs, bytes: Vec<u8>) -> Result<BlobRef, OperationError> {
    if run.rank == RankIndex(0) {
        blobs.put(Bytes::from(bytes))
    } else {
        Ok(BlobRef { digest: Digest::of(&bytes), size: bytes.len() as u64 })
    }
}

fn init(run: &HeldRun, lora: &LoraConfig) -> Result<Outcome, Failure> {
    let layout = LoraLayout::new(&run.model.config, lora).map_err(OperationError::from)?;
    let next = TrainState::fresh(Arc::new(layout));
    let result = OperationResult::Init(InitTrainerServerResponse { step: next.step, lora_rank: lora.rank });
    Ok(Outcome { next, result, saved: None })
}

fn save_state(run: &HeldRun, blobs: &dyn Blobs, name: &str) -> Result<Outcome, Failure> {
    // Loading drops the accumulated gradient, so saving it would only make the file larger.
    let kept = run.state.without_gradient();
    let blob = store(run, blobs, kept.to_bytes())?;
    Ok(Outcome {
        next: run.state.clone(),
        result: OperationResult::SaveState(SaveWeightsResponse {
            path: format!("bt://loops:{}/weights/{name}", run.spec.run),
        }),
        saved: Some(Saved {
            digest: kept.digest(),
            files: vec![SavedFile { name: STATE_FILE.to_owned(), blob }],
        }),
    })
}

fn save_weights_for_sampler(run: &HeldRun, blobs: &dyn Blobs, name: &str) -> Result<Outcome, Failure> {
    let adapter = run.state.adapter();
    let [_, (_, config)] = adapter.to_peft(&run.spec.base_model);
    let files = vec![
        SavedFile { name: ADAPTER_FILE.to_owned(), blob: store(run, blobs, adapter.to_bytes())? },
        SavedFile { name: ADAPTER_CONFIG_FILE.to_owned(), blob: store(run, blobs, config)? },
    ];
    Ok(Outcome {
        next: run.state.clone(),
        result: OperationResult::SaveWeightsForSampler(SaveWeightsForSamplerResponse {
            path: format!("bt://loops:{}/sampler_weights/{name}", run.spec.run),
            version: run.state.step,
        }),
        saved: Some(Saved { digest: adapter.digest(), files }),
    })
}

fn load_state(
    run: &HeldRun,
    blobs: &dyn Blobs,
    path: &str,
    with_optimizer: bool,
    source: Option<LoadSource>,
) -> Result<Outcome, Failure> {
    let LoadSource { target, blob } = source.ok_or_else(|| {
        OperationError::new(ErrorKind::NotFound, format!("no checkpoint was found at {path:?}"))
    })?;
    let file = match target {
        CheckpointTarget::Trainer => STATE_FILE,
        CheckpointTarget::Sampler => ADAPTER_FILE,
    };
    let bytes = blobs.get(blob).map_err(|e| unreadable(path, file, e))?;
    let unusable = |e: crate::model::AdapterError| {
        OperationError::new(ErrorKind::InvalidInput, format!("{path:?} can't be loaded: `{file}`: {e}"))
    };
    let loaded = match (target, with_optimizer) {
        (CheckpointTarget::Trainer, _) => {
            TrainState::from_bytes(&run.model.config, &bytes).map_err(unusable)?.without_gradient()
        }
        (CheckpointTarget::Sampler, false) => {
            TrainState::of_adapter(Adapter::from_bytes(&run.model.config, &bytes).map_err(unusable)?)
        }
        (CheckpointTarget::Sampler, true) => {
            let problem = format!("{path:?} holds no optimizer state: load a path of `save_state`");
            return Err(OperationError::new(ErrorKind::InvalidInput, problem).into());
        }
    };
    let next = if with_optimizer { loaded } else { loaded.without_optimizer() };
    let result = OperationResult::LoadState(LoadWeightsResponse { step: next.step });
    Ok(Outcome { next, result, saved: None })
}

/// Names the file. One that is damaged in the store is damaged for every rank, now and later.
fn unreadable(path: &str, file: &str, error: OperationError) -> OperationError {
    let kind = match error.kind {
        ErrorKind::Internal => ErrorKind::NotFound,
        other => other,
    };
    OperationError::new(kind, format!("{path:?} can't be loaded: `{file}`: {}", error.message))
}

//! Which blobs a fact names, and so needs for as long as it is written down.

use crate::protocol::{BlobRef, Operation, OperationResult, Payload};

use super::{Outcome, Record};

impl Record {
    /// The blobs that its row holds.
    pub fn blobs(&self) -> Vec<BlobRef> {
        match self {
            Self::Operation { operation, .. } => blobs_of_operation(operation),
            Self::Outcome { outcome: Outcome::Done { result, .. }, .. } => blobs_of_result(result),
            Self::Snapshot { snapshot, .. } => vec![*snapshot],
            Self::Checkpoint(saved) => saved.files.iter().map(|file| file.blob).collect(),
            Self::Slot { adapter, .. } => vec![*adapter],
            Self::Session { .. }
            | Self::Run { .. }
            | Self::Outcome { outcome: Outcome::Failed { .. }, .. }
            | Self::DropCheckpoint { .. }
            | Self::DropRun { .. }
            | Self::DropSlots { .. }
            | Self::PublishFailed { .. }
            | Self::Drained { .. }
            | Self::Certificate(_)
            | Self::ForgetCertificate { .. }
            | Self::Revoked { .. }
            | Self::Prune { .. } => Vec::new(),
        }
    }
}

/// Data, or what a load reads.
pub fn blobs_of_operation(operation: &Operation) -> Vec<BlobRef> {
    match operation {
        Operation::Forward { data, .. } | Operation::ForwardBackward { data, .. } => blobs_of_payload(data),
        // One that waits for its turn has no source yet, but may name a blob itself.
        Operation::LoadState { path, source, .. } => {
            let named = source.map(|source| source.blob).or_else(|| BlobRef::from_load_path(path));
            named.into_iter().collect()
        }
        Operation::Init { .. }
        | Operation::OptimStep { .. }
        | Operation::SaveState { .. }
        | Operation::SaveWeightsForSampler { .. } => Vec::new(),
    }
}

/// Output.
pub fn blobs_of_result(result: &OperationResult) -> Vec<BlobRef> {
    match result {
        OperationResult::ForwardBackward(output) => blobs_of_payload(output),
        OperationResult::Init(_)
        | OperationResult::OptimStep(_)
        | OperationResult::SaveState(_)
        | OperationResult::SaveWeightsForSampler(_)
        | OperationResult::LoadState(_) => Vec::new(),
    }
}

fn blobs_of_payload(payload: &Payload) -> Vec<BlobRef> {
    match payload {
        Payload::Inline(_) => Vec::new(),
        Payload::Blob(blob) => vec![*blob],
    }
}

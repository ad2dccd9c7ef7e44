use bincode::{Decode, Encode};

use crate::types::{
    AdamParams, CheckpointTarget, Digest, InitTrainerServerResponse, LoadWeightsResponse, LoraConfig,
    LossSpec, OptimStepResponse, SaveWeightsForSamplerResponse, SaveWeightsResponse,
};

/// Payloads up to here travel and are journaled inside the message; longer ones are blobs.
pub const MAX_INLINE_PAYLOAD: usize = 64 << 10;

/// A value that may be large, in its canonical compressed form
/// ([`encode_compressed`](super::encode_compressed)).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Payload {
    /// At most [`MAX_INLINE_PAYLOAD`] bytes.
    Inline(Vec<u8>),
    /// A blob that the coordinator's store holds.
    Blob(BlobRef),
}

/// A blob by name; fetched with `GetBlob`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct BlobRef {
    pub digest: Digest,
    pub size: u64,
}

/// How the path of a `LoadState` begins that names a blob instead of a checkpoint.
pub const BLOB_PATH: &str = "blob:";

impl BlobRef {
    /// The path under which a `LoadState` reads it: `blob:DIGEST/SIZE`, an [`ADAPTER_FILE`].
    pub fn load_path(&self) -> String {
        format!("{BLOB_PATH}{}/{}", self.digest, self.size)
    }

    /// What [`load_path`](Self::load_path) wrote.
    pub fn from_load_path(path: &str) -> Option<Self> {
        let (digest, size) = path.strip_prefix(BLOB_PATH)?.split_once('/')?;
        Some(Self { digest: digest.parse().ok()?, size: size.parse().ok()? })
    }
}

/// One file that an operation saved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SavedFile {
    pub name: String,
    pub blob: BlobRef,
}

/// What `SaveState` and `SaveWeightsForSampler` leave behind; equal on all ranks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Saved {
    /// Identity of what was saved: the adapter's digest (of a `PolicyId`), or the state's.
    pub digest: Digest,
    /// A sampler checkpoint: [`ADAPTER_FILE`] and `adapter_config.json` (PEFT layout). A
    /// trainer checkpoint: [`STATE_FILE`].
    pub files: Vec<SavedFile>,
}

/// The adapter's weights: what replicas stage, and what `LoadState` reads of a sampler
/// checkpoint.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// A run's whole state, as `TrainState::to_bytes` writes it.
pub const STATE_FILE: &str = "state.safetensors";

/// Where a `LoadState` reads from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct LoadSource {
    /// `Trainer`: the blob is a [`STATE_FILE`]; `Sampler`: an [`ADAPTER_FILE`].
    pub target: CheckpointTarget,
    pub blob: BlobRef,
}

/// One step of a run's state machine. What it decides is decided by its fields and the state
/// before it alone.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum Operation {
    /// A fresh adapter: B zero, moments and accumulated gradient dropped, step 0.
    Init { lora: LoraConfig },
    /// Loss and log-probabilities; touches no gradient. `data`: `Vec<Datum>`.
    Forward { loss: LossSpec, data: Payload },
    /// The same, and adds the gradient of the loss's sum. `data`: `Vec<Datum>`.
    ForwardBackward { loss: LossSpec, data: Payload },
    /// Divides by the token count, clips, steps, clears the gradient; raises the step by 1.
    OptimStep { adam: AdamParams },
    /// Saves adapter, moments and step as a trainer checkpoint, deleted after `ttl_seconds` if
    /// there are any.
    SaveState { name: String, ttl_seconds: Option<u64> },
    /// Saves the adapter as a sampler checkpoint; `publish` also makes it the live policy.
    SaveWeightsForSampler { name: String, publish: bool, ttl_seconds: Option<u64> },
    /// Replaces the weights by those of a checkpoint, dropping the accumulated gradient; without
    /// the optimiser also the moments, and the step is 0 again. `source` is filled in by the
    /// coordinator when the operation's turn comes (a save queued before it is then found), and
    /// journaled with the outcome, so that the name can move later. A path `blob:DIGEST/SIZE`
    /// names an adapter that the client has stored.
    LoadState { path: String, with_optimizer: bool, source: Option<LoadSource> },
}

impl Operation {
    /// As the journal, logs, traces and figures call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Init { .. } => "init",
            Self::Forward { .. } => "forward",
            Self::ForwardBackward { .. } => "forward_backward",
            Self::OptimStep { .. } => "optim_step",
            Self::SaveState { .. } => "save_state",
            Self::SaveWeightsForSampler { .. } => "save_weights_for_sampler",
            Self::LoadState { .. } => "load_state",
        }
    }
}

/// What a finished operation returns.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum OperationResult {
    /// Of `Init`.
    Init(InitTrainerServerResponse),
    /// Holds a `ForwardBackwardOutput`, for `Forward` and `ForwardBackward`.
    ForwardBackward(Payload),
    /// Of `OptimStep`.
    OptimStep(OptimStepResponse),
    /// Of `SaveState`.
    SaveState(SaveWeightsResponse),
    /// Of `SaveWeightsForSampler`.
    SaveWeightsForSampler(SaveWeightsForSamplerResponse),
    /// Of `LoadState`.
    LoadState(LoadWeightsResponse),
}

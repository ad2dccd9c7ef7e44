use crate::{
    gpu::GpuError,
    types::{Digest, ErrorKind, InvalidInput, OperationError, PolicyId},
};

/// Why a replica refuses a request, or can't hold a policy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplerError {
    /// The request's own values are wrong.
    #[error(transparent)]
    Invalid(#[from] InvalidInput),
    /// No model of that name is on this node.
    #[error("model {name:?} is not on this node, which has {offered:?}")]
    UnknownModel { name: String, offered: Vec<String> },
    /// The model is there, but its files can't be loaded.
    #[error("model {name:?} could not be loaded: {problem}")]
    ModelUnavailable { name: String, problem: String },
    /// Never staged here, or retired: stage it (again).
    #[error("policy {policy} is not held by this replica; stage and activate it first")]
    UnknownPolicy { policy: PolicyId },
    /// Held, but its activation has not been ordered yet.
    #[error("policy {policy} is staged but not active on this replica; activate it first")]
    NotActive { policy: PolicyId },
    /// The policy adapts another model than the one that the request names.
    #[error("policy {policy} adapts model {held_for:?}, but the request names {asked:?}")]
    OtherModel { policy: PolicyId, held_for: String, asked: String },
    /// Too many requests wait already.
    #[error(
        "the replica's queue is full: {requests} requests with {tokens} prompt tokens wait (bounds: \
         {max_requests} and {max_tokens}); try again later"
    )]
    QueueFull { requests: usize, tokens: usize, max_requests: usize, max_tokens: usize },
    /// One sequence of the request alone exceeds the replica's KV cache.
    #[error(
        "a prompt of {prompt_tokens} and {new_tokens} new tokens need {need_bytes} bytes of KV cache, the \
         replica has {kv_bytes}; ask for fewer max_tokens or give the replica more memory"
    )]
    NeverFits { prompt_tokens: usize, new_tokens: usize, need_bytes: usize, kv_bytes: usize },
    /// The answer could not be sent in one message.
    #[error(
        "the answer could take {answer_bytes} bytes, a message carries {max_bytes}; ask for fewer samples, \
         max_tokens or alternatives at once"
    )]
    AnswerTooLarge { answer_bytes: usize, max_bytes: usize },
    /// As many policies as a replica holds are held.
    #[error("the replica holds {held} policies, its most; retire one before staging {policy}")]
    SlotsFull { policy: PolicyId, held: usize },
    /// Too many policies are being verified already.
    #[error("the replica is verifying {verifying} policies already, its most; stage {policy} again later")]
    StagingBusy { policy: PolicyId, verifying: usize },
    /// What was loaded is not what the policy names.
    #[error("policy {policy} names weights {}, but those received hash to {found}", policy.digest)]
    DigestMismatch { policy: PolicyId, found: Digest },
    /// The bytes are no adapter for the model.
    #[error("the weights of policy {policy} can't be read: {problem}")]
    BadAdapter { policy: PolicyId, problem: String },
    /// A row of logits has NaN or infinity: the weights have diverged.
    #[error("the logits of sequence {sequence} at new token {position} are not finite: the weights diverged")]
    NotFinite { sequence: u32, position: usize },
    /// The same while scoring the prompt.
    #[error("the logits at prompt position {position} are not finite: the weights diverged")]
    PromptNotFinite { position: usize },
    /// The GPU failed in the middle of a step.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// One of the replica's threads has panicked.
    #[error("the replica has died: {reason}")]
    Dead { reason: String },
}

impl SamplerError {
    /// Who is at fault.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) | Self::OtherModel { .. } | Self::BadAdapter { .. } => ErrorKind::InvalidInput,
            Self::UnknownModel { .. } | Self::UnknownPolicy { .. } | Self::NotActive { .. } => {
                ErrorKind::NotFound
            }
            Self::QueueFull { .. }
            | Self::NeverFits { .. }
            | Self::AnswerTooLarge { .. }
            | Self::SlotsFull { .. }
            | Self::StagingBusy { .. } => ErrorKind::ResourceExhausted,
            Self::NotFinite { .. } | Self::PromptNotFinite { .. } => ErrorKind::NotFinite,
            // Bytes that changed on their way can be fetched again, from here or elsewhere.
            Self::DigestMismatch { .. } => ErrorKind::Unavailable,
            Self::Gpu(GpuError::OutOfMemory { .. }) => ErrorKind::ResourceExhausted,
            Self::Gpu(_) | Self::ModelUnavailable { .. } | Self::Dead { .. } => ErrorKind::Internal,
        }
    }
}

impl From<SamplerError> for OperationError {
    fn from(error: SamplerError) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

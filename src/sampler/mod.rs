//! One replica: admission, continuous batching, KV cache, versions, generation.
//!
//! ```text
//!   node ──Stage · Activate · Retire · Sample──► SamplerReplica        decides (`state`)
//!        ◄──ReplicaReport · GenerateReply────────┘ │    ▲
//!                                            order │    │ what ended
//!                                                  ▼    │
//!            replica-N: one step = prompts' rows and one row a sequence (`engine`)
//!            replica-N-loader: base models; reads and hashes adapters
//! ```
//!
//! The state knows lengths and names, never a tensor: which requests begin and which rows a step
//! has (`schedule`, `budget`), which weights serve whom (`slots`). The compute thread knows
//! tokens, caches and draws (`job`) and stops (`stop`). Between two steps it holds no
//! core, so training never waits longer than a step.

mod actor;
mod state;

mod budget;
mod schedule;
mod slots;

mod threads;

mod engine;
mod job;

mod stop;

mod error;

pub use actor::SamplerReplica;
pub use error::SamplerError;

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    kernels::CoreBudget,
    model::Library,
    protocol::{Generate, GenerateReply},
    types::{OperationError, PolicyId},
};

/// What a replica is made with.
pub struct ReplicaConfig {
    /// Number of this replica in its node, for logs and thread names.
    pub index: u32,
    pub library: Arc<Library>,
    pub cores: CoreBudget,
    /// Most bytes of keys and values over all sequences.
    pub kv_bytes: usize,
    /// Most sequences decoded together.
    pub max_batch: usize,
    /// Most prompt rows computed together.
    pub prefill_rows: usize,
    /// Called with a sentence when the actor or one of its threads has panicked, after its
    /// pending requests were answered: the binary aborts and is restarted by its launcher, an
    /// embedded cluster fails its operations.
    pub on_death: Arc<dyn Fn(&str) + Send + Sync>,
}

/// A replica's reports to its node.
#[derive(Debug, Clone)]
pub enum ReplicaReport {
    Staged { replica: u32, policy: PolicyId },
    StageFailed { replica: u32, policy: PolicyId, error: OperationError },
    Activated { replica: u32, policy: PolicyId },
}

/// Fetched, to be verified and held without serving it.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Stage {
    pub policy: PolicyId,
    pub base_model: String,
    /// The bytes of the blob that the coordinator named.
    pub adapter: Bytes,
}

/// New requests for this policy are served from now on.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Activate {
    pub policy: PolicyId,
}

/// Leaves memory once its last sequence has ended.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Retire {
    pub policy: PolicyId,
}

/// One sample request; `reply` gets exactly one answer. Dropping the receiver cancels it.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Sample {
    pub generate: Generate,
    pub reply: tokio::sync::oneshot::Sender<GenerateReply>,
}

#[cfg(test)]
mod tests;

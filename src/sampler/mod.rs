//! One replica: admission, continuous batching, KV cache, versions, generation.

mod budget;
mod error;
mod schedule;
mod slots;
mod state;

mod draw;
mod numerics;
mod stop;

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

/// The replica's actor: decides; its compute thread decodes.
pub struct SamplerReplica {}

impl actix::Actor for SamplerReplica {
    type Context = actix::Context<Self>;
}

impl SamplerReplica {
    /// Starts the actor (in the current actix system) and its threads, which end with it.
    ///
    /// `reports` must be drained: a replica whose report finds no room calls `on_death`, because
    /// its coordinator would wait for it for ever.
    ///
    /// # Errors
    ///
    /// If the system refuses a thread.
    pub fn launch(
        config: ReplicaConfig,
        reports: tokio::sync::mpsc::Sender<ReplicaReport>,
    ) -> std::io::Result<actix::Addr<Self>> {
        let _ = (config, reports);
        todo!()
    }
}

macro_rules! handlers {
    ($($message:ty),*) => {$(
        impl actix::Handler<$message> for SamplerReplica {
            type Result = ();
            fn handle(&mut self, _message: $message, _ctx: &mut Self::Context) {
                todo!()
            }
        }
    )*};
}
handlers!(Stage, Activate, Retire, Sample);

//! One rank: micro-batches, reduce, prepare and commit, snapshot, publish.
//!
//! A node has one [`TrainerRank`] per trainer slot; it holds the state of every run that has a
//! rank in that slot. The actor decides (`state`), one OS thread computes (`compute`):
//!
//! ```text
//!   node ──Event──► TrainerRank ──Job──► thread rank-N: prepare · micro-batches · all-reduce
//!          ◄─RankReport──┘      ◄──Done──┘              · second buffer · commit
//! ```
//!
//! Nothing here knows a connection: blobs come through [`Blobs`], peers through the
//! [`Join`] that the node gives it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    collective::Collective,
    kernels::CoreBudget,
    model::Library,
    protocol::{Blame, BlobRef, Generation, NodeMessage, OperationResult, Saved},
    types::{Digest, ErrorKind, OperationError, RunId},
};

mod actor;
mod state;

mod abort;
mod compute;
mod forward_backward;
mod operation;

pub use actor::{Deliver, TrainerRank};
pub use state::{Event, Formation};

/// What a rank slot is made with.
pub struct RankConfig {
    /// Number of this slot in its node, for logs and thread names.
    pub slot: u32,
    pub library: Arc<Library>,
    /// Ranks of one run on this node share them evenly.
    pub cores: CoreBudget,
    pub blobs: Arc<dyn Blobs>,
    pub join: Join,
    /// Least time between two reports of how far an operation is.
    pub progress_every: Duration,
    /// Called with a sentence when the actor or its thread has panicked: the binary aborts and
    /// is restarted by its launcher, an embedded cluster fails its operations.
    pub on_death: Arc<dyn Fn(&str) + Send + Sync>,
}

/// The blobs that a rank reads and writes; both calls block, and end within a bound of their own.
pub trait Blobs: Send + Sync {
    /// The bytes of a blob, checked against its digest.
    fn get(&self, blob: BlobRef) -> Result<Bytes, OperationError>;

    /// Returns once the bytes are durable under their digest.
    fn put(&self, bytes: Bytes) -> Result<BlobRef, OperationError>;
}

/// Makes a rank's side of its run's collectives. Called on the compute thread; may block, within
/// a bound of its own.
pub type Join = Arc<dyn Fn(&Formation) -> Result<Box<dyn Collective>, Failure> + Send + Sync>;

/// What a rank tells its node.
#[derive(Debug, Clone, PartialEq)]
pub enum RankReport {
    /// This slot's rank of the run stands, or why it does not. The node answers the coordinator
    /// once all of its slots have.
    Formed { run: RunId, generation: Generation, result: Result<(), Failure> },
    /// For the coordinator, as it is.
    Message(NodeMessage),
}

/// An operation computed into the second buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// Over the state that a commit would leave.
    pub state: Digest,
    pub result: OperationResult,
    pub saved: Option<Saved>,
    /// Optimiser steps after the operation.
    pub step: u64,
}

/// Why an operation did not get prepared, or a rank not formed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    pub error: OperationError,
    pub blame: Blame,
}

impl From<OperationError> for Failure {
    /// Wrong inputs and numbers out of range fail everywhere and again; all else is this
    /// machine's.
    fn from(error: OperationError) -> Self {
        let blame = match error.kind {
            ErrorKind::InvalidInput
            | ErrorKind::NotFound
            | ErrorKind::NotFinite
            | ErrorKind::PermissionDenied => Blame::Operation,
            ErrorKind::ResourceExhausted
            | ErrorKind::Unavailable
            | ErrorKind::DeadlineExceeded
            | ErrorKind::Internal => Blame::Environment,
        };
        Self { error, blame }
    }
}

impl Failure {
    /// A fault of this rank's machine or peers.
    fn environment(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { error: OperationError::new(kind, message), blame: Blame::Environment }
    }
}

#[cfg(test)]
mod tests;

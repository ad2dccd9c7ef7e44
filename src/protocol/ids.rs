use std::fmt;

use bincode::{Decode, Encode};

use crate::types::RunId;

/// A life of the coordinator: rises at each start, so that a node knows a newer master.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Epoch(pub u64);

/// Numbers the rank sets of one run: rises whenever its ranks are formed anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Generation(pub u32);

/// Position of an operation in its run's order, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct OperationSeq(pub u64);

/// A node process, numbered by the coordinator in the order of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct NodeId(pub u32);

/// A rank's place in a run's rank set, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct RankIndex(pub u32);

/// Numbers the sample requests that the coordinator hands to replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct RequestId(pub u64);

/// A caller's idempotency key: the same key in the same run never runs twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct OperationKey(pub [u8; 16]);

/// What every message about an operation carries: a receiver that has seen a higher one
/// refuses.
///
/// Ordered by epoch, incarnation, generation, then sequence within one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct OpToken {
    pub run: RunId,
    pub epoch: Epoch,
    pub generation: Generation,
    pub seq: OperationSeq,
    /// Life of the run in which the operation executes; rises at init, load and fork.
    pub incarnation: u32,
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node-{}", self.0)
    }
}

impl fmt::Display for OpToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} op {} (epoch {}, generation {}, incarnation {})",
            self.run, self.seq.0, self.epoch.0, self.generation.0, self.incarnation
        )
    }
}

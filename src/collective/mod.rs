//! All-reduce between the ranks of a run: shared memory on one host, QUIC between hosts.
//! Reduces flat vectors of f32 in a fixed tree and doesn't know what they mean.

use std::time::Instant;

use crate::protocol::{OpToken, RankIndex};

/// The sum of the leaves `index << level .. (index + 1) << level`.
#[derive(Debug, Clone, PartialEq)]
pub struct Partial {
    pub level: u32,
    pub index: u32,
    pub values: Vec<f32>,
}

/// Why a collective did not complete.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CollectiveError {
    #[error("{operation} of {token}: rank {} did not answer within its deadline", .missing.0)]
    Deadline { operation: &'static str, token: OpToken, missing: RankIndex },
    #[error("{operation} of {token}: rank {} is gone: {reason}", .missing.0)]
    Lost { operation: &'static str, token: OpToken, missing: RankIndex, reason: String },
}

/// One rank's side of a rank set's collectives. Every rank calls the same methods with the
/// same tokens in the same order; each call has a deadline and, failing, names the missing rank.
pub trait Collective: Send {
    fn rank(&self) -> RankIndex;

    fn world_size(&self) -> u32;

    /// Adds up the `leaves` vectors of one tree, of which each rank holds some aligned
    /// subtrees, and leaves the sum in `out` on every rank, the same bits on each:
    /// `sum(node) = sum(left) + sum(right)`, or `sum(left)` where the right side has no leaf.
    fn all_reduce(
        &mut self,
        token: OpToken,
        leaves: u32,
        partials: Vec<Partial>,
        out: &mut [f32],
        deadline: Instant,
    ) -> Result<(), CollectiveError>;

    /// Every rank's bytes, by rank, on every rank.
    fn all_gather(
        &mut self,
        token: OpToken,
        bytes: Vec<u8>,
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// From any thread: makes calls in progress and later ones fail at once.
    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync>;
}

/// Adds vectors leaf by leaf in order and keeps at most one partial a level: what a rank uses
/// while it computes its own range of leaves.
pub struct TreeAccumulator {}

impl TreeAccumulator {
    /// For leaves `first..`, vectors of `len` values.
    pub fn new(first: u32, len: usize) -> Self {
        let _ = (first, len);
        todo!()
    }

    /// The next leaf.
    pub fn push(&mut self, leaf: Vec<f32>) {
        let _ = leaf;
        todo!()
    }

    /// The maximal aligned subtrees of what was pushed, of a tree with `leaves` leaves.
    pub fn finish(self, leaves: u32) -> Vec<Partial> {
        let _ = leaves;
        todo!()
    }
}

/// Which contiguous leaves each rank computes, aligned so that few partials travel: weights
/// are the leaves' costs (tokens). A pure function; ranks may get none.
pub fn assign_leaves(costs: &[u64], world_size: u32) -> Vec<std::ops::Range<u32>> {
    let _ = (costs, world_size);
    todo!()
}

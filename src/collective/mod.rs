//! All-reduce between the ranks of a run: shared memory on one host, QUIC between hosts, NCCL between GPUs.
//! Reduces flat vectors of f32 in a fixed tree and doesn't know what they mean.
//!
//! ```text
//!   leaves 0..n ─TreeAccumulator─► each rank's partials          (aligned subtrees of one tree)
//!                                     │ scatter: slice j of them to rank j
//!                                     ▼
//!                rank j sums slice j over all partials in tree order
//!                                     │ share: slice j to everyone
//!                                     ▼
//!                                the whole sum, the same bits on each rank
//! ```
//!
//! A rank set's collective is made once a generation by [`join`] and goes with it: after the first
//! call that fails, every later one fails too, because the ranks no longer agree on where they are.

use std::time::Instant;

use crate::protocol::{OpToken, RankIndex};

mod error;

mod assign;
mod tree;

mod contribution;
mod exchange;
mod plan;

mod inbox;
mod quic;
mod shared_memory;
mod solo;

mod nccl;

mod join;

pub use assign::assign_leaves;
pub use error::CollectiveError;
pub use inbox::{CollectiveInbox, StreamKey};
pub use join::{GpuSeat, JoinError, RankSet, host_id, join};
#[cfg(test)]
pub(crate) use nccl::tests::over_host_link;
pub use nccl::{NCCL_IN_ONE_ORDER, Reduction, nccl_memory};
pub use tree::{Partial, TreeAccumulator, TreeError, reduce_tree};

/// One rank's side of a rank set's collectives. Every rank calls the same methods with the
/// same tokens in the same order; each call has a deadline and, failing, names the missing rank.
///
/// Calls block, so they belong on a thread of their own, never on one of a tokio runtime.
pub trait Collective: Send {
    fn rank(&self) -> RankIndex;

    fn world_size(&self) -> u32;

    /// Adds up the `leaves` vectors of one tree, of which each rank holds some aligned
    /// subtrees, and leaves the sum in `out` on every rank, the same bits on each:
    /// `sum(node) = sum(left) + sum(right)`, or `sum(left)` where the right side has no leaf.
    /// The sum of no leaves is zero.
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

#[cfg(test)]
mod tests;

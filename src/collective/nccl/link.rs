use std::{
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use crate::{collective::plan::Step, protocol::RankIndex};

/// What a rank needs of its GPU and of NCCL: a memory of f32 values on the device, a smaller one in the
/// host that the GPU can reach (pinned), and one queue of work that runs in order.
///
/// Nothing here waits. What is queued is given to NCCL when [`Link::is_queued`] says so, before which nothing
/// more may be queued behind it; it is done when [`Link::is_idle`] says so. One implementation is a GPU
/// (`device`), the other a host with threads for ranks (`host`), by which everything above this line
/// is tested.
pub(super) trait Link: Send {
    /// Makes the device's memory and the pinned one at least so large. Only while idle; forgets what they held.
    fn reserve(&mut self, device: usize, pinned: usize) -> Result<(), Fault>;

    /// The pinned memory. Only while idle.
    fn pinned(&mut self) -> Result<&mut [f32], Fault>;

    /// Queues a copy of the first values of the pinned memory into the device's.
    fn upload(&mut self, into: Range<usize>) -> Result<(), Fault>;

    /// Queues a copy of the device's values to the beginning of the pinned memory.
    fn download(&mut self, from: Range<usize>) -> Result<(), Fault>;

    /// Queues these as one group, of which no order matters but that of those between the same two ranks.
    fn transfer(&mut self, transfers: &[Transfer]) -> Result<(), Fault>;

    /// Queues the additions of `steps`, whose partial sums begin at `sources`, into `out`: zeros if there are
    /// no steps. `out` overlaps no source.
    fn sum(&mut self, steps: &[Step], sources: &[usize], out: Range<usize>) -> Result<(), Fault>;

    /// Queues NCCL's own sum of these values over all ranks, in its order and in place.
    fn all_reduce(&mut self, values: Range<usize>) -> Result<(), Fault>;

    /// Whether NCCL has taken everything that was queued (at first: the communicator is there).
    fn is_queued(&mut self) -> Result<bool, Fault>;

    /// Whether everything that was queued is done.
    fn is_idle(&mut self) -> Result<bool, Fault>;

    /// Ends everything that is queued, here and in the end on the other ranks too: the link is used up. May
    /// block for a bounded time; if the GPU can't be stopped by then, the process ends.
    fn abort(&mut self);

    /// The same, from any thread, without blocking.
    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync>;
}

/// One side of a copy between two ranks' device memories. Both sides have the same number of values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Transfer {
    Send { to: RankIndex, values: Range<usize> },
    Receive { from: RankIndex, values: Range<usize> },
}

/// A call of CUDA or NCCL that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {reason}")]
pub(super) struct Fault {
    pub call: &'static str,
    pub reason: String,
}

impl Fault {
    pub(super) fn new(call: &'static str, reason: impl ToString) -> Self {
        Self { call, reason: reason.to_string() }
    }
}

/// Why a wait for a link ended early.
#[derive(Debug)]
pub(super) enum Ended {
    Deadline,
    Aborted,
    Fault(Fault),
}

impl From<Fault> for Ended {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// How long the host sleeps between two looks at the GPU: at first little, as a small sum takes microseconds.
const FIRST_NAP: Duration = Duration::from_micros(20);
const LONGEST_NAP: Duration = Duration::from_millis(2);

/// Sleeps until the link is so far.
pub(super) fn wait<L: Link>(
    link: &mut L,
    so_far: impl Fn(&mut L) -> Result<bool, Fault>,
    is_aborted: impl Fn() -> bool,
    deadline: Instant,
) -> Result<(), Ended> {
    let mut nap = FIRST_NAP;
    loop {
        if is_aborted() {
            return Err(Ended::Aborted);
        }
        if so_far(link)? {
            return Ok(());
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(Ended::Deadline);
        }
        thread::sleep(nap.min(rest));
        nap = (nap * 2).min(LONGEST_NAP);
    }
}

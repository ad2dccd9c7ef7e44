//! The cores of a node: leased step by step, and the teams of threads that work on them.
//!
//! A node has one [`CoreBudget`]. Whoever computes (a rank, a replica) has a thread of its own,
//! takes a [`Lease`] for one step, computes with its [`Team`] and drops the lease. So ranks and
//! replicas never run more threads than there are cores, and training, which everybody waits
//! for, goes first whenever a sampler is between two steps.

mod budget;
mod team;
#[cfg(test)]
mod tests;

pub use budget::{CoreBudget, Lease, Priority};
pub use team::Team;

/// How much nicer than control threads compute threads are. A busy machine then still answers
/// heartbeats at once.
const COMPUTE_NICENESS: i32 = 5;

/// Marks the calling thread as one that computes: it runs at nice +5 from now on.
///
/// Ranks and replicas call this first thing on their own threads; the budget's workers do too.
/// Does nothing where the system has no niceness per thread.
pub fn lower_thread_priority() {
    #[cfg(target_os = "linux")]
    // SAFETY: `setpriority` reads its arguments only; 0 names the calling thread. It fails if
    // the thread is already nicer and may not come back, which is as good.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, COMPUTE_NICENESS);
    }
}

use std::{ffi::CStr, fs, os::unix::fs::MetadataExt, time::Instant};

use tokio::runtime::Handle;

use super::{
    Collective, CollectiveInbox, Reduction, StreamKey, nccl,
    quic::Quic,
    shared_memory::{Places, SharedMemory, process_namespace},
    solo::Solo,
};
use crate::{
    protocol::{Epoch, Generation, RankIndex, RankSeat},
    transport::Endpoint,
    types::RunId,
};

/// The ranks of one generation of a run, from the view of one of them.
#[derive(Debug, Clone, Copy)]
pub struct RankSet<'a> {
    /// Of all clusters ([`Endpoint::cluster`]): two that share a host number their runs alike.
    pub cluster: &'a str,
    pub run: RunId,
    pub epoch: Epoch,
    pub generation: Generation,
    /// Ranks `0..n`, in any order.
    pub roster: &'a [RankSeat],
    pub me: RankIndex,
    /// Where this rank computes, if that is not the CPU.
    pub gpu: Option<GpuSeat>,
}

/// The GPU of a rank, and how it would add up gradients through NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuSeat {
    /// Its number in this process.
    pub ordinal: u32,
    /// The same on every rank of a set.
    pub reduction: Reduction,
    /// Refuses to go through the host instead, whatever the reason: for whoever measures it.
    pub required: bool,
}

/// Why a rank could not meet the others.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum JoinError {
    #[error("the roster is wrong: {problem}")]
    Roster { problem: String },
    #[error("rank {} did not come within the deadline", .missing.0)]
    Deadline { missing: RankIndex },
    #[error("rank {} could not be met: {reason}", .missing.0)]
    Lost { missing: RankIndex, reason: String },
    /// Not a sum through the host instead, if that is another one or was ruled out.
    #[error("gradients can't go through NCCL: {reason}")]
    NoNccl { reason: String },
    #[error("{problem}")]
    System { problem: String },
}

/// Meets the other ranks, and returns when all are there: through shared memory when all sit on one
/// host, through `endpoint` and `inbox` otherwise. If each has a GPU of its own and NCCL starts on all of them, the
/// gradients then go through NCCL; if it starts on some alone, through the host on all, unless that would be another sum.
///
/// Blocks until `deadline` at most, and beyond that for a minute and a half where NCCL is tried; call it on a rank's
/// own thread, never on one of `runtime`, which is the one on which `endpoint` lives. A rank set meets once: after an
/// error the ranks need a new generation.
pub fn join(
    set: RankSet<'_>,
    endpoint: &Endpoint,
    inbox: &CollectiveInbox,
    runtime: Handle,
    deadline: Instant,
) -> Result<Box<dyn Collective>, JoinError> {
    check_roster(&set)?;
    let RankSet { cluster, run, epoch, generation, roster, me, .. } = set;
    if let [_] = roster {
        return Ok(Box::new(Solo::default()));
    }
    if roster.iter().all(|seat| seat.host == roster[0].host) {
        let name = format!("{}-{run}-{}-{}", file_name(cluster), epoch.0, generation.0);
        let memory = SharedMemory::join(Places::of_this_host(), &name, me, roster.len() as u32, deadline)?;
        return nccl::join(memory, &set, deadline);
    }
    let key_of = |from, to| StreamKey { run, epoch, generation, from, to };
    let quic = Quic::join(roster, me, key_of, endpoint, inbox, runtime, deadline)?;
    nccl::join(quic, &set, deadline)
}

fn check_roster(set: &RankSet<'_>) -> Result<(), JoinError> {
    let mut ranks: Vec<u32> = set.roster.iter().map(|seat| seat.rank.0).collect();
    ranks.sort_unstable();
    if !ranks.iter().copied().eq(0..ranks.len() as u32) {
        return Err(JoinError::Roster { problem: format!("its ranks are {ranks:?}, not 0 to n - 1") });
    }
    if !ranks.contains(&set.me.0) {
        return Err(JoinError::Roster { problem: format!("rank {} is not on it", set.me.0) });
    }
    Ok(())
}

/// What may stand in a file's name, whatever the cluster is called.
fn file_name(cluster: &str) -> String {
    cluster.chars().take(64).map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// What a node tells as its `host`: two processes say the same exactly if they can share memory.
/// That takes the same boot of the same machine, the same `/dev/shm` (containers have their own),
/// the same process numbers and the same user.
pub fn host_id() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| host_name());
    let memory = fs::metadata("/dev/shm").map_or(0, |shm| shm.dev());
    // SAFETY: asks for a number; touches no memory.
    let user = unsafe { libc::geteuid() };
    format!("{}/{memory}/{}/{user}", boot.trim(), process_namespace())
}

/// Where there is no boot id.
fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: writes at most `len` bytes into `name`, which lives through the call; the last byte
    // stays 0 whatever it does.
    unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned()
}

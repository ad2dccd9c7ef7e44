use std::{
    fs, io, process,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use memmap2::MmapRaw;

use super::{
    futex,
    segment::{self, Places},
};
use crate::{collective::JoinError, protocol::RankIndex};

/// The page on which ranks say how far they are.
///
/// ```text
///   0   magic u64 │ creator's pid u32 │ ranks u32 │ bell u32 │ …
///   64  slot of rank 0: stage u64 │ state u32 │ pid u32 │ place u32 │ …      (64 bytes a rank)
/// ```
///
/// A rank writes its own slot only. Whoever waits sleeps on the bell; it is rung by whoever joins, leaves,
/// or is the last to reach a stage: nobody waits for less than all, and to wake ranks that then find
/// that they must wait on is what costs most where they are more than cores. What a rank wrote into files before it raised its stage (release) is there for whoever has
/// read that stage (acquire).
pub(super) struct Control {
    map: MmapRaw,
    ranks: u32,
}

/// What has become of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum RankState {
    Joined = 1,
    Left = 2,
    Failed = 3,
    CalledOff = 4,
}

/// Why a wait ended without what it waited for.
#[derive(Debug, PartialEq)]
pub(super) enum Waited {
    Deadline(RankIndex),
    Gone(RankIndex, &'static str),
    Aborted,
}

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"lkstctl1");

const HEADER: usize = 64;
const SLOT: usize = 64;

/// How often a waiting rank looks whether the processes of the others still live: no bell rings
/// when one is killed.
const LIVENESS: Duration = Duration::from_millis(100);

/// How often a rank looks whether rank 0 has made the control page: before that there is no bell.
const POLL: Duration = Duration::from_millis(2);

impl Control {
    /// Rank 0 makes the page, the others find it; returns when every rank is there, and the name
    /// of the page is gone again.
    pub(super) fn join(
        places: &Places,
        name: &str,
        rank: RankIndex,
        ranks: u32,
        deadline: Instant,
    ) -> Result<Self, JoinError> {
        let control = match rank {
            RankIndex(0) => Self::create(places, name, ranks)?,
            _ => Self::find(places, name, ranks, deadline)?,
        };
        control.slot32(rank, PID).store(process::id(), Ordering::Relaxed);
        control.slot32(rank, STATE).store(RankState::Joined as u32, Ordering::Release);
        control.ring();
        // Stage 0 is where every rank begins: only the others' presence is waited for.
        let met = control.wait(0, &AtomicBool::new(false), deadline);
        if rank == RankIndex(0) {
            places.remove_control(name);
        }
        met.map_err(|waited| {
            control.leave(rank, RankState::Failed);
            match waited {
                Waited::Deadline(missing) => JoinError::Deadline { missing },
                Waited::Gone(missing, reason) => JoinError::Lost { missing, reason: reason.into() },
                // Nobody holds this flag but the line above.
                Waited::Aborted => JoinError::System { problem: "called off".into() },
            }
        })?;
        Ok(control)
    }

    fn create(places: &Places, name: &str, ranks: u32) -> Result<Self, JoinError> {
        places.sweep();
        let make = || -> io::Result<Self> {
            let (file, temporary) = places.new_control(name)?;
            let made = file.set_len((HEADER + ranks as usize * SLOT) as u64).and_then(|()| {
                let control = Self { map: MmapRaw::map_raw(&file)?, ranks };
                control.word64(0).store(MAGIC, Ordering::Relaxed);
                control.word32(8).store(process::id(), Ordering::Relaxed);
                control.word32(12).store(ranks, Ordering::Relaxed);
                places.publish_control(name, &temporary)?;
                Ok(control)
            });
            let _ = fs::remove_file(&temporary);
            made
        };
        make().map_err(|e| JoinError::System { problem: format!("making the shared memory of {name}: {e}") })
    }

    fn find(places: &Places, name: &str, ranks: u32, deadline: Instant) -> Result<Self, JoinError> {
        let system = |problem: String| JoinError::System { problem };
        loop {
            match places.open_control(name) {
                Ok(file) => {
                    let size = file.metadata().map_err(|e| system(e.to_string()))?.len();
                    if size != (HEADER + ranks as usize * SLOT) as u64 {
                        return Err(system(format!(
                            "the shared memory of {name} is for another number of ranks"
                        )));
                    }
                    let map = MmapRaw::map_raw(&file).map_err(|e| system(e.to_string()))?;
                    let control = Self { map, ranks };
                    return match control.word64(0).load(Ordering::Relaxed) {
                        MAGIC => Ok(control),
                        _ => Err(system(format!("the shared memory of {name} is not ours"))),
                    };
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(system(format!("opening the shared memory of {name}: {e}"))),
            }
            if Instant::now() >= deadline {
                return Err(JoinError::Deadline { missing: RankIndex(0) });
            }
            thread::sleep(POLL);
        }
    }

    /// Says where this rank's segment is, and that it is whole.
    pub(super) fn show(&self, rank: RankIndex, stage: u64, place: u32) {
        self.slot32(rank, PLACE).store(place, Ordering::Relaxed);
        self.advance(rank, stage);
    }

    pub(super) fn advance(&self, rank: RankIndex, stage: u64) {
        // In one order with the reading below, as every rank sees it: of two that get there at the same
        // time, at least one finds the other there.
        self.slot64(rank, STAGE).store(stage, Ordering::SeqCst);
        let is_there = |other| self.slot64(other, STAGE).load(Ordering::SeqCst) >= stage;
        if (0..self.ranks).map(RankIndex).all(is_there) {
            self.ring();
        }
    }

    /// Process and place of a rank's segment, as [`Control::show`] said.
    pub(super) fn whereabouts(&self, rank: RankIndex) -> (u32, u32) {
        let read = |field| self.slot32(rank, field).load(Ordering::Relaxed);
        (read(PID), read(PLACE))
    }

    /// Takes this rank out; the first reason stays.
    pub(super) fn leave(&self, rank: RankIndex, state: RankState) {
        let joined = RankState::Joined as u32;
        // Fails when it has left before, or never came.
        let _ = self.slot32(rank, STATE).compare_exchange(
            joined,
            state as u32,
            Ordering::Release,
            Ordering::Relaxed,
        );
        self.ring();
    }

    /// Sleeps until every rank is there and has reached `stage`.
    ///
    /// A rank that has reached it may have left since: it has done its part.
    pub(super) fn wait(&self, stage: u64, aborted: &AtomicBool, deadline: Instant) -> Result<(), Waited> {
        loop {
            // Before the looking: whatever changes after it has rung the bell by then.
            let bell = self.bell().load(Ordering::Acquire);
            if aborted.load(Ordering::Acquire) {
                return Err(Waited::Aborted);
            }
            let mut lagging =
                (0..self.ranks).map(RankIndex).filter(|rank| !self.has_reached(*rank, stage)).peekable();
            let Some(first) = lagging.peek().copied() else { return Ok(()) };
            // One that failed may have failed because of another that is gone: name that one first.
            let gone = lagging
                .filter_map(|rank| self.why_gone(rank).map(|reason| (rank, reason)))
                .min_by_key(|(_, reason)| *reason == FAILED);
            // Leaving comes after the last stage, so one that looks gone is looked at once more.
            if let Some((rank, reason)) = gone
                && !self.has_reached(rank, stage)
            {
                return Err(Waited::Gone(rank, reason));
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Waited::Deadline(first));
            }
            futex::wait(self.bell(), bell, (deadline - now).min(LIVENESS));
        }
    }

    fn has_reached(&self, rank: RankIndex, stage: u64) -> bool {
        let there = self.slot32(rank, STATE).load(Ordering::Acquire) != 0;
        there && self.slot64(rank, STAGE).load(Ordering::Acquire) >= stage
    }

    fn why_gone(&self, rank: RankIndex) -> Option<&'static str> {
        let state = self.slot32(rank, STATE).load(Ordering::Acquire);
        match state {
            0 => None,
            s if s == RankState::Left as u32 => Some("it has left the rank set"),
            s if s == RankState::Failed as u32 => Some(FAILED),
            s if s == RankState::CalledOff as u32 => Some("it was called off"),
            _ if segment::is_alive(self.slot32(rank, PID).load(Ordering::Relaxed)) => None,
            _ => Some("its process has ended"),
        }
    }

    fn ring(&self) {
        self.bell().fetch_add(1, Ordering::Release);
        futex::wake_all(self.bell());
    }

    fn bell(&self) -> &AtomicU32 {
        self.word32(16)
    }

    fn slot32(&self, rank: RankIndex, field: usize) -> &AtomicU32 {
        self.word32(HEADER + rank.0 as usize * SLOT + field)
    }

    fn slot64(&self, rank: RankIndex, field: usize) -> &AtomicU64 {
        self.word64(HEADER + rank.0 as usize * SLOT + field)
    }

    fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.map.len());
        // SAFETY: inside the mapping, which lives as long as `self`; aligned, since a mapping begins
        // on a page; every process and thread reads and writes these bytes only as atomics of this
        // size. Nobody shortens the file: its name is gone, and its mode is 0600 before that.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }
    }

    fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.map.len());
        // SAFETY: as in `word32`.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }
    }
}

const FAILED: &str = "it failed";

/// Offsets in a slot.
const STAGE: usize = 0;
const STATE: usize = 8;
const PID: usize = 12;
const PLACE: usize = 16;

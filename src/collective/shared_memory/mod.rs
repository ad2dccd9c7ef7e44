//! Ranks of one host, in one process or several.
//!
//! Two kinds of files in shared memory, gone from the file system as soon as every rank has them
//! open:
//!
//! ```text
//!   control (one a generation, mapped):  bell │ rank 0: stage, state, pid │ rank 1: …
//!   segment (one a rank and call):       header │ window, through which pieces pass (all-reduce)
//!                                        header │ bytes                             (all-gather)
//!
//!   rank r:  write my segment ─► stage + 1 ─► all there: open theirs ─► …, a stage a step
//! ```
//!
//! Only the control page is shared as memory, and only as atomics; each rank writes its own slot.
//! Segments are written and read through the file interface: a full file system is then an error
//! instead of a fatal signal, no reference ever points to memory that another process writes, and
//! the copy costs less than the page faults of a mapping. A segment belongs to one call and is
//! never used again, so nothing that a dead or late rank wrote can get into a later sum.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::{
    CollectiveError, JoinError, Partial,
    contribution::{Call, FIXED_HEADER, Header, MAX_GATHERED},
    exchange::Exchange,
};
use crate::protocol::RankIndex;

mod control;
mod futex;
mod segment;
mod window;

use control::{Control, RankState, Waited};
use segment::OwnSegment;
pub(super) use segment::{Places, process_namespace};

/// One rank's side.
pub(super) struct SharedMemory {
    rank: RankIndex,
    world_size: u32,
    control: Arc<Control>,
    aborted: Arc<AtomicBool>,
    places: Places,
    /// Names the rank set's files.
    name: String,
    /// Steps that this rank has done, over all calls: the same as every other's at a call's end.
    stage: u64,
    own: Option<OwnSegment>,
    theirs: Vec<Opened>,
}

/// Another rank's segment of the call in progress.
struct Opened {
    rank: RankIndex,
    file: File,
    header: Header,
}

impl SharedMemory {
    /// Meets the other ranks of the set `name` until `deadline`.
    pub(super) fn join(
        places: Places,
        name: &str,
        rank: RankIndex,
        world_size: u32,
        deadline: Instant,
    ) -> Result<Self, JoinError> {
        let control = Control::join(&places, name, rank, world_size, deadline)?;
        Ok(Self {
            rank,
            world_size,
            control: Arc::new(control),
            aborted: Arc::default(),
            places,
            name: name.into(),
            stage: 0,
            own: None,
            theirs: Vec::new(),
        })
    }

    /// Writes this call's segment, in the first place that has room, and shows it to the others.
    fn contribute(
        &mut self,
        call: &Call,
        header: &Header,
        write: impl Fn(&File) -> io::Result<()>,
    ) -> Result<(), CollectiveError> {
        let (segment, place) = OwnSegment::write(&self.places, &self.name, header.round, self.rank, write)
            .map_err(|e| call.system(e))?;
        self.own = Some(segment);
        self.stage += 1;
        self.control.show(self.rank, self.stage, place);
        self.wait(call, self.stage)?;
        for rank in self.others() {
            let opened = self.open(header.round, rank).map_err(|e| call.lost(rank, e))?;
            header.check_fits(&opened.header).map_err(|e| call.mismatch(rank, e))?;
            self.theirs.push(opened);
        }
        Ok(())
    }

    fn open(&self, round: u64, rank: RankIndex) -> io::Result<Opened> {
        let (pid, place) = self.control.whereabouts(rank);
        let file = self.places.open(&self.name, round, rank, pid, place)?;
        let mut fixed = [0; FIXED_HEADER];
        file.read_exact_at(&mut fixed, 0)?;
        let mut bytes = fixed.to_vec();
        bytes.resize(FIXED_HEADER + Header::nodes_size(&fixed).map_err(io::Error::other)?, 0);
        file.read_exact_at(&mut bytes, 0)?;
        let header = Header::from_bytes(&bytes).map_err(io::Error::other)?;
        Ok(Opened { rank, file, header })
    }

    /// Waits until every rank has got to `stage`.
    fn wait(&self, call: &Call, stage: u64) -> Result<(), CollectiveError> {
        self.control.wait(stage, &self.aborted, call.deadline).map_err(|waited| match waited {
            Waited::Deadline(rank) => call.timed_out(rank),
            Waited::Gone(rank, reason) => call.lost(rank, reason),
            Waited::Aborted => call.aborted(),
        })
    }

    /// Says that this rank has read the others' segments, and waits until they have opened its own,
    /// whose name then goes.
    fn settle(&mut self, call: &Call) -> Result<(), CollectiveError> {
        self.advance();
        self.wait(call, self.stage)?;
        self.own = None;
        Ok(())
    }

    /// Says that this rank has done a step more.
    fn advance(&mut self) {
        self.stage += 1;
        self.control.advance(self.rank, self.stage);
    }

    fn others(&self) -> impl Iterator<Item = RankIndex> + use<> {
        let me = self.rank;
        (0..self.world_size).map(RankIndex).filter(move |rank| *rank != me)
    }
}

impl Exchange for SharedMemory {
    fn rank(&self) -> RankIndex {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        let (rank, control, aborted) = (self.rank, self.control.clone(), self.aborted.clone());
        Box::new(move || {
            aborted.store(true, Ordering::Release);
            control.leave(rank, RankState::CalledOff);
        })
    }

    fn meet(&mut self, call: &Call, header: &Header) -> Result<Vec<Vec<(u32, u32)>>, CollectiveError> {
        let head = header.to_bytes().map_err(|e| call.mismatch(self.rank, e))?;
        self.contribute(call, header, |file| file.write_all_at(&head, 0))?;
        let mut nodes: Vec<_> = self.theirs.drain(..).map(|theirs| theirs.header.nodes).collect();
        nodes.insert(self.rank.0 as usize, header.nodes.clone());
        self.settle(call)?;
        Ok(nodes)
    }

    fn reduce(
        &mut self,
        call: &Call,
        header: &Header,
        partials: Vec<Partial>,
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.reduce_in_window(call, header, &partials, out)
    }

    fn gather(
        &mut self,
        call: &Call,
        header: &Header,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let head = header.to_bytes().map_err(|e| call.mismatch(self.rank, e))?;
        self.contribute(call, header, |file| {
            file.write_all_at(&head, 0)?;
            file.write_all_at(&bytes, head.len() as u64)
        })?;
        let mut gathered = Vec::with_capacity(self.world_size as usize);
        for Opened { rank, file, header } in self.theirs.drain(..) {
            gathered.push(read_gathered(&file, &header).map_err(|e| call.lost(rank, e))?);
        }
        gathered.insert(self.rank.0 as usize, bytes);
        self.settle(call)?;
        Ok(gathered)
    }

    /// The others see for themselves who is missing.
    fn break_off(&mut self, _missing: Option<RankIndex>) {
        self.control.leave(self.rank, RankState::Failed);
        self.own = None;
        self.theirs.clear();
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.control.leave(self.rank, RankState::Left);
    }
}

fn read_gathered(file: &File, header: &Header) -> io::Result<Vec<u8>> {
    // Checked when the header was read; looked at before anything is allocated.
    let there = file.metadata()?.len().saturating_sub(FIXED_HEADER as u64);
    if header.len > there.min(MAX_GATHERED) {
        return Err(io::Error::other(format!("its segment holds {there} of {} bytes", header.len)));
    }
    let mut bytes = vec![0; header.len as usize];
    file.read_exact_at(&mut bytes, FIXED_HEADER as u64)?;
    Ok(bytes)
}

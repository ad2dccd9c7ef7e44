//! Ranks of one host, in one process or several.
//!
//! Two kinds of files in shared memory, gone from the file system as soon as every rank has them
//! open:
//!
//! ```text
//!   control (one a generation, mapped):  bell │ rank 0: stage, state, pid │ rank 1: …
//!   segment (one a rank and call):       header │ partial sums │ this rank's slice of the sum
//!
//!   rank r:  write my segment ─► stage 2n ─► all at 2n: read my slice of theirs, add up
//!            write my slice   ─► stage 2n+1 ─► all at 2n+1: unlink mine, read their slices
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
    exchange::{Contribution, Exchange, Values, as_bytes, as_bytes_mut, slice_of},
};
use crate::protocol::RankIndex;

mod control;
mod futex;
mod segment;

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
    /// Of the call in progress.
    round: u64,
    own: Option<OwnSegment>,
    theirs: Vec<Opened>,
}

/// Another rank's segment of the call in progress.
struct Opened {
    rank: RankIndex,
    file: Arc<File>,
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
            round: 0,
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
        self.round = header.round;
        self.control.show(self.rank, header.round * 2, place);
        self.wait(call, header.round * 2)?;
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
        Ok(Opened { rank, file: Arc::new(file), header })
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
        self.control.advance(self.rank, self.round * 2 + 1);
        self.wait(call, self.round * 2 + 1)?;
        self.own = None;
        Ok(())
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

    fn scatter(
        &mut self,
        call: &Call,
        header: &Header,
        partials: &[Partial],
    ) -> Result<Vec<Contribution>, CollectiveError> {
        let bytes = header.to_bytes().map_err(|e| call.mismatch(self.rank, e))?;
        let len = header.len as usize;
        let mine = slice_of(len, self.world_size, self.rank);
        self.contribute(call, header, |file| {
            file.write_all_at(&bytes, 0)?;
            for (k, partial) in partials.iter().enumerate() {
                // My own slice of it is read by nobody else: a hole.
                for range in [0..mine.start, mine.end..len] {
                    file.write_all_at(
                        as_bytes(&partial.values[range.clone()]),
                        value_offset(header, k, range.start),
                    )?;
                }
            }
            // Room for my slice of the sum is found out now, while another place can be tried.
            reserve(file, value_offset(header, partials.len(), 0), mine.len() * size_of::<f32>())
        })?;

        // Read while they are added up: in between nothing of their size is held in memory.
        let contribution = |Opened { rank, file, header }: &Opened| {
            let first = value_offset(header, 0, mine.start);
            let values =
                Values::InFile { file: file.clone(), first, stride: header.len * size_of::<f32>() as u64 };
            Contribution { rank: *rank, nodes: header.nodes.clone(), values }
        };
        Ok(self.theirs.iter().map(contribution).collect())
    }

    fn share(&mut self, call: &Call, out: &mut [f32]) -> Result<(), CollectiveError> {
        let mine = slice_of(out.len(), self.world_size, self.rank);
        if let Some(own) = &self.own {
            own.write_last(as_bytes(&out[mine])).map_err(|e| call.system(e))?;
        }
        self.settle(call)?;
        for Opened { rank, file, header } in self.theirs.drain(..) {
            let slice = slice_of(out.len(), self.world_size, rank);
            let offset = value_offset(&header, header.nodes.len(), 0);
            file.read_exact_at(as_bytes_mut(&mut out[slice]), offset).map_err(|e| call.lost(rank, e))?;
        }
        Ok(())
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

/// Where value `at` of partial sum `k` stands; the sum's slice stands behind the last one.
fn value_offset(header: &Header, k: usize, at: usize) -> u64 {
    let head = (FIXED_HEADER + header.nodes.len() * 8) as u64;
    head + (k as u64 * header.len + at as u64) * size_of::<f32>() as u64
}

fn reserve(file: &File, offset: u64, size: usize) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    for start in (0..size).step_by(zeros.len()) {
        file.write_all_at(&zeros[..zeros.len().min(size - start)], offset + start as u64)?;
    }
    Ok(())
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

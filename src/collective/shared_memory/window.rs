//! An all-reduce through a window: the part of a segment through which a call's values pass, piece by
//! piece, in places that are used again within the call.
//!
//! ```text
//!   segment   header │ place 0 │ place 1 │ …                            (PLACES of them)
//!   place     for each other rank: a piece of each of my partial sums │ a piece of my slice of the sum
//!
//!   iteration i of a rank     put piece i ─► add up piece i - LAG ─► take piece i - 2 LAG of the others
//! ```
//!
//! A window is small enough for the caches, so that values cross from process to process without a
//! way through main memory, and no page of it is made more than once. A rank begins iteration i when
//! every rank has ended i - LAG. Hence what it reads is there: piece i - LAG was put in that iteration,
//! piece i - 2 LAG added up in it. And what it overwrites was read: what lay in the place of piece i was
//! put, and its sum was taken, for piece i - PLACES, in iteration i - PLACES + 2 LAG = i - LAG at the latest.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use super::SharedMemory;
use crate::{
    collective::{
        CollectiveError, Partial,
        contribution::{Call, FIXED_HEADER, Header},
        exchange::{Pieces, Sum, as_bytes, as_bytes_mut},
        plan::Read,
    },
    protocol::RankIndex,
};

/// Iterations by which a rank may be ahead of another: with more processes than cores they take turns,
/// and each turn should be worth the switch.
const LAG: usize = 2;

/// As few as the argument above allows.
const PLACES: usize = 2 * LAG;

/// Values of a piece, times ranks: a place of a rank with one partial sum is then half a MiB, whatever the
/// number of ranks, and all places of a few ranks fit a level-3 cache.
const WIDTH_TIMES_RANKS: usize = 128 << 10;

/// A piece is not smaller, or its system calls would cost more than its copies.
const MIN_WIDTH: usize = 4 << 10;

/// What lies where in a rank's segment.
#[derive(Debug, Clone, Copy)]
struct Window {
    /// Its rank, and how many partial sums it has.
    rank: RankIndex,
    partials: usize,
    pieces: Pieces,
}

impl Window {
    fn new(rank: RankIndex, header: &Header, pieces: Pieces) -> Self {
        Self { rank, partials: header.nodes.len(), pieces }
    }

    /// Bytes of the whole segment.
    fn end(&self) -> u64 {
        let places = PLACES.min(self.longest());
        self.offset(places * self.place_parts())
    }

    /// Pieces of the longest slice, which is rank 0's.
    fn longest(&self) -> usize {
        self.pieces.count(RankIndex(0))
    }

    /// Where a piece of partial sum `k` stands that is meant for rank `to`.
    fn contribution(&self, piece: usize, to: RankIndex, k: usize) -> u64 {
        // This rank has no place for itself.
        let to = (to.0 - u32::from(to > self.rank)) as usize;
        self.offset(piece % PLACES * self.place_parts() + to * self.partials + k)
    }

    /// Where a piece of this rank's slice of the sum stands.
    fn sum(&self, piece: usize) -> u64 {
        self.offset((piece % PLACES + 1) * self.place_parts() - 1)
    }

    /// Pieces that stand in one place.
    fn place_parts(&self) -> usize {
        (self.pieces.world_size as usize - 1) * self.partials + 1
    }

    fn offset(&self, parts: usize) -> u64 {
        let head = FIXED_HEADER + self.partials * 8;
        // On a multiple of 64 bytes, which the kernel copies fastest.
        (head.next_multiple_of(64) + parts * self.pieces.width * size_of::<f32>()) as u64
    }
}

/// The pieces of a call, the same on every rank of it.
fn pieces(len: usize, world_size: u32) -> Pieces {
    let width = (WIDTH_TIMES_RANKS / world_size as usize).next_multiple_of(16).max(MIN_WIDTH);
    let slice = len.div_ceil(world_size as usize).next_multiple_of(16);
    Pieces { len, world_size, width: width.min(slice.max(16)) }
}

/// One all-reduce, from when every rank has opened every segment.
struct Reduction<'a> {
    rank: RankIndex,
    call: &'a Call,
    pieces: Pieces,
    own: (&'a File, Window),
    theirs: Vec<(RankIndex, &'a File, Window)>,
    partials: &'a [Partial],
    sum: Sum,
    out: &'a mut [f32],
}

impl SharedMemory {
    /// See the module.
    pub(super) fn reduce_in_window(
        &mut self,
        call: &Call,
        header: &Header,
        partials: &[Partial],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let bytes = header.to_bytes().map_err(|e| call.mismatch(self.rank, e))?;
        let pieces = pieces(out.len(), self.world_size);
        let window = Window::new(self.rank, header, pieces);
        self.contribute(call, header, |file| {
            file.write_all_at(&bytes, 0)?;
            // That there is room is found out now, while another place can be tried.
            reserve(file, bytes.len() as u64..window.end())
        })?;
        let theirs = std::mem::take(&mut self.theirs);
        let nodes: Vec<&[(u32, u32)]> = theirs.iter().map(|t| &t.header.nodes[..]).collect();
        let sum = Sum::new(call, header, &nodes)?;
        // `contribute` has just made it.
        let Some(own) = self.own.take() else { return Err(call.system("its segment is gone")) };
        let mut reduction = Reduction {
            rank: self.rank,
            call,
            pieces,
            own: (own.file(), window),
            theirs: theirs
                .iter()
                .map(|t| (t.rank, &t.file, Window::new(t.rank, &t.header, pieces)))
                .collect(),
            partials,
            sum,
            out,
        };
        let base = self.stage;
        for i in 0..window.longest() + 2 * LAG {
            if let Some(ended) = i.checked_sub(LAG) {
                self.wait(call, base + ended as u64 + 1)?;
            }
            if i == LAG {
                // Every rank has ended an iteration, so it has opened this segment.
                own.remove_name();
            }
            reduction.iterate(i)?;
            self.advance();
        }
        Ok(())
    }
}

impl Reduction<'_> {
    /// What one iteration does; pieces that do not exist are empty.
    fn iterate(&mut self, i: usize) -> Result<(), CollectiveError> {
        self.put(i).map_err(|e| self.call.system(e))?;
        if let Some(piece) = i.checked_sub(LAG) {
            self.add_up(piece)?;
        }
        if let Some(piece) = i.checked_sub(2 * LAG) {
            self.take(piece)?;
        }
        Ok(())
    }

    fn put(&mut self, piece: usize) -> io::Result<()> {
        let (file, window) = self.own;
        for (to, ..) in &self.theirs {
            let range = self.pieces.of(*to, piece);
            if range.is_empty() {
                continue;
            }
            for (k, partial) in self.partials.iter().enumerate() {
                let at = window.contribution(piece, *to, k);
                file.write_all_at(as_bytes(&partial.values[range.clone()]), at)?;
            }
        }
        Ok(())
    }

    fn add_up(&mut self, piece: usize) -> Result<(), CollectiveError> {
        let Self { rank, call, theirs, partials, out, .. } = self;
        let range = self.pieces.of(*rank, piece);
        if range.is_empty() {
            return Ok(());
        }
        let own = |k: usize| &partials[k].values[range.clone()];
        let read = |other: usize, k: usize, block: Range<usize>, into: &mut [f32]| {
            let (from, file, window) = &theirs[other];
            let at = window.contribution(piece, *rank, k) + (block.start * size_of::<f32>()) as u64;
            file.read_exact_at(as_bytes_mut(into), at).map_err(|e| call.lost(*from, e))?;
            Ok(Read::Filled)
        };
        self.sum.run(own, read, &mut out[range.clone()])?;
        let (file, window) = self.own;
        file.write_all_at(as_bytes(&out[range]), window.sum(piece)).map_err(|e| call.system(e))
    }

    fn take(&mut self, piece: usize) -> Result<(), CollectiveError> {
        for (rank, file, window) in &self.theirs {
            let range = self.pieces.of(*rank, piece);
            if !range.is_empty() {
                file.read_exact_at(as_bytes_mut(&mut self.out[range]), window.sum(piece))
                    .map_err(|e| self.call.lost(*rank, e))?;
            }
        }
        Ok(())
    }
}

fn reserve(file: &File, range: Range<u64>) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let size = zeros.len().min((range.end - at) as usize);
        file.write_all_at(&zeros[..size], at)?;
        at += size as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every part of every place is somewhere else, behind the header and before the end.
    #[test]
    fn nothing_in_a_window_overlaps() {
        for (world_size, partials, len) in [(2, 1, 1 << 20), (4, 3, 100_000), (3, 0, 70), (5, 2, 1)] {
            let pieces = pieces(len, world_size);
            let rank = RankIndex(1);
            let window = Window { rank, partials, pieces };
            let mut starts = Vec::new();
            for piece in 0..PLACES.min(window.longest()) {
                starts.push(window.sum(piece));
                for to in (0..world_size).map(RankIndex).filter(|to| *to != rank) {
                    starts.extend((0..partials).map(|k| window.contribution(piece, to, k)));
                }
            }
            starts.sort_unstable();
            let size = (pieces.width * 4) as u64;
            assert!(starts[0] >= (FIXED_HEADER + partials * 8) as u64);
            assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == size), "{starts:?}");
            assert_eq!(starts.last().map(|last| last + size), Some(window.end()));
        }
    }
}

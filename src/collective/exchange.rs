//! The algorithm over whatever carries it: who sends what to whom, and what is checked.

use std::{ops::Range, time::Instant};

use super::{
    Collective, CollectiveError, Partial,
    contribution::{Call, Header, Method},
    plan::{Read, ReducePlan},
};
use crate::protocol::{OpToken, RankIndex};

/// How bytes get from rank to rank. After an error only `break_off` is called.
pub(super) trait Exchange: Send {
    fn rank(&self) -> RankIndex;

    fn world_size(&self) -> u32;

    fn is_aborted(&self) -> bool;

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync>;

    /// Tells every rank what this one contributes, and hears it from each: the nodes, by rank. Whoever
    /// does not come is named, and what does not fit `header` is refused.
    #[cfg_attr(not(any(test, feature = "nccl")), expect(dead_code))]
    fn meet(&mut self, call: &Call, header: &Header) -> Result<Vec<Vec<(u32, u32)>>, CollectiveError>;

    /// Adds up my slice over everyone's partial sums, gives it to each other rank, and fills in theirs:
    /// piece by piece, so that the next is on its way while one is added. What the others contribute is
    /// checked against `header`.
    fn reduce(
        &mut self,
        call: &Call,
        header: &Header,
        partials: Vec<Partial>,
        out: &mut [f32],
    ) -> Result<(), CollectiveError>;

    /// Every rank's bytes, by rank.
    fn gather(
        &mut self,
        call: &Call,
        header: &Header,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Lets the other ranks know that this one takes part no longer, and because of whom if it was
    /// for another: they should name that one too, not this one.
    fn break_off(&mut self, missing: Option<RankIndex>);
}

/// Which values of a vector a rank adds up. Multiples of 16: a cache line of its own for each rank.
pub(super) fn slice_of(len: usize, world_size: u32, rank: RankIndex) -> Range<usize> {
    let width = len.div_ceil(world_size as usize).next_multiple_of(16);
    let start = |r: usize| (r * width).min(len);
    start(rank.0 as usize)..start(rank.0 as usize + 1)
}

/// The pieces in which a call's values travel and are added up: each rank's slice in pieces of so many
/// values, the last one shorter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pieces {
    pub len: usize,
    pub world_size: u32,
    pub width: usize,
}

impl Pieces {
    /// How many a rank's slice has.
    pub(super) fn count(&self, rank: RankIndex) -> usize {
        slice_of(self.len, self.world_size, rank).len().div_ceil(self.width)
    }

    /// A piece's place in the vector; empty past the last one.
    pub(super) fn of(&self, rank: RankIndex, piece: usize) -> Range<usize> {
        let slice = slice_of(self.len, self.world_size, rank);
        let start = |piece: usize| (slice.start + piece * self.width).min(slice.end);
        start(piece)..start(piece + 1)
    }
}

/// How a rank adds up its slice: over its own partial sums and those that the others contribute.
pub(super) struct Sum {
    plan: ReducePlan,
    /// Of each partial sum of the plan: whose it is (`None`: mine), and which of theirs.
    places: Vec<(Option<usize>, usize)>,
}

impl Sum {
    /// `others`: the nodes of each other rank, in an order that the caller keeps to.
    pub(super) fn new(
        call: &Call,
        header: &Header,
        others: &[&[(u32, u32)]],
    ) -> Result<Self, CollectiveError> {
        let mut nodes = header.nodes.clone();
        let mut places: Vec<(Option<usize>, usize)> = (0..nodes.len()).map(|k| (None, k)).collect();
        for (other, theirs) in others.iter().enumerate() {
            nodes.extend_from_slice(theirs);
            places.extend((0..theirs.len()).map(|k| (Some(other), k)));
        }
        let plan = ReducePlan::new(header.leaves, &nodes).map_err(|e| call.no_tree(e))?;
        Ok(Self { plan, places })
    }

    /// Leaves the sum of one piece in `out`. `own` are the values of my partial sums there; `read` gets
    /// those of another rank's (which rank, which of its partial sums, which values of the piece).
    pub(super) fn run<'a, E>(
        &mut self,
        own: impl Fn(usize) -> &'a [f32],
        mut read: impl FnMut(usize, usize, Range<usize>, &mut [f32]) -> Result<Read<'a>, E>,
        out: &mut [f32],
    ) -> Result<(), E> {
        let places = &self.places;
        let read = |i: usize, block: Range<usize>, into: &mut [f32]| match places[i] {
            (Some(other), k) => read(other, k, block, into),
            (None, k) => Ok(Read::Here(&own(k)[block])),
        };
        self.plan.run(read, out)
    }
}

/// A collective over an exchange.
pub(super) struct Exchanged<E> {
    exchange: E,
    round: u64,
    used_up: bool,
}

impl<E: Exchange> Exchanged<E> {
    pub(super) fn new(exchange: E) -> Self {
        Self { exchange, round: 0, used_up: false }
    }

    /// Runs one call; one that fails is the last.
    fn call<T>(
        &mut self,
        call: Call,
        body: impl FnOnce(&mut E, &Call, u64) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        if self.exchange.is_aborted() {
            return Err(call.aborted());
        }
        if self.used_up {
            return Err(call.used_up());
        }
        self.round += 1;
        let result = body(&mut self.exchange, &call, self.round);
        if let Err(error) = &result {
            self.used_up = true;
            self.exchange.break_off(error.missing());
        }
        result
    }
}

impl<E: Exchange> Collective for Exchanged<E> {
    fn rank(&self) -> RankIndex {
        self.exchange.rank()
    }

    fn world_size(&self) -> u32 {
        self.exchange.world_size()
    }

    fn all_reduce(
        &mut self,
        token: OpToken,
        leaves: u32,
        partials: Vec<Partial>,
        out: &mut [f32],
        deadline: Instant,
    ) -> Result<(), CollectiveError> {
        let call = Call { method: Method::AllReduce, token, deadline };
        self.call(call, |exchange, call, round| {
            check_lengths(call, exchange.rank(), &partials, out.len())?;
            let nodes = partials.iter().map(|p| (p.level, p.index)).collect();
            let header = Header { method: call.method, round, token, leaves, len: out.len() as u64, nodes };
            exchange.reduce(call, &header, partials, out)
        })
    }

    fn all_gather(
        &mut self,
        token: OpToken,
        bytes: Vec<u8>,
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let call = Call { method: Method::AllGather, token, deadline };
        self.call(call, |exchange, call, round| {
            let len = bytes.len() as u64;
            let header = Header { method: call.method, round, token, leaves: 0, len, nodes: Vec::new() };
            exchange.gather(call, &header, bytes)
        })
    }

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        self.exchange.abort_handle()
    }
}

/// That each of a rank's own partial sums has `len` values.
pub(super) fn check_lengths(
    call: &Call,
    rank: RankIndex,
    partials: &[Partial],
    len: usize,
) -> Result<(), CollectiveError> {
    match partials.iter().find(|p| p.values.len() != len) {
        None => Ok(()),
        Some(p) => {
            Err(call.mismatch(rank, format!("a partial sum has {} values instead of {len}", p.values.len())))
        }
    }
}

/// The bytes of values, in this machine's order, which must be the wire's.
pub(super) fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: an f32 is four initialised bytes without padding, and u8 aligns anywhere.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The same, to be written: every four bytes are some f32.
pub(super) fn as_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; any bit pattern is a valid f32, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

const _: () = assert!(cfg!(target_endian = "little"), "values travel as their bytes in memory");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_a_vector_once() {
        for (len, world_size) in [(0, 1), (0, 3), (1, 3), (16, 2), (100, 3), (5_000_000, 7)] {
            let mut next = 0;
            for rank in 0..world_size {
                let slice = slice_of(len, world_size, RankIndex(rank));
                assert_eq!(slice.start, next);
                next = slice.end;
            }
            assert_eq!(next, len, "{world_size}");
        }
    }

    #[test]
    fn pieces_cover_a_slice_once() {
        for (len, width) in [(0, 16), (1, 16), (100, 16), (1000, 48), (1000, 4096)] {
            let pieces = Pieces { len, world_size: 3, width };
            for rank in (0..3).map(RankIndex) {
                let mut next = slice_of(len, 3, rank).start;
                for piece in 0..pieces.count(rank) {
                    let range = pieces.of(rank, piece);
                    assert!(range.start == next && !range.is_empty() && range.len() <= width, "{range:?}");
                    next = range.end;
                }
                assert_eq!(next, slice_of(len, 3, rank).end);
                assert!(pieces.of(rank, pieces.count(rank) + 1).is_empty());
            }
        }
    }
}

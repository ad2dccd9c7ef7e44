//! The algorithm over whatever carries it: who sends what to whom, and what is checked.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, sync::Arc, time::Instant};

use super::{
    Collective, CollectiveError, Partial,
    contribution::{Call, Header, Method},
    plan::ReducePlan,
};
use crate::protocol::{OpToken, RankIndex};

/// How bytes get from rank to rank. Calls come in the order `scatter`, `share` (an all-reduce) or
/// `gather`; after an error only `break_off`.
pub(super) trait Exchange: Send {
    fn rank(&self) -> RankIndex;

    fn world_size(&self) -> u32;

    fn is_aborted(&self) -> bool;

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync>;

    /// Gives each other rank its slice of my partial sums, and gets mine of theirs: what each other
    /// rank contributes, checked against `header`.
    fn scatter(
        &mut self,
        call: &Call,
        header: &Header,
        partials: &[Partial],
    ) -> Result<Vec<Contribution>, CollectiveError>;

    /// Gives each other rank my slice of `out`, and fills in theirs.
    fn share(&mut self, call: &Call, out: &mut [f32]) -> Result<(), CollectiveError>;

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

/// What one other rank holds of my slice.
pub(super) struct Contribution {
    pub rank: RankIndex,
    /// `(level, index)` of each partial sum.
    pub nodes: Vec<(u32, u32)>,
    pub values: Values,
}

/// Where my slices of a rank's partial sums are.
pub(super) enum Values {
    Held(Vec<Vec<f32>>),
    /// Slice `k` begins at `first + k * stride` bytes.
    InFile {
        file: Arc<File>,
        first: u64,
        stride: u64,
    },
}

impl Values {
    fn read(&self, k: usize, block: Range<usize>, into: &mut [f32]) -> io::Result<()> {
        match self {
            Self::Held(slices) => {
                into.copy_from_slice(&slices[k][block]);
                Ok(())
            }
            Self::InFile { file, first, stride } => {
                let offset = first + k as u64 * stride + (block.start * size_of::<f32>()) as u64;
                file.read_exact_at(as_bytes_mut(into), offset)
            }
        }
    }
}

/// Which values of a vector a rank adds up. Multiples of 16: a cache line of its own for each rank.
pub(super) fn slice_of(len: usize, world_size: u32, rank: RankIndex) -> Range<usize> {
    let width = len.div_ceil(world_size as usize).next_multiple_of(16);
    let start = |r: usize| (r * width).min(len);
    start(rank.0 as usize)..start(rank.0 as usize + 1)
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
            let others = exchange.scatter(call, &header, &partials)?;
            let mine = slice_of(out.len(), exchange.world_size(), exchange.rank());
            add_up(call, leaves, &partials, &others, mine, out)?;
            exchange.share(call, out)
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

/// Leaves the sum of my slice in `out`.
pub(super) fn add_up(
    call: &Call,
    leaves: u32,
    own: &[Partial],
    others: &[Contribution],
    mine: Range<usize>,
    out: &mut [f32],
) -> Result<(), CollectiveError> {
    // Of each partial sum: its node; and whose it is (`None`: mine), and which of theirs.
    let mut nodes: Vec<(u32, u32)> = own.iter().map(|p| (p.level, p.index)).collect();
    let mut places: Vec<(Option<&Contribution>, usize)> = (0..own.len()).map(|k| (None, k)).collect();
    for contribution in others {
        nodes.extend(&contribution.nodes);
        places.extend((0..contribution.nodes.len()).map(|k| (Some(contribution), k)));
    }
    let plan = ReducePlan::new(leaves, &nodes).map_err(|e| call.no_tree(e))?;
    let read = |i: usize, block: Range<usize>, into: &mut [f32]| match places[i] {
        (Some(theirs), k) => theirs.values.read(k, block, into).map_err(|e| call.lost(theirs.rank, e)),
        (None, k) => {
            into.copy_from_slice(&own[k].values[mine.clone()][block]);
            Ok(())
        }
    };
    plan.run(read, &mut out[mine.clone()])
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
}

use std::ops::Range;

use super::{link::Transfer, memory::Sizes};
use crate::{
    collective::exchange::{Pieces, slice_of},
    protocol::RankIndex,
};

/// Where the values of one all-reduce lie in a rank's device memory, and what travels:
///
/// ```text
///   my partial sum 0 │ 1 │ … │ the sum │ a piece of my slice of each partial sum of the others
///   └─ whole vectors, `stride` apart ──┘ └─ used again by the next piece ─────────────────────┘
/// ```
pub(super) struct Layout {
    me: RankIndex,
    pieces: Pieces,
    /// Partial sums of each rank.
    counts: Vec<usize>,
    /// From one whole vector to the next, and from one piece of the others to the next.
    stride: usize,
    width: usize,
    size: usize,
}

impl Layout {
    /// `counts`: how many partial sums each rank has, by rank. A piece has at most `width` values.
    pub(super) fn new(me: RankIndex, len: usize, counts: Vec<usize>, width: usize) -> Self {
        let pieces = Pieces { len, world_size: counts.len() as u32, width };
        let sizes = Sizes::new(len as u64, counts.len() as u64, width as u64);
        let own = counts[me.0 as usize] as u64;
        let size = sizes.total(own, counts.iter().sum::<usize>() as u64 - own) as usize;
        Self { me, pieces, counts, stride: sizes.vector as usize, width: sizes.piece as usize, size }
    }

    /// Values of the whole.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// My k-th partial sum; the sum itself is the one after the last.
    pub(super) fn vector(&self, k: usize) -> Range<usize> {
        let start = k * self.stride;
        start..start + self.pieces.len
    }

    pub(super) fn sum(&self) -> Range<usize> {
        self.vector(self.mine())
    }

    /// How many pieces the longest slice has: as many rounds there are.
    pub(super) fn rounds(&self) -> usize {
        self.ranks().map(|rank| self.pieces.count(rank)).max().unwrap_or(0)
    }

    /// The values of my slice that are added up in a round: places of the sum.
    pub(super) fn piece(&self, round: usize) -> Range<usize> {
        let start = self.sum().start;
        let piece = self.pieces.of(self.me, round);
        start + piece.start..start + piece.end
    }

    /// Everyone's contributions to the pieces of a round: mine to the others, theirs to me.
    pub(super) fn contributions(&self, round: usize) -> Vec<Transfer> {
        let mut transfers = Vec::new();
        let width = self.pieces.of(self.me, round).len();
        let mut at = self.arrivals();
        for rank in self.ranks().filter(|rank| *rank != self.me) {
            let theirs = self.pieces.of(rank, round);
            for k in (0..self.mine()).filter(|_| !theirs.is_empty()) {
                let start = self.vector(k).start;
                transfers.push(Transfer::Send { to: rank, values: start + theirs.start..start + theirs.end });
            }
            for _ in 0..self.counts[rank.0 as usize] {
                if width > 0 {
                    transfers.push(Transfer::Receive { from: rank, values: at..at + width });
                }
                at += self.width;
            }
        }
        transfers
    }

    /// Where the piece of a round begins in every rank's partial sums, by rank.
    pub(super) fn sources(&self, round: usize) -> Vec<usize> {
        let mine = self.pieces.of(self.me, round).start;
        let mut sources = Vec::new();
        let mut at = self.arrivals();
        for rank in self.ranks() {
            for k in 0..self.counts[rank.0 as usize] {
                if rank == self.me {
                    sources.push(self.vector(k).start + mine);
                } else {
                    sources.push(at);
                    at += self.width;
                }
            }
        }
        sources
    }

    /// Everyone's slice of the sum to everyone.
    pub(super) fn shares(&self) -> Vec<Transfer> {
        let start = self.sum().start;
        let slice = |rank| {
            let slice = slice_of(self.pieces.len, self.pieces.world_size, rank);
            start + slice.start..start + slice.end
        };
        let others = self.ranks().filter(|rank| *rank != self.me);
        let both = others.flat_map(|rank| {
            [
                Transfer::Send { to: rank, values: slice(self.me) },
                Transfer::Receive { from: rank, values: slice(rank) },
            ]
        });
        both.filter(|transfer| match transfer {
            Transfer::Send { values, .. } | Transfer::Receive { values, .. } => !values.is_empty(),
        })
        .collect()
    }

    fn mine(&self) -> usize {
        self.counts[self.me.0 as usize]
    }

    fn ranks(&self) -> impl Iterator<Item = RankIndex> + use<> {
        (0..self.pieces.world_size).map(RankIndex)
    }

    /// Where contributions of the others begin.
    fn arrivals(&self) -> usize {
        (self.mine() + 1) * self.stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(transfer: &Transfer) -> Range<usize> {
        match transfer {
            Transfer::Send { values, .. } | Transfer::Receive { values, .. } => values.clone(),
        }
    }

    /// Every send meets a receive of the same size, in the same order between the same two ranks, or a
    /// group would never end.
    #[test]
    fn both_sides_of_every_transfer_agree() {
        for (len, width) in [(0, 16), (1, 16), (5, 64), (100, 16), (1000, 48), (1000, 4096)] {
            let counts = vec![2, 0, 3, 1];
            let layouts: Vec<Layout> =
                (0..4).map(|me| Layout::new(RankIndex(me), len, counts.clone(), width)).collect();
            let rounds = layouts[0].rounds();
            assert!(layouts.iter().all(|layout| layout.rounds() == rounds));
            for round in 0..=rounds {
                let group = |layout: &Layout| match round == rounds {
                    true => layout.shares(),
                    false => layout.contributions(round),
                };
                let groups: Vec<Vec<Transfer>> = layouts.iter().map(group).collect();
                for (from, to) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
                    let sent: Vec<usize> = groups[from]
                        .iter()
                        .filter(|t| matches!(t, Transfer::Send { to: rank, .. } if rank.0 == to as u32))
                        .map(|t| values(t).len())
                        .collect();
                    let received: Vec<usize> = groups[to]
                        .iter()
                        .filter(
                            |t| matches!(t, Transfer::Receive { from: rank, .. } if rank.0 == from as u32),
                        )
                        .map(|t| values(t).len())
                        .collect();
                    assert_eq!(sent, received, "{len} values, round {round}, {from} to {to}");
                }
            }
        }
    }

    /// What is received lies inside the memory, apart from my own vectors and from the other contributions; and the
    /// memory ends with the last of them.
    #[test]
    fn nothing_overlaps_and_nothing_is_left_over() {
        for (len, me) in [1, 15, 16, 17, 1000].into_iter().flat_map(|len| (0..2).map(move |me| (len, me))) {
            let layout = Layout::new(RankIndex(me), len, vec![2, 2, 1], 64);
            let mut places: Vec<Range<usize>> = (0..3).map(|k| layout.vector(k)).collect();
            let received = layout.contributions(0);
            places.extend(received.iter().filter(|t| matches!(t, Transfer::Receive { .. })).map(values));
            places.sort_by_key(|place| place.start);
            assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start), "{len}: {places:?}");
            let (last, size) = (places.last().unwrap(), layout.size());
            assert!(last.end <= size, "{len}");
            // Rank 0's slice is never empty, and the longest there is.
            assert!(me > 0 || last.end.next_multiple_of(16) == size, "{len}: {last:?} of {size}");
        }
    }
}

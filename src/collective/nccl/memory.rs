//! What an all-reduce takes of a GPU's memory: [`Layout`](super::layout::Layout) allocates it, whoever plans runs
//! reckons with it, by the same formula.

/// Values of a piece that travels and is added up (16 MiB): it bounds what the others' contributions take on the
/// device, and is long enough that starting it costs nothing.
pub(super) const PIECE: u64 = 4 << 20;

/// Partial sums of a vector that a rank has: a range of micro-batches is mostly one or two subtrees. Few and unequal
/// ranges are more, up to two a level; the memory grows then beyond what is reckoned with.
const PARTIAL_SUMS: u64 = 2;

/// Whole vectors, and the places of pieces, begin at multiples of 64 bytes.
const ALIGNMENT: u64 = 16;

/// Bytes of an f32.
const F32: u64 = 4;

/// Bytes of device memory that one of so many ranks takes to add up vectors of so many values through NCCL; none of
/// a rank alone. Sizes that no memory holds end in a large number.
pub fn nccl_memory(values: u64, ranks: u64) -> u64 {
    if ranks < 2 {
        return 0;
    }
    let others = PARTIAL_SUMS.saturating_mul(ranks - 1);
    Sizes::new(values, ranks, PIECE).total(PARTIAL_SUMS, others).saturating_mul(F32)
}

/// In values: what takes its place in a rank's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    /// A whole vector: a partial sum of its own, or the sum.
    pub vector: u64,
    /// A piece of its slice, of one partial sum of another rank.
    pub piece: u64,
}

impl Sizes {
    /// Of vectors of `values`, of which each rank adds up a slice in pieces of at most `width`.
    pub(super) fn new(values: u64, ranks: u64, width: u64) -> Self {
        let slice = aligned(values.div_ceil(ranks)).min(values);
        Self { vector: aligned(values), piece: aligned(slice.min(width)) }
    }

    /// With so many partial sums of its own, and so many of the other ranks.
    pub(super) fn total(self, own: u64, others: u64) -> u64 {
        let vectors = self.vector.saturating_mul(own.saturating_add(1));
        vectors.saturating_add(self.piece.saturating_mul(others))
    }
}

fn aligned(values: u64) -> u64 {
    values.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{collective::nccl::layout::Layout, protocol::RankIndex};

    #[test]
    fn what_is_reckoned_with_is_what_is_allocated() {
        // Slices shorter than a piece, as long as one, and longer.
        for values in [0, 1, 15, 1000, PIECE, 3 * PIECE + 5, 1 << 30] {
            for ranks in 2..=5 {
                let counts = vec![PARTIAL_SUMS as usize; ranks];
                for me in (0..ranks as u32).map(RankIndex) {
                    let layout = Layout::new(me, values as usize, counts.clone(), PIECE as usize);
                    let allocated = (layout.size() * size_of::<f32>()) as u64;
                    assert_eq!(
                        nccl_memory(values, ranks as u64),
                        allocated,
                        "{values} values, {ranks} ranks"
                    );
                }
            }
        }
    }

    #[test]
    fn vectors_and_pieces_by_hand() {
        assert_eq!((nccl_memory(1000, 0), nccl_memory(1000, 1)), (0, 0));
        // Vectors end at multiples of 16: 1008. So does each rank's slice, which is less than a piece: 512.
        assert_eq!(nccl_memory(1000, 2), 4 * (3 * 1008 + 2 * 512));
        // And more than one.
        assert_eq!(nccl_memory(1 << 30, 4), 4 * (3 << 30) + 3 * 2 * (16 << 20));
        assert_eq!(nccl_memory(u64::MAX, u64::MAX), u64::MAX);
    }
}

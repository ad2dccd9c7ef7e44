use std::ops::Range;

/// Which contiguous leaves each rank computes, aligned so that few partials travel: weights
/// are the leaves' costs (tokens). A pure function; ranks may get none, but only where there are
/// fewer leaves than ranks.
///
/// The heaviest rank decides how long an operation takes. So: the smallest possible heaviest load,
/// plus `ALIGNMENT_SLACK` of it; and within that the cuts at the roundest leaf numbers.
pub fn assign_leaves(costs: &[u64], world_size: u32) -> Vec<Range<u32>> {
    let (leaves, ranks) = (costs.len(), world_size as usize);
    if leaves <= ranks {
        return (0..ranks).map(|r| r.min(leaves) as u32..(r + 1).min(leaves) as u32).collect();
    }
    if ranks == 0 {
        return Vec::new();
    }
    let load = Load::new(costs);
    let lightest = load.smallest_heaviest(ranks);
    let limit = lightest + lightest / ALIGNMENT_SLACK;
    let earliest_starts = load.earliest_starts(ranks, limit);

    let mut ranges = Vec::with_capacity(ranks);
    let mut start = 0;
    for remaining in (1..ranks).rev() {
        // Far enough that the rest fits into `remaining` ranges; near enough to fit into this
        // one and to leave each of them a leaf.
        let nearest = earliest_starts[remaining].max(start + 1);
        let farthest = load.farthest_end(start, limit).min(leaves - remaining);
        let fair = load.between(start, leaves) / (remaining as u128 + 1);
        let cut = (nearest..=farthest)
            .max_by_key(|cut| {
                let unfair = load.between(start, *cut).abs_diff(fair);
                (cut.trailing_zeros(), std::cmp::Reverse(unfair))
            })
            // `limit` admits a partition, and each cut keeps the rest possible.
            .unwrap_or(farthest);
        ranges.push(start as u32..cut as u32);
        start = cut;
    }
    ranges.push(start as u32..leaves as u32);
    ranges
}

/// A 32nd of the heaviest load may go for a rounder cut: a micro-batch takes seconds, a partial
/// sum that travels in vain milliseconds (shared memory) to tenths of a second (QUIC).
const ALIGNMENT_SLACK: u128 = 32;

/// Loads of ranges, by prefix sums.
struct Load(Vec<u128>);

impl Load {
    fn new(costs: &[u64]) -> Self {
        let mut sums = vec![0u128];
        sums.extend(costs.iter().scan(0u128, |sum, cost| {
            *sum += u128::from(*cost);
            Some(*sum)
        }));
        Self(sums)
    }

    fn leaves(&self) -> usize {
        self.0.len() - 1
    }

    fn between(&self, start: usize, end: usize) -> u128 {
        self.0[end] - self.0[start]
    }

    /// The longest range from `start` within `limit` ends here.
    fn farthest_end(&self, start: usize, limit: u128) -> usize {
        self.0.partition_point(|sum| *sum <= self.0[start] + limit) - 1
    }

    /// `[k]`: the earliest leaf from which all to the end fit into `k` ranges within `limit`.
    fn earliest_starts(&self, ranks: usize, limit: u128) -> Vec<usize> {
        let mut starts = vec![self.leaves()];
        for k in 1..ranks {
            let end = self.0[starts[k - 1]];
            starts.push(self.0.partition_point(|sum| sum + limit < end));
        }
        starts
    }

    /// The smallest load of the heaviest range, of all partitions into at most `ranks` ranges.
    fn smallest_heaviest(&self, ranks: usize) -> u128 {
        let heaviest_leaf = self.0.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
        let (mut low, mut high) = (heaviest_leaf, self.0[self.leaves()]);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.fits(ranks, middle) { high = middle } else { low = middle + 1 }
        }
        low
    }

    fn fits(&self, ranks: usize, limit: u128) -> bool {
        let end = (0..ranks).fold(0, |start, _| self.farthest_end(start, limit));
        end == self.leaves()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn few_leaves_go_to_the_first_ranks() {
        assert_eq!(assign_leaves(&[5, 5], 4), [0..1, 1..2, 2..2, 2..2]);
        assert_eq!(assign_leaves(&[], 2), [0..0, 0..0]);
        assert_eq!(assign_leaves(&[1, 2], 0), []);
        assert_eq!(assign_leaves(&[7; 6], 1), std::slice::from_ref(&(0..6)));
    }

    #[test]
    fn cost_decides_and_alignment_breaks_ties() {
        assert_eq!(assign_leaves(&[1; 8], 2), [0..4, 4..8]);
        assert_eq!(assign_leaves(&[1; 6], 2), [0..3, 3..6]);
        // 0..5 and 0..4 are as good for the heaviest rank (5): the round one.
        assert_eq!(assign_leaves(&[1; 9], 2), [0..4, 4..9]);
        assert_eq!(assign_leaves(&[9, 1, 1, 1, 1, 1], 2), [0..1, 1..6]);
        // 100 leaves: 48 | 52 would be rounder than 50 | 50, and costs more than a 32nd.
        assert_eq!(assign_leaves(&[1; 100], 2), [0..50, 50..100]);
        // 1,000: 496 | 504 is within a 32nd of 500, and 512 | 488 too.
        assert_eq!(assign_leaves(&[1; 1000], 2), [0..512, 512..1000]);
    }

    /// The smallest heaviest load by trying every partition.
    fn brute_force(costs: &[u64], ranks: usize) -> u64 {
        if ranks == 1 {
            return costs.iter().sum();
        }
        (0..=costs.len())
            .map(|cut| costs[..cut].iter().sum::<u64>().max(brute_force(&costs[cut..], ranks - 1)))
            .min()
            .unwrap()
    }

    proptest! {
        #[test]
        fn ranges_cover_and_balance(costs in prop::collection::vec(0u64..2000, 1..13), ranks in 1u32..5) {
            let ranges = assign_leaves(&costs, ranks);
            prop_assert_eq!(ranges.len(), ranks as usize);
            let mut next = 0;
            for range in &ranges {
                prop_assert_eq!(range.start, next);
                prop_assert!(costs.len() < ranks as usize || range.start < range.end, "a leaf each");
                next = range.end;
            }
            prop_assert_eq!(next as usize, costs.len());
            let load = |r: &Range<u32>| costs[r.start as usize..r.end as usize].iter().sum::<u64>();
            let heaviest = ranges.iter().map(load).max().unwrap();
            let best = brute_force(&costs, ranks as usize);
            prop_assert!(heaviest <= best + best / 32, "{} instead of {}: {:?}", heaviest, best, ranges);
        }
    }
}

//! The tree in which leaves are added, whoever holds them.
//!
//! Node `(level l, index i)` covers the leaves `[i << l, (i + 1) << l)` that exist. Its sum is its
//! left child's plus its right child's, or its left child's alone where the right one covers no
//! leaf; a leaf's sum is the leaf. Of six leaves:
//!
//! ```text
//!   level 3              (0)
//!                   ┌─────┴─────┐
//!   level 2        (0)         (1)          (1) is its left child (level 1, 2) alone
//!                ┌──┴──┐     ┌──┘
//!   level 1     (0)   (1)   (2)
//!               ┌┴┐   ┌┴┐   ┌┴┐
//!   level 0     0 1   2 3   4 5
//! ```

/// The sum of the leaves `index << level .. (index + 1) << level`.
#[derive(Debug, Clone, PartialEq)]
pub struct Partial {
    pub level: u32,
    pub index: u32,
    pub values: Vec<f32>,
}

/// Why partial sums are not those of one tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    #[error("nobody has leaf {0}")]
    MissingLeaf(u32),
    #[error("leaf {0} is in two partial sums")]
    DoubleLeaf(u32),
    #[error("a partial sum at level {level}, index {index} is outside a tree of {leaves} leaves")]
    Outside { level: u32, index: u32, leaves: u32 },
    #[error("a partial sum has {got} values instead of {expected}")]
    Length { got: usize, expected: usize },
}

/// Level of the root: 0 for one leaf, and for none.
pub(super) fn root_level(leaves: u32) -> u32 {
    u64::from(leaves).next_power_of_two().trailing_zeros()
}

/// First leaf that a node covers, or would.
pub(super) fn first_leaf(level: u32, index: u32) -> u64 {
    u64::from(index) << level
}

/// Adds vectors leaf by leaf in order and keeps at most two partials a level: what a rank uses
/// while it computes its own range of leaves.
pub struct TreeAccumulator {
    next: u32,
    len: usize,
    /// Neighbours from left to right, none the sibling of the next.
    partials: Vec<Partial>,
}

impl TreeAccumulator {
    /// For leaves `first..`, vectors of `len` values.
    pub fn new(first: u32, len: usize) -> Self {
        Self { next: first, len, partials: Vec::new() }
    }

    /// The next leaf.
    ///
    /// # Panics
    /// If it has another length than the accumulator was made for.
    pub fn push(&mut self, leaf: Vec<f32>) {
        assert_eq!(leaf.len(), self.len, "a leaf of another length");
        self.partials.push(Partial { level: 0, index: self.next, values: leaf });
        self.next += 1;
        self.merge();
    }

    /// The maximal aligned subtrees of what was pushed, of a tree with `leaves` leaves.
    pub fn finish(mut self, leaves: u32) -> Vec<Partial> {
        let root = root_level(leaves);
        while let Some(last) = self.partials.last_mut() {
            let right_is_empty =
                last.index.is_multiple_of(2) && first_leaf(last.level, last.index + 1) >= u64::from(leaves);
            if last.level >= root || !right_is_empty {
                break;
            }
            last.level += 1;
            last.index /= 2;
            self.merge();
        }
        self.partials
    }

    /// Joins siblings at the right end.
    fn merge(&mut self) {
        while let [.., left, right] = &mut self.partials[..]
            && left.level == right.level
            && left.index.is_multiple_of(2)
            && left.index + 1 == right.index
        {
            add(&mut left.values, &right.values);
            left.level += 1;
            left.index /= 2;
            self.partials.pop();
        }
    }
}

/// `left += right`, element by element: the one addition of this room.
pub(super) fn add(left: &mut [f32], right: &[f32]) {
    for (l, r) in left.iter_mut().zip(right) {
        *l += r;
    }
}

/// The sum of a tree by its definition: slow, obvious, and what every implementation must equal to
/// the bit. `partials` are aligned subtrees that cover each leaf once, in any order.
pub fn reduce_tree(leaves: u32, len: usize, partials: &[Partial]) -> Result<Vec<f32>, TreeError> {
    if leaves == 0 {
        return match partials.first() {
            None => Ok(vec![0.0; len]),
            Some(p) => Err(TreeError::Outside { level: p.level, index: p.index, leaves }),
        };
    }
    if let Some(p) = partials.iter().find(|p| p.values.len() != len) {
        return Err(TreeError::Length { got: p.values.len(), expected: len });
    }
    let mut used = vec![false; partials.len()];
    let sum = sum_of(root_level(leaves), 0, leaves, partials, &mut used)?;
    match used.iter().position(|used| !used) {
        None => Ok(sum),
        Some(i) => {
            let Partial { level, index, .. } = partials[i];
            Err(match first_leaf(level, index) {
                first if first < u64::from(leaves) && level <= root_level(leaves) => {
                    TreeError::DoubleLeaf(first as u32)
                }
                _ => TreeError::Outside { level, index, leaves },
            })
        }
    }
}

fn sum_of(
    level: u32,
    index: u32,
    leaves: u32,
    partials: &[Partial],
    used: &mut [bool],
) -> Result<Vec<f32>, TreeError> {
    if let Some(i) = partials.iter().position(|p| (p.level, p.index) == (level, index)) {
        used[i] = true;
        return Ok(partials[i].values.clone());
    }
    if level == 0 {
        return Err(TreeError::MissingLeaf(index));
    }
    let mut sum = sum_of(level - 1, index * 2, leaves, partials, used)?;
    if first_leaf(level - 1, index * 2 + 1) < u64::from(leaves) {
        add(&mut sum, &sum_of(level - 1, index * 2 + 1, leaves, partials, used)?);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(i: u32, len: usize) -> Vec<f32> {
        // Sizes far apart, so that another order of additions shows.
        (0..len as u32)
            .map(|j| ((i * 31 + j * 17) % 97) as f32 * 10f32.powi((i * 7 + j) as i32 % 9 - 4))
            .collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    fn every_leaf(n: u32, len: usize) -> Vec<Partial> {
        (0..n).map(|index| Partial { level: 0, index, values: leaf(index, len) }).collect()
    }

    #[test]
    fn six_leaves_by_hand() {
        let l = |i| leaf(i, 1)[0];
        let expected = ((l(0) + l(1)) + (l(2) + l(3))) + (l(4) + l(5));
        assert_eq!(bits(&reduce_tree(6, 1, &every_leaf(6, 1)).unwrap()), [expected.to_bits()]);
        let mut sums = TreeAccumulator::new(0, 1);
        (0..6).for_each(|i| sums.push(leaf(i, 1)));
        let whole = sums.finish(6);
        assert_eq!(whole, [Partial { level: 3, index: 0, values: vec![expected] }]);
    }

    #[test]
    fn partials_are_the_maximal_aligned_subtrees() {
        let mut sums = TreeAccumulator::new(3, 0);
        (3..10).for_each(|_| sums.push(vec![]));
        let at: Vec<_> = sums.finish(10).iter().map(|p| (p.level, p.index)).collect();
        // 3; 4..8; 8..10, whose right sides up to level 3 are empty.
        assert_eq!(at, [(0, 3), (2, 1), (3, 1)]);
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        let at = |level, index| Partial { level, index, values: vec![1.0] };
        let refuse = |leaves, partials: &[Partial]| reduce_tree(leaves, 1, partials).unwrap_err();
        assert_eq!(refuse(3, &[at(1, 0)]), TreeError::MissingLeaf(2));
        assert_eq!(refuse(2, &[at(1, 0), at(0, 1)]), TreeError::DoubleLeaf(1));
        assert_eq!(refuse(2, &[at(1, 0), at(1, 0)]), TreeError::DoubleLeaf(0));
        assert_eq!(refuse(2, &[at(1, 0), at(1, 1)]), TreeError::Outside { level: 1, index: 1, leaves: 2 });
        assert_eq!(refuse(0, &[at(0, 0)]), TreeError::Outside { level: 0, index: 0, leaves: 0 });
        let short = Partial { level: 0, index: 0, values: vec![] };
        assert_eq!(refuse(1, &[short]), TreeError::Length { got: 0, expected: 1 });
        assert_eq!(reduce_tree(0, 3, &[]).unwrap(), [0.0; 3]);
    }

    proptest! {
        /// Cut anywhere into any number of ranges: the same bits as leaf by leaf.
        #[test]
        fn any_cut_gives_the_same_bits(n in 1u32..70, mut cuts in prop::collection::vec(0u32..70, 0..6)) {
            cuts.retain(|c| *c <= n);
            cuts.extend([0, n]);
            cuts.sort_unstable();
            let mut partials = Vec::new();
            for pair in cuts.windows(2) {
                let mut sums = TreeAccumulator::new(pair[0], 3);
                (pair[0]..pair[1]).for_each(|i| sums.push(leaf(i, 3)));
                prop_assert!(sums.partials.len() <= 14, "two a level");
                partials.extend(sums.finish(n));
            }
            partials.reverse();
            let expected = reduce_tree(n, 3, &every_leaf(n, 3)).unwrap();
            prop_assert_eq!(bits(&reduce_tree(n, 3, &partials).unwrap()), bits(&expected));
        }
    }
}

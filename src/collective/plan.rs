use std::ops::Range;

use super::tree::{TreeError, add, first_leaf, root_level};

/// How to add up the partial sums of one tree: the additions of the tree in post-order, for a
/// machine with a stack. Found once, then run over any pieces of the vectors.
#[derive(Debug)]
pub(super) struct ReducePlan {
    /// Also for a machine that is elsewhere: one that adds up on a GPU. None for a tree of no leaves.
    pub(super) steps: Vec<Step>,
    depth: usize,
    /// All of the machine's stack but its lowest place, which is the sum's own.
    stack: Vec<f32>,
}

/// Where the values of a partial sum are.
pub(super) enum Read<'a> {
    /// In memory.
    Here(&'a [f32]),
    /// In the buffer that was given.
    Filled,
}

/// One move of the machine, by the place of the partial sum in the caller's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Push this partial sum.
    Load(usize),
    /// Add this partial sum, a right child, to the top: push and add, in one.
    AddFrom(usize),
    /// Pop a right child and add it to the new top.
    Add,
}

/// Values added at a time: what the stack holds of them (64 KiB a level) stays in the caches, and a
/// read of that size costs more than its system call.
const BLOCK: usize = 16 << 10;

impl ReducePlan {
    /// For partial sums at these `(level, index)`, in any order; refuses what does not cover each
    /// of `leaves` leaves once.
    pub(super) fn new(leaves: u32, partials: &[(u32, u32)]) -> Result<Self, TreeError> {
        let root = root_level(leaves);
        let mut in_order: Vec<(u64, u32, u32, usize)> = Vec::with_capacity(partials.len());
        for (i, &(level, index)) in partials.iter().enumerate() {
            if level > root || first_leaf(level, index) >= u64::from(leaves) {
                return Err(TreeError::Outside { level, index, leaves });
            }
            in_order.push((first_leaf(level, index), level, index, i));
        }
        in_order.sort_unstable();
        let mut planner = Planner { leaves, in_order, next: 0, steps: Vec::new() };
        if leaves > 0 {
            planner.visit(root, 0)?;
        }
        match planner.in_order.get(planner.next) {
            // Sorted and inside the tree: what is left over starts on a covered leaf.
            Some(&(first, ..)) => Err(TreeError::DoubleLeaf(first as u32)),
            None => Ok(Self { steps: planner.steps, depth: root as usize + 1, stack: Vec::new() }),
        }
    }

    /// Adds up the partial sums into `out`. `read` says where the values of one of them are, at these
    /// places of `out`, or fills a buffer with them.
    pub(super) fn run<'a, E>(
        &mut self,
        mut read: impl FnMut(usize, Range<usize>, &mut [f32]) -> Result<Read<'a>, E>,
        out: &mut [f32],
    ) -> Result<(), E> {
        if self.steps.is_empty() {
            out.fill(0.0);
            return Ok(());
        }
        // One level more: what a right child is read into before it is added.
        let size = self.depth * BLOCK.min(out.len());
        if self.stack.len() < size {
            self.stack.resize(size, 0.0);
        }
        let len = out.len();
        for start in (0..len).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(len);
            self.run_block(&mut read, block.clone(), &mut out[block])?;
        }
        Ok(())
    }

    fn run_block<'a, E>(
        &mut self,
        read: &mut impl FnMut(usize, Range<usize>, &mut [f32]) -> Result<Read<'a>, E>,
        block: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), E> {
        let mut stack = Stack { out, above: &mut self.stack, height: 0 };
        for step in &self.steps {
            match *step {
                Step::Load(i) => {
                    let top = stack.push();
                    if let Read::Here(values) = read(i, block.clone(), top)? {
                        top.copy_from_slice(values);
                    }
                }
                Step::AddFrom(i) => {
                    let (top, free) = stack.top_and_next();
                    match read(i, block.clone(), free)? {
                        Read::Here(values) => add(top, values),
                        Read::Filled => add(top, free),
                    }
                }
                Step::Add => {
                    stack.height -= 1;
                    let (top, popped) = stack.top_and_next();
                    add(top, popped);
                }
            }
        }
        Ok(())
    }
}

/// Blocks of values: the lowest is the sum's own place, so that the sum is where it belongs when it
/// is done.
struct Stack<'a> {
    out: &'a mut [f32],
    above: &'a mut [f32],
    height: usize,
}

impl Stack<'_> {
    fn push(&mut self) -> &mut [f32] {
        let width = self.out.len();
        self.height += 1;
        match self.height {
            1 => self.out,
            height => &mut self.above[(height - 2) * width..][..width],
        }
    }

    /// The top, and the place above it.
    fn top_and_next(&mut self) -> (&mut [f32], &mut [f32]) {
        let width = self.out.len();
        if self.height == 1 {
            return (self.out, &mut self.above[..width]);
        }
        let (below, next) = self.above.split_at_mut((self.height - 1) * width);
        (&mut below[(self.height - 2) * width..], &mut next[..width])
    }
}

struct Planner {
    leaves: u32,
    /// (first leaf, level, index, position in the caller's list)
    in_order: Vec<(u64, u32, u32, usize)>,
    next: usize,
    steps: Vec<Step>,
}

impl Planner {
    fn visit(&mut self, level: u32, index: u32) -> Result<(), TreeError> {
        if let Some(i) = self.take(level, index)? {
            self.steps.push(Step::Load(i));
            return Ok(());
        }
        let (left, right) = (index * 2, index * 2 + 1);
        self.visit(level - 1, left)?;
        if first_leaf(level - 1, right) >= u64::from(self.leaves) {
            return Ok(());
        }
        if let Some(i) = self.take(level - 1, right)? {
            self.steps.push(Step::AddFrom(i));
        } else {
            self.visit(level - 1, right)?;
            self.steps.push(Step::Add);
        }
        Ok(())
    }

    /// The partial sum of this node, if it is the next one. Those below it come before it (same
    /// first leaf, lower level), so a node that is given beside its children is found later, as
    /// a leaf that is there twice.
    fn take(&mut self, level: u32, index: u32) -> Result<Option<usize>, TreeError> {
        match self.in_order.get(self.next) {
            Some(&(first, l, i, position)) => {
                if (l, i) == (level, index) {
                    self.next += 1;
                    return Ok(Some(position));
                }
                let here = first_leaf(level, index);
                if first < here {
                    return Err(TreeError::DoubleLeaf(first as u32));
                }
                if level == 0 {
                    // It starts behind this leaf, or is a node above that reaches over it.
                    return Err(if first > here {
                        TreeError::MissingLeaf(index)
                    } else {
                        TreeError::DoubleLeaf(index)
                    });
                }
                Ok(None)
            }
            None if level == 0 => Err(TreeError::MissingLeaf(index)),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::{
        super::{Partial, reduce_tree},
        *,
    };

    /// Cuts a tree into aligned subtrees as `choices` say.
    fn cut(
        level: u32,
        index: u32,
        leaves: u32,
        choices: &mut impl Iterator<Item = bool>,
        nodes: &mut Vec<(u32, u32)>,
    ) {
        if first_leaf(level, index) >= u64::from(leaves) {
            return;
        }
        if level == 0 || choices.next().unwrap_or(true) {
            nodes.push((level, index));
            return;
        }
        cut(level - 1, index * 2, leaves, choices, nodes);
        cut(level - 1, index * 2 + 1, leaves, choices, nodes);
    }

    fn partials(nodes: &[(u32, u32)], len: usize) -> Vec<Partial> {
        let value =
            |i: usize, j: usize| ((i * 37 + j * 11) % 101) as f32 * 10f32.powi((i + j) as i32 % 9 - 4);
        let values = |i| (0..len).map(|j| value(i, j)).collect();
        nodes
            .iter()
            .enumerate()
            .map(|(i, &(level, index))| Partial { level, index, values: values(i) })
            .collect()
    }

    /// Every second one in memory, the others to be read.
    fn from<'a>(
        values: &'a [&'a [f32]],
    ) -> impl FnMut(usize, Range<usize>, &mut [f32]) -> Result<Read<'a>, Infallible> {
        |i, block, into| {
            if i % 2 == 0 {
                return Ok(Read::Here(&values[i][block]));
            }
            into.copy_from_slice(&values[i][block]);
            Ok(Read::Filled)
        }
    }

    #[test]
    fn a_read_that_fails_ends_the_sum() {
        let mut plan = ReducePlan::new(2, &[(0, 0), (0, 1)]).unwrap();
        let read = |i, _, _: &mut [f32]| if i == 1 { Err(i) } else { Ok(Read::Filled) };
        assert_eq!(plan.run(read, &mut [0.0; 3]), Err(1));
    }

    #[test]
    fn longer_than_a_block() {
        let nodes = [(1, 1), (0, 0), (0, 1), (3, 1)];
        let partials = partials(&nodes, 2 * BLOCK + 5);
        let mut out = vec![f32::NAN; 2 * BLOCK + 5];
        ReducePlan::new(11, &nodes).unwrap_err();
        let nodes = [(1, 1), (0, 0), (0, 1), (2, 1), (3, 1)];
        let partials = [partials, self::partials(&[(2, 1)], 2 * BLOCK + 5)].concat();
        let order = [0, 1, 2, 4, 3];
        ReducePlan::new(11, &nodes)
            .unwrap()
            .run(from(&order.map(|i| &partials[i].values[..])), &mut out)
            .unwrap();
        assert_eq!(out, reduce_tree(11, out.len(), &partials).unwrap());
    }

    #[test]
    fn refuses_what_the_reference_refuses() {
        for (leaves, nodes) in [
            (3, &[(1, 0)][..]),
            (2, &[(1, 0), (0, 1)]),
            (2, &[(1, 0), (0, 0)]),
            (2, &[(1, 0), (1, 0)]),
            (4, &[(0, 0), (2, 0)]),
            (4, &[(2, 0), (1, 1)]),
            (2, &[(1, 0), (1, 1)]),
            (2, &[(2, 0)]),
            (0, &[(0, 0)]),
            (1, &[]),
        ] {
            ReducePlan::new(leaves, nodes).unwrap_err();
            reduce_tree(leaves, 1, &partials(nodes, 1)).unwrap_err();
        }
        let mut out = [1.0];
        ReducePlan::new(0, &[]).unwrap().run(from(&[]), &mut out).unwrap();
        assert_eq!(out, [0.0]);
    }

    proptest! {
        #[test]
        fn equals_the_reference_to_the_bit(
            leaves in 1u32..200,
            choices in prop::collection::vec(any::<bool>(), 0..40),
            rotate in 0usize..50,
        ) {
            let mut nodes = Vec::new();
            cut(root_level(leaves), 0, leaves, &mut choices.into_iter(), &mut nodes);
            let by = rotate % nodes.len();
            nodes.rotate_left(by);
            let partials = partials(&nodes, 5);
            let expected = reduce_tree(leaves, 5, &partials).unwrap();
            let mut out = [f32::NAN; 5];
            let values: Vec<&[f32]> = partials.iter().map(|p| &p.values[..]).collect();
            ReducePlan::new(leaves, &nodes).unwrap().run(from(&values), &mut out).unwrap();
            prop_assert_eq!(out.map(f32::to_bits).to_vec(), expected.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
    }
}

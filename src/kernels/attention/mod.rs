//! Causal attention over sequences of different lengths, without a matrix of scores in memory.
//!
//! Queries and keys meet in blocks of 32 positions, counted from the start of the sequence. A row
//! takes its key blocks from the first to the one of its own position, and within a block all
//! sums have the order of the keys; so its bits depend on its sequence alone, whether the keys came
//! in one call or through a cache in many. Query heads that share a key head are rows of one
//! product.
//!
//! Legend: d head width, g query heads per key head, "row" one query of one head.

mod backward;
mod blocks;
mod forward;

pub(crate) use backward::{AttentionGradients, attention_backward};
pub(crate) use blocks::{KvBlocks, append};
pub(crate) use forward::attention;

use super::simd::LANES;

/// Positions of a block.
pub(crate) const BLOCK: usize = 32;

/// How many heads of which width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    pub queries: usize,
    pub keys: usize,
    pub dim: usize,
}

/// The rows of one sequence in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Index of its first row.
    pub first: usize,
    pub rows: usize,
    /// Position of its first row in the sequence.
    pub start: usize,
}

impl Heads {
    /// Query heads that share a key head.
    fn group(self) -> usize {
        self.queries / self.keys
    }

    /// The head width in whole vectors.
    fn padded(self) -> usize {
        self.dim.next_multiple_of(LANES)
    }

    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

impl Span {
    /// Position after its last row.
    fn end(self) -> usize {
        self.start + self.rows
    }
}

/// Finds the span that a task belongs to; returns it and the task's number within it.
fn locate(spans: &[Span], mut task: usize, tasks: impl Fn(&Span) -> usize) -> (usize, usize) {
    for (index, span) in spans.iter().enumerate() {
        let count = tasks(span);
        if task < count {
            return (index, task);
        }
        task -= count;
    }
    unreachable!("a task beyond the last span")
}

//! Frozen linear layers with low-rank adapters: `y = W x + scale · B (A x)`.
//!
//! Layers that read the same input (queries, keys and values; gate and up) are computed together,
//! so that a team meets seldom. Rows may belong to different adapters: they come in segments.
//! Work is split over rows and outputs only. Weights that [round their inputs](super::WeightDtype::Bf16) do so
//! for `W x` and its gradient `dy W` alone.

mod backward;
mod forward;
mod rounded;
mod rows;

use std::ops::Range;

use super::{amx::TILE_ROWS, simd::has_tiles};

pub(crate) use backward::{Adapted, Gradients, linear_backward};
pub(crate) use forward::{Layer, down_projections, linear};

/// An adapter's share of one layer.
#[derive(Clone, Copy)]
pub(crate) struct LowRank<'a> {
    /// `[rank, in]`.
    pub a: &'a [f32],
    /// `[out, rank]`.
    pub b: &'a [f32],
    pub rank: usize,
    pub scale: f32,
}

/// Rows of a task of the narrow products with A and B: enough that packing them costs little.
const NARROW_ROWS: usize = 256;

/// How rows of a product with base weights are cut into tasks.
struct RowBlocks {
    rows: usize,
    /// Rows that stay together.
    unit: usize,
    count: usize,
}

impl RowBlocks {
    /// Blocks of at most `most` rows, or of at most `tiled` where they [round](super::WeightDtype::Bf16) what goes
    /// through tiles of 32 rows.
    fn new(rows: usize, rounds: bool, most: usize, tiled: usize) -> Self {
        let (most, unit) = if rounds && has_tiles() { (tiled, TILE_ROWS) } else { (most, 1) };
        Self { rows, unit, count: rows.div_ceil(most) }
    }

    fn get(&self, block: usize) -> Range<usize> {
        let units = part_of(self.rows.div_ceil(self.unit), self.count, block);
        units.start * self.unit..self.rows.min(units.end * self.unit)
    }
}

/// One of the nearly equal parts of `rows`.
fn part_of(rows: usize, parts: usize, part: usize) -> Range<usize> {
    rows * part / parts..rows * (part + 1) / parts
}

use std::ops::Range;

use crate::kernels::{
    Matrix, Team,
    buffer::{Shared, with_scratch},
    matrix::{PANEL, Panel},
    pack::{pack_transposed, panel_width},
    tile::{Block, Element, Factors, Start, WidePair},
};

use super::{
    LowRank, NARROW_ROWS, RowBlocks, part_of,
    rows::{Rows, with_rows},
};

/// One of the layers that read the same input.
pub(crate) struct Layer<'a, F> {
    pub weight: &'a Matrix,
    /// The adapter of a segment of rows, by its index.
    pub low_rank: F,
    /// Receives `scale · A x` of adapted rows, `[rows, low_row]`.
    pub low: Shared<'a>,
    /// At least the largest rank.
    pub low_row: usize,
    /// Receives the outputs, `[rows, out]`.
    pub y: Shared<'a>,
}

/// Rows of a block whose inputs stay in a core's second-level cache while it goes through the
/// panels of the weights: a multiple of every tile's height.
const BLOCK_ROWS: usize = 120;

/// The same where they go through [tiles](crate::kernels::amx).
const TILED_BLOCK_ROWS: usize = 128;

/// Rows of the tallest tile.
const TALLEST_TILE: usize = 12;

/// Tasks per thread, so that an unlucky thread costs little.
const TASKS_PER_THREAD: usize = 4;

/// `y = W x + scale · B (A x)` for every layer of a group; `x` is `[rows, in]`, and `segments`
/// cover its rows.
pub(crate) fn linear<'a, F>(x: &[f32], segments: &[Range<usize>], layers: &[Layer<'a, F>], team: &Team)
where
    F: Fn(usize) -> Option<LowRank<'a>> + Sync,
{
    let rows = segments.last().map_or(0, |segment| segment.end);
    if rows == 0 || layers.is_empty() {
        return;
    }
    down_projections(x, segments, layers, team);
    let panels: usize = layers.iter().map(|layer| layer.weight.panels()).sum();
    let rounds = layers.iter().any(|layer| layer.weight.rounds_inputs());
    let blocks = RowBlocks::new(rows, rounds, BLOCK_ROWS, TILED_BLOCK_ROWS);
    let groups = (team.width() * TASKS_PER_THREAD).div_ceil(blocks.count).min(panels);
    let inputs = layers[0].weight.in_features();
    team.run(blocks.count * groups, |task| {
        let block = blocks.get(task / groups);
        let group = part_of(panels, groups, task % groups);
        let x = &x[block.start * inputs..block.end * inputs];
        with_rows(x, inputs, inputs, rounds, |plain, rounded| {
            let mut first = 0;
            for layer in layers {
                let last = first + layer.weight.panels();
                let x = if layer.weight.rounds_inputs() { rounded } else { plain };
                for panel in group.start.max(first)..group.end.min(last) {
                    layer.panel(x, segments, block.clone(), panel - first);
                }
                first = last;
            }
        });
    });
}

/// `low = scale · A x`, segment by segment: the first half of [`linear`].
pub(crate) fn down_projections<'a, F>(
    x: &[f32],
    segments: &[Range<usize>],
    layers: &[Layer<'a, F>],
    team: &Team,
) where
    F: Fn(usize) -> Option<LowRank<'a>> + Sync,
{
    let parts = |segment: &Range<usize>| segment.len().div_ceil(NARROW_ROWS);
    let per_layer: usize = segments
        .iter()
        .enumerate()
        .filter(|(index, _)| layers.iter().any(|layer| (layer.low_rank)(*index).is_some()))
        .map(|(_, segment)| parts(segment))
        .sum();
    if per_layer == 0 {
        return;
    }
    team.run(per_layer * layers.len(), |task| {
        let layer = &layers[task / per_layer];
        let mut part = task % per_layer;
        for (index, segment) in segments.iter().enumerate() {
            if layers.iter().all(|layer| (layer.low_rank)(index).is_none()) {
                continue;
            }
            let parts = parts(segment);
            if part < parts {
                if let Some(low_rank) = (layer.low_rank)(index) {
                    let rows = part_of(segment.len(), parts, part);
                    layer.down(x, low_rank, segment.start + rows.start..segment.start + rows.end);
                }
                return;
            }
            part -= parts;
        }
    });
}

impl<'a, F> Layer<'a, F>
where
    F: Fn(usize) -> Option<LowRank<'a>>,
{
    /// `low = scale · A x` for some rows of one segment.
    fn down(&self, x: &[f32], low_rank: LowRank<'_>, rows: Range<usize>) {
        let depth = self.weight.in_features();
        let x = &x[rows.start * depth..rows.end * depth];
        for first in (0..low_rank.rank).step_by(PANEL) {
            let columns = PANEL.min(low_rank.rank - first);
            let width = panel_width(columns);
            with_scratch(depth * width, |packed| {
                pack_transposed(&low_rank.a[first * depth..], depth, columns, depth, packed);
                let product = Factors {
                    a: x.as_ptr(),
                    a_row: depth,
                    a_step: 1,
                    b: packed.as_ptr(),
                    b_step: width,
                    depth,
                };
                let block = Block {
                    rows: rows.len(),
                    columns,
                    product,
                    second: None,
                    c: self.low.at(rows.start * self.low_row + first),
                    c_row: self.low_row,
                    start: Start::Zero,
                };
                // SAFETY: x has these rows, the panel is as wide as a tile reads, and no other
                // task has these rows of this layer.
                unsafe { block.compute() };
            });
        }
        for row in rows {
            let start = row * self.low_row;
            // SAFETY: as above.
            let low = unsafe { self.low.part(start..start + low_rank.rank) };
            low.iter_mut().for_each(|value| *value *= low_rank.scale);
        }
    }

    /// One panel of outputs for a block of rows, `x`.
    fn panel(&self, x: Rows<'_>, segments: &[Range<usize>], rows: Range<usize>, panel: usize) {
        let weights = self.weight.panel(panel);
        let inputs = self.weight.in_features();
        let x = match x {
            Rows::Pairs(pairs) => {
                let Panel::Bf16(weights) = weights else { unreachable!("only bf16 rounds its inputs") };
                return self.outputs(pairs, inputs.div_ceil(2), segments, rows, panel, weights);
            }
            Rows::F32 { values, .. } => values,
        };
        match weights {
            Panel::F32(weights) => self.outputs(x, inputs, segments, rows, panel, weights),
            // Widened in registers for a few rows; for more, once for all of them.
            weights if rows.len() > TALLEST_TILE => with_scratch(inputs * PANEL, |wide| {
                weights.widen(wide);
                self.outputs(x, inputs, segments, rows, panel, wide);
            }),
            Panel::Bf16(weights) => self.outputs(x, inputs, segments, rows, panel, WidePair::of(weights)),
            Panel::FourBits(blocks) => self.outputs(x, inputs, segments, rows, panel, blocks),
            Panel::FiveBits(blocks) => self.outputs(x, inputs, segments, rows, panel, blocks),
            Panel::SixBits(blocks) => self.outputs(x, inputs, segments, rows, panel, blocks),
            Panel::EightBits(blocks) => self.outputs(x, inputs, segments, rows, panel, blocks),
        }
    }

    /// The same with weights of one kind; rows of `x` have `row_len` elements.
    fn outputs<E: Element>(
        &self,
        x: &[E::Input],
        row_len: usize,
        segments: &[Range<usize>],
        rows: Range<usize>,
        panel: usize,
        weights: &[E],
    ) {
        let outputs = self.weight.out_features();
        let column = panel * PANEL;
        let columns = PANEL.min(outputs - column);
        let base = Block {
            rows: rows.len(),
            columns,
            product: Factors {
                a: x[..rows.len() * row_len].as_ptr(),
                a_row: row_len,
                a_step: 1,
                b: weights.as_ptr(),
                b_step: PANEL,
                depth: row_len,
            },
            second: None,
            c: self.y.at(rows.start * outputs + column),
            c_row: outputs,
            start: Start::Zero,
        };
        // All rows of one adapter: one pass. Else the base for all, then what each adds; parking a
        // sum between the two changes no bit of it.
        if let [_] = segments {
            let up = (self.low_rank)(0).map(|low_rank| (low_rank, rows));
            self.with_up(up, column, columns, |second| {
                // SAFETY: x has these rows, a panel of the matrix is 32 wide, and no other task
                // has these rows and columns of this layer.
                unsafe { Block { second, ..base }.compute() }
            });
            return;
        }
        // SAFETY: as above.
        unsafe { base.compute() };
        for (index, segment) in segments.iter().enumerate() {
            let rows = segment.start.max(rows.start)..segment.end.min(rows.end);
            if let (Some(low_rank), false) = ((self.low_rank)(index), rows.is_empty()) {
                let c = self.y.at(rows.start * outputs + column);
                let (count, c_row) = (rows.len(), outputs);
                self.with_up(Some((low_rank, rows)), column, columns, |up| {
                    let Some(product) = up else { return };
                    let start = Start::Stored;
                    // SAFETY: as above; the sums that it starts from have just been written.
                    unsafe {
                        Block { rows: count, columns, product, second: None, c, c_row, start }.compute()
                    }
                });
            }
        }
    }

    /// Calls `work` with the product `low · Bᵀ` for some rows and outputs.
    fn with_up(
        &self,
        up: Option<(LowRank<'_>, Range<usize>)>,
        column: usize,
        columns: usize,
        work: impl FnOnce(Option<Factors>),
    ) {
        let Some((LowRank { b, rank, .. }, rows)) = up else {
            return work(None);
        };
        let width = panel_width(columns);
        with_scratch(rank * width, |packed| {
            pack_transposed(&b[column * rank..], rank, columns, rank, packed);
            work(Some(Factors {
                a: self.low.at(rows.start * self.low_row),
                a_row: self.low_row,
                a_step: 1,
                b: packed.as_ptr(),
                b_step: width,
                depth: rank,
            }))
        })
    }
}

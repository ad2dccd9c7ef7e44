use crate::kernels::{
    Matrix, Team,
    amx::STEP_TERMS,
    buffer::{Shared, with_scratch},
    matrix::PANEL,
    pack::{pack_columns, panel_width},
    simd::LANES,
    tile::{Block, Factors, Start},
};

use super::{
    LowRank, NARROW_ROWS, part_of,
    rounded::{rounded_input_gradient, rounded_tasks},
};

/// A layer on the way back: its output's gradient, and its adapter if it has one.
pub(crate) struct Gradients<'a> {
    pub weight: &'a Matrix,
    /// `[rows, out]`.
    pub dy: &'a [f32],
    pub adapted: Option<Adapted<'a>>,
}

/// What the gradient of an adapter takes and where it goes.
pub(crate) struct Adapted<'a> {
    pub low_rank: LowRank<'a>,
    /// `scale · A x` from the forward, `[rows, rank]`.
    pub low: &'a [f32],
    /// Receives `scale · dy B`, `[rows, rank]`.
    pub d_low: Shared<'a>,
    /// The gradient of A is added here, `[rank, in]`.
    pub d_a: Shared<'a>,
    /// The gradient of B is added here, `[out, rank]`.
    pub d_b: Shared<'a>,
}

/// Outputs whose weights are transposed at a time: 128 KiB of scratch.
pub(super) const CHUNK: usize = 1024;

// Else a row's bits in tiles would depend on it.
const _: () = assert!(CHUNK.is_multiple_of(STEP_TERMS));

/// Tasks per thread, so that an unlucky thread costs little.
pub(super) const TASKS_PER_THREAD: usize = 4;

/// The backward of [`linear`](super::linear) for rows of one adapter.
///
/// Adds `dA = d_lowᵀ x` and `dB = dyᵀ low` to the gradients, and writes `dx = Σ dy W + d_low A` over
/// the layers of the group, in their order, if `dx` (`[rows, in]`) is given. Sums over rows go
/// from the first row to the last, whatever the team.
pub(crate) fn linear_backward(
    x: &[f32],
    rows: usize,
    layers: &[Gradients<'_>],
    dx: Option<Shared<'_>>,
    team: &Team,
) {
    let Some(inputs) = layers.first().map(|layer| layer.weight.in_features()) else {
        return;
    };
    let parts = rows.div_ceil(NARROW_ROWS);
    team.run(parts * layers.len(), |task| {
        let rows = part_of(rows, parts, task % parts);
        layers[task / parts].d_low(rows.start, rows.len());
    });

    let input_panels = inputs.div_ceil(PANEL);
    let row_parts = (team.width() * TASKS_PER_THREAD).div_ceil(input_panels).min(rows.div_ceil(LANES));
    let rounds = layers.iter().any(|layer| layer.weight.rounds_inputs());
    let (blocks, groups) = rounded_tasks(rows, input_panels, team);
    let dx_tasks = match (dx, rounds) {
        (None, _) => 0,
        (Some(_), false) => input_panels * row_parts,
        (Some(_), true) => blocks.count * groups,
    };
    let adapter_tasks: usize = layers.iter().map(|layer| layer.adapter_tasks()).sum();
    team.run(dx_tasks + adapter_tasks, |task| {
        if let (Some(dx), true, true) = (dx, rounds, task < dx_tasks) {
            let rows = blocks.get(task / groups);
            return rounded_input_gradient(rows, layers, dx, part_of(input_panels, groups, task % groups));
        }
        if let (Some(dx), true) = (dx, task < dx_tasks) {
            let rows = part_of(rows, row_parts, task / input_panels);
            return input_gradient(rows.start, rows.len(), layers, dx, task % input_panels);
        }
        let mut task = task - dx_tasks;
        for layer in layers {
            let tasks = layer.adapter_tasks();
            if task < tasks {
                return layer.adapter_gradient(x, rows, task);
            }
            task -= tasks;
        }
    });
}

/// `dx = Σ dy W + d_low A` for some rows and a panel of inputs.
fn input_gradient(first_row: usize, rows: usize, layers: &[Gradients<'_>], dx: Shared<'_>, panel: usize) {
    let inputs = layers[0].weight.in_features();
    let column = panel * PANEL;
    let columns = PANEL.min(inputs - column);
    let mut start = Start::Zero;
    for layer in layers {
        let outputs = layer.weight.out_features();
        for first in (0..outputs).step_by(CHUNK) {
            let depth = CHUNK.min(outputs - first);
            let low_rank = layer.adapted.as_ref().filter(|_| first + depth == outputs);
            let low_len = low_rank.map_or(0, |adapted| adapted.low_rank.rank * PANEL);
            with_scratch(CHUNK * PANEL + low_len, |scratch| {
                let (weights, low_weights) = scratch.split_at_mut(CHUNK * PANEL);
                transpose_weights(layer.weight, first, depth, column, columns, weights);
                let block = Block {
                    rows,
                    columns,
                    product: Factors {
                        a: layer.dy[first_row * outputs + first..].as_ptr(),
                        a_row: outputs,
                        a_step: 1,
                        b: weights.as_ptr(),
                        b_step: panel_width(columns),
                        depth,
                    },
                    second: low_rank.map(|adapted| {
                        adapted.input_product(first_row, inputs, column, columns, low_weights)
                    }),
                    c: dx.at(first_row * inputs + column),
                    c_row: inputs,
                    start,
                };
                // SAFETY: dy has these rows, the panels are 32 wide or as wide as the columns need,
                // and no other task has these rows and columns of dx.
                unsafe { block.compute() };
            });
            start = Start::Stored;
        }
    }
}

/// `transposed[n, k] = W[first + n, column + k]`, as wide as the columns need.
///
/// The 32 x 32 values of a panel of outputs and a panel of inputs lie together.
pub(super) fn transpose_weights(
    weight: &Matrix,
    first: usize,
    depth: usize,
    column: usize,
    columns: usize,
    transposed: &mut [f32],
) {
    for n in (0..depth).step_by(PANEL) {
        let width = panel_width(columns);
        let to = &mut transposed[n * width..][..PANEL * width];
        weight.panel_inputs((first + n) / PANEL, column..column + columns).transpose(columns, to);
    }
}

impl Adapted<'_> {
    /// The product `d_low · A` for a panel of inputs.
    pub(super) fn input_product(
        &self,
        first_row: usize,
        inputs: usize,
        column: usize,
        columns: usize,
        packed: &mut [f32],
    ) -> Factors {
        let LowRank { a, rank, .. } = self.low_rank;
        pack_columns(&a[column..], inputs, columns, rank, packed);
        Factors {
            a: self.d_low.at(first_row * rank),
            a_row: rank,
            a_step: 1,
            b: packed.as_ptr(),
            b_step: panel_width(columns),
            depth: rank,
        }
    }
}

impl Gradients<'_> {
    /// `d_low = scale · dy B` for some rows.
    fn d_low(&self, first_row: usize, rows: usize) {
        let Some(Adapted { low_rank: LowRank { b, rank, scale, .. }, d_low, .. }) = self.adapted else {
            return;
        };
        let outputs = self.weight.out_features();
        for first in (0..rank).step_by(PANEL) {
            let columns = PANEL.min(rank - first);
            let width = panel_width(columns);
            with_scratch(outputs * width, |packed| {
                pack_columns(&b[first..], rank, columns, outputs, packed);
                let block = Block {
                    rows,
                    columns,
                    product: Factors {
                        a: self.dy[first_row * outputs..].as_ptr(),
                        a_row: outputs,
                        a_step: 1,
                        b: packed.as_ptr(),
                        b_step: width,
                        depth: outputs,
                    },
                    second: None,
                    c: d_low.at(first_row * rank + first),
                    c_row: rank,
                    start: Start::Zero,
                };
                // SAFETY: dy has these rows, the panel is as wide as a tile reads, and no other
                // task has these rows of this layer.
                unsafe { block.compute() };
            });
        }
        // SAFETY: as above.
        let d_low = unsafe { d_low.part(first_row * rank..(first_row + rows) * rank) };
        d_low.iter_mut().for_each(|value| *value *= scale);
    }

    /// Panels of A's columns, then panels of B's rows.
    fn adapter_tasks(&self) -> usize {
        let panels = self.weight.in_features().div_ceil(PANEL) + self.weight.panels();
        if self.adapted.is_some() { panels } else { 0 }
    }

    /// The gradient of a panel of A's columns or of B's rows.
    fn adapter_gradient(&self, x: &[f32], rows: usize, task: usize) {
        let Some(adapted) = &self.adapted else { return };
        let rank = adapted.low_rank.rank;
        let (inputs, outputs) = (self.weight.in_features(), self.weight.out_features());
        let a_panels = inputs.div_ceil(PANEL);
        if task < a_panels {
            let column = task * PANEL;
            let columns = PANEL.min(inputs - column);
            let to = (adapted.d_a.at(column), inputs);
            // SAFETY: d_low is complete, and no other task has these columns of A.
            unsafe {
                outer_products(
                    adapted.d_low.at(0),
                    rank,
                    &x[column..],
                    inputs,
                    columns,
                    rows,
                    to,
                    Start::Stored,
                )
            };
            return;
        }
        let row = (task - a_panels) * PANEL;
        let columns = PANEL.min(outputs - row);
        // SAFETY: no other task has these rows of B.
        let d_b = unsafe { adapted.d_b.part(row * rank..(row + columns) * rank) };
        with_scratch(rank * PANEL, |sums| {
            let to = (sums.as_mut_ptr(), PANEL);
            // SAFETY: the sums are this task's own.
            unsafe {
                let dy = &self.dy[row..];
                outer_products(adapted.low.as_ptr(), rank, dy, outputs, columns, rows, to, Start::Zero)
            };
            for (j, d_b) in d_b.chunks_exact_mut(rank).enumerate() {
                for (i, value) in d_b.iter_mut().enumerate() {
                    *value += sums[i * PANEL + j];
                }
            }
        });
    }
}

/// `to[i, j] (+)= Σ_row low[row, i] · values[row, j]` for `rank` rows and up to 32 columns.
///
/// # Safety
///
/// `low` must be readable as `[rows, rank]`, and `to` belong to the caller alone.
#[allow(clippy::too_many_arguments)]
unsafe fn outer_products(
    low: *const f32,
    rank: usize,
    values: &[f32],
    row_len: usize,
    columns: usize,
    rows: usize,
    to: (*mut f32, usize),
    start: Start,
) {
    let compute = |b: *const f32, b_step: usize| {
        let block = Block {
            rows: rank,
            columns,
            product: Factors { a: low, a_row: 1, a_step: rank, b, b_step, depth: rows },
            second: None,
            c: to.0,
            c_row: to.1,
            start,
        };
        // SAFETY: the caller's promise; `b` has whole vectors of columns.
        unsafe { block.compute() }
    };
    if columns.is_multiple_of(LANES) {
        return compute(values.as_ptr(), row_len);
    }
    // The last columns of the last row end before a whole vector: work on a padded copy.
    with_scratch(rows * panel_width(columns), |packed| {
        pack_columns(values, row_len, columns, rows, packed);
        compute(packed.as_ptr(), panel_width(columns));
    });
}

//! The gradient of the inputs where weights round what they are multiplied with: `dx = Σ bf16(dy) W + d_low A`.
//!
//! Rows of `dy` are rounded once for all panels of a task, so its tasks are blocks of rows times groups of
//! panels. All the products of bf16 come first, layer by layer, and then those of the adapters, in f32: a sum of
//! the latter could be subnormal, which the former's instruction takes for zero.

use std::ops::Range;

use crate::kernels::{
    Matrix, Team,
    buffer::{Shared, with_scratch},
    matrix::{PANEL, Panel},
    pack::panel_width,
    pair::{Pair, as_pairs},
    simd::{Kernel, LANES, Simd, run},
    tile::{Block, Element, Factors, Start},
};

use super::{
    Gradients, RowBlocks,
    backward::{CHUNK, TASKS_PER_THREAD, transpose_weights},
    rows::{Rows, with_rows},
};

/// Rows of a task at most: their gradients of a chunk of outputs are half a MiB of pairs and stay in a core's
/// second-level cache, and transposing the weights once for them costs a few percent.
const BLOCK_ROWS: usize = 256;

/// The same in [tiles](crate::kernels::amx), beside whose products transposing would cost a large part: a MiB of
/// pairs of caches that have two.
const TILED_BLOCK_ROWS: usize = 512;

/// (blocks of rows, groups of panels) whose pairs are the tasks.
pub(super) fn rounded_tasks(rows: usize, input_panels: usize, team: &Team) -> (RowBlocks, usize) {
    let blocks = RowBlocks::new(rows, true, BLOCK_ROWS, TILED_BLOCK_ROWS);
    let groups = (team.width() * TASKS_PER_THREAD).div_ceil(blocks.count.max(1)).min(input_panels);
    (blocks, groups)
}

/// The gradient of the inputs in these panels, for some rows.
pub(super) fn rounded_input_gradient(
    rows: Range<usize>,
    layers: &[Gradients<'_>],
    dx: Shared<'_>,
    panels: Range<usize>,
) {
    let inputs = layers[0].weight.in_features();
    let mut start = Start::Zero;
    for layer in layers {
        let outputs = layer.weight.out_features();
        for first in (0..outputs).step_by(CHUNK) {
            let depth = CHUNK.min(outputs - first);
            let dy = &layer.dy[rows.start * outputs + first..(rows.end - 1) * outputs + first + depth];
            with_rows(dy, outputs, depth, layer.weight.rounds_inputs(), |_, dy| {
                for panel in panels.clone() {
                    let to = PanelOf { rows: rows.clone(), inputs, column: panel * PANEL };
                    to.add(layer.weight, dy, first..first + depth, dx, start);
                }
            });
            start = Start::Stored;
        }
    }
    for adapted in layers.iter().filter_map(|layer| layer.adapted.as_ref()) {
        for column in panels.clone().map(|panel| panel * PANEL) {
            let to = PanelOf { rows: rows.clone(), inputs, column };
            with_scratch(adapted.low_rank.rank * PANEL, |packed| {
                let product = adapted.input_product(rows.start, inputs, column, to.columns(), packed);
                to.compute(product, dx, Start::Stored);
            });
        }
    }
}

/// Some rows and 32 columns of the gradient.
struct PanelOf {
    rows: Range<usize>,
    inputs: usize,
    column: usize,
}

impl PanelOf {
    fn columns(&self) -> usize {
        PANEL.min(self.inputs - self.column)
    }

    /// Adds the product of `dy` with the weights of some outputs.
    fn add(&self, weight: &Matrix, dy: Rows<'_>, outputs: Range<usize>, dx: Shared<'_>, start: Start) {
        let (columns, width) = (self.columns(), panel_width(self.columns()));
        let (first, depth) = (outputs.start, outputs.len());
        with_scratch(CHUNK * PANEL, |scratch| match dy {
            Rows::F32 { values, row_len } => {
                transpose_weights(weight, first, depth, self.column, columns, scratch);
                let (a, b) = (values.as_ptr(), scratch.as_ptr());
                self.compute(Factors { a, a_row: row_len, a_step: 1, b, b_step: width, depth }, dx, start);
            }
            Rows::Pairs(pairs) => {
                let transposed = as_pairs(scratch);
                transpose_pairs(weight, outputs, self.column, columns, transposed);
                let (a, b) = (pairs.as_ptr(), transposed.as_ptr());
                let depth = depth.div_ceil(2);
                self.compute(Factors { a, a_row: depth, a_step: 1, b, b_step: PANEL, depth }, dx, start);
            }
        });
    }

    fn compute<E: Element>(&self, product: Factors<E>, dx: Shared<'_>, start: Start) {
        let block = Block {
            rows: self.rows.len(),
            columns: self.columns(),
            product,
            second: None,
            c: dx.at(self.rows.start * self.inputs + self.column),
            c_row: self.inputs,
            start,
        };
        // SAFETY: the operands have these rows, the panel is 32 wide or as wide as the columns need, and no other
        // task has these rows and columns of dx.
        unsafe { block.compute() };
    }
}

/// `transposed[n, k]` is the pair of outputs `2n` and `2n + 1` of the range for input `column + k`; 32 wide.
///
/// The 32 x 32 values of a panel of outputs and a panel of inputs lie together.
fn transpose_pairs(
    weight: &Matrix,
    outputs: Range<usize>,
    column: usize,
    columns: usize,
    transposed: &mut [Pair],
) {
    struct Transpose<'a>(&'a [Pair], &'a mut [Pair]);
    impl Kernel for Transpose<'_> {
        type Output = ();

        /// 16 inputs at a time: their weights of 32 outputs, regrouped to pairs of outputs, fill 16 registers.
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(pairs, transposed) = self;
            let transposed = &mut transposed[..LANES * PANEL];
            for (inputs, pairs) in pairs.chunks(LANES / 2 * PANEL).enumerate() {
                let mut of_input = [s.splat(0.0); LANES];
                for (two, of_outputs) in of_input.chunks_exact_mut(2).zip(pairs.chunks_exact(PANEL)) {
                    // SAFETY: the chunk has 32 pairs, which have the size of numbers.
                    let halves = unsafe {
                        let from = of_outputs.as_ptr().cast();
                        [s.load(from), s.load(from.add(LANES))]
                    };
                    two.copy_from_slice(&s.regroup_pairs(halves));
                }
                for (of_outputs, line) in
                    s.transpose(of_input).into_iter().zip(transposed.chunks_exact_mut(PANEL))
                {
                    let to = &mut line[inputs * LANES..][..LANES];
                    // SAFETY: the slice has 16 pairs, which have the size of numbers.
                    unsafe { s.store(to.as_mut_ptr().cast(), of_outputs) };
                }
            }
        }
    }
    for (n, to) in (0..outputs.len()).step_by(PANEL).zip(transposed.chunks_exact_mut(PANEL / 2 * PANEL)) {
        let panel = weight.panel_inputs((outputs.start + n) / PANEL, column..column + columns);
        let Panel::Bf16(pairs) = panel else { unreachable!("only bf16 rounds its inputs") };
        run(Transpose(pairs, to));
    }
}

//! Frozen weights in the order in which the products read them.

use std::{fmt, ops::Range, sync::Arc};

use half::bf16;

use super::{
    BLOCK, BlockRows, CodeBits, WeightDtype,
    blocks::{Codes, EightBits, FiveBits, FourBits, SixBits, write_out},
    buffer::Buffer,
    pack::pack_transposed,
    pair::{Pair, round_weight},
    simd::{Kernel, LANES, Simd, run},
};

/// Outputs in a panel: two AVX-512 registers, the width of the widest product tile.
pub(crate) const PANEL: usize = 32;

/// A frozen linear layer's weight, packed once when it is loaded; clones share it.
///
/// ```text
/// panel p holds outputs 32p .. 32p + 32, input by input (missing outputs are zero):
///
///            output 32p   32p+1  …  32p+31
/// input 0        w          w          w
/// input 1        w          w          w
///   …
/// ```
///
/// Of bf16 two inputs are a line, an output's weights side by side as a pair (`kernels/pair.rs`).
///
/// So a product with one row, as in decoding, reads memory once from front to back and needs no
/// horizontal sum, and one with a thousand rows needs no packing. The transposed product of the
/// backward transposes blocks of 32 x 32, each of which is contiguous.
#[derive(Clone)]
pub struct Matrix {
    out_features: usize,
    in_features: usize,
    /// What rows are rounded to before they are multiplied with it.
    inputs: WeightDtype,
    panels: Panels,
}

#[derive(Clone)]
enum Panels {
    F32(Arc<Buffer>),
    Bf16(Arc<Vec<PairLine>>),
    FourBits(Arc<Vec<FourBits>>),
    FiveBits(Arc<Vec<FiveBits>>),
    SixBits(Arc<Vec<SixBits>>),
    EightBits(Arc<Vec<EightBits>>),
}

/// The weights of two inputs and 32 outputs: two cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct PairLine([Pair; PANEL]);

/// Some inputs of a panel, `[inputs, 32]`.
#[derive(Clone, Copy)]
pub(crate) enum Panel<'a> {
    F32(&'a [f32]),
    /// `[inputs / 2, 32]`
    Bf16(&'a [Pair]),
    FourBits(&'a [FourBits]),
    FiveBits(&'a [FiveBits]),
    SixBits(&'a [SixBits]),
    EightBits(&'a [EightBits]),
}

impl Matrix {
    /// Packs `rows`, `[out_features, in_features]` row-major, as f32.
    ///
    /// # Panics
    ///
    /// If `rows` has another length than `out_features * in_features`.
    pub fn from_rows(out_features: usize, in_features: usize, rows: &[f32]) -> Self {
        Self::with_dtype(WeightDtype::F32, out_features, in_features, rows)
    }

    /// Packs `rows`, `[out_features, in_features]` row-major, each weight [rounded](WeightDtype::round) to
    /// `dtype`. Of bf16 the rows that it is multiplied with are rounded too, sums are f32.
    ///
    /// # Panics
    ///
    /// If `rows` has another length than `out_features * in_features`.
    pub fn with_dtype(dtype: WeightDtype, out_features: usize, in_features: usize, rows: &[f32]) -> Self {
        assert_eq!(rows.len(), out_features * in_features, "a matrix needs out x in values");
        let panels = match dtype {
            WeightDtype::F32 => {
                let mut panels = Buffer::zeroed(out_features.div_ceil(PANEL) * in_features * PANEL);
                pack(&mut panels, in_features, rows);
                Panels::F32(Arc::new(panels))
            }
            WeightDtype::Bf16 => Panels::Bf16(Arc::new(pack_pairs(in_features, rows, round_weight))),
        };
        Self { out_features, in_features, inputs: dtype, panels }
    }

    /// Packs rows of numbers that are bf16 in half the memory. It is multiplied as f32 weights are, with the same
    /// bits.
    ///
    /// # Panics
    ///
    /// If `rows` has another length than `out_features * in_features`.
    pub fn from_bf16(out_features: usize, in_features: usize, rows: &[f32]) -> Self {
        assert_eq!(rows.len(), out_features * in_features, "a matrix needs out x in values");
        let panels = Panels::Bf16(Arc::new(pack_pairs(in_features, rows, bf16::from_f32)));
        Self { out_features, in_features, inputs: WeightDtype::F32, panels }
    }

    /// Packs rows that are made of blocks, as they are: nothing is rounded.
    ///
    /// # Panics
    ///
    /// If `in_features` isn't a multiple of [`BLOCK`], or `rows` has other lengths than that asks for.
    pub fn from_blocks(out_features: usize, in_features: usize, rows: &BlockRows) -> Self {
        assert!(in_features.is_multiple_of(BLOCK), "rows are whole blocks");
        let runs = out_features * (in_features / rows.bits.run());
        let lengths = (rows.codes.len(), rows.scales.len(), rows.offsets.len());
        assert_eq!(lengths, (out_features * in_features, runs, runs), "a matrix needs out x in codes");
        let panels = match rows.bits {
            CodeBits::Four => Panels::FourBits(Arc::new(pack_blocks(out_features, in_features, rows))),
            CodeBits::Five => Panels::FiveBits(Arc::new(pack_blocks(out_features, in_features, rows))),
            CodeBits::Six => Panels::SixBits(Arc::new(pack_blocks(out_features, in_features, rows))),
            CodeBits::Eight => Panels::EightBits(Arc::new(pack_blocks(out_features, in_features, rows))),
        };
        Self { out_features, in_features, inputs: WeightDtype::F32, panels }
    }

    /// Number of outputs.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// What the weights were rounded to when they were packed.
    pub fn dtype(&self) -> WeightDtype {
        match &self.panels {
            Panels::Bf16(_) => WeightDtype::Bf16,
            _ => WeightDtype::F32,
        }
    }

    /// Whether rows are rounded to bf16 before they are multiplied with it.
    pub(super) fn rounds_inputs(&self) -> bool {
        self.inputs == WeightDtype::Bf16
    }

    /// Whether both are the same weights in memory, as a tied head and its embedding.
    pub fn shares_storage(&self, other: &Self) -> bool {
        match (&self.panels, &other.panels) {
            (Panels::F32(ours), Panels::F32(theirs)) => Arc::ptr_eq(ours, theirs),
            (Panels::Bf16(ours), Panels::Bf16(theirs)) => Arc::ptr_eq(ours, theirs),
            (Panels::FourBits(ours), Panels::FourBits(theirs)) => Arc::ptr_eq(ours, theirs),
            (Panels::FiveBits(ours), Panels::FiveBits(theirs)) => Arc::ptr_eq(ours, theirs),
            (Panels::SixBits(ours), Panels::SixBits(theirs)) => Arc::ptr_eq(ours, theirs),
            (Panels::EightBits(ours), Panels::EightBits(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => false,
        }
    }

    /// Number of inputs.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Writes the weights of one output, `[in_features]`; of an embedding, one token's vector.
    ///
    /// # Panics
    ///
    /// If there is no such output, or `row` has another length.
    pub fn copy_row(&self, output: usize, row: &mut [f32]) {
        assert!(output < self.out_features, "output {output} of {}", self.out_features);
        assert_eq!(row.len(), self.in_features, "a row has one value per input");
        match self.panel(output / PANEL) {
            Panel::F32(panel) => copy_column(panel, output % PANEL, row),
            Panel::Bf16(panel) => copy_halves(panel, output % PANEL, row),
            Panel::FourBits(blocks) => copy_coded(blocks, output % PANEL, row),
            Panel::FiveBits(blocks) => copy_coded(blocks, output % PANEL, row),
            Panel::SixBits(blocks) => copy_coded(blocks, output % PANEL, row),
            Panel::EightBits(blocks) => copy_coded(blocks, output % PANEL, row),
        }
    }

    /// [`bytes`](Self::bytes) of a matrix of numbers.
    pub fn bytes_of(out_features: usize, in_features: usize, dtype: WeightDtype) -> usize {
        let inputs = match dtype {
            WeightDtype::F32 => in_features,
            WeightDtype::Bf16 => in_features.next_multiple_of(2),
        };
        out_features.next_multiple_of(PANEL) * inputs * dtype.bytes()
    }

    /// [`bytes`](Self::bytes) of a matrix of blocks.
    pub fn bytes_of_blocks(out_features: usize, in_features: usize, bits: CodeBits) -> usize {
        let block = match bits {
            CodeBits::Four => size_of::<FourBits>(),
            CodeBits::Five => size_of::<FiveBits>(),
            CodeBits::Six => size_of::<SixBits>(),
            CodeBits::Eight => size_of::<EightBits>(),
        };
        out_features.div_ceil(PANEL) * (in_features / BLOCK) * block
    }

    /// Bytes of memory that the weights take, missing outputs included.
    pub fn bytes(&self) -> usize {
        let (outputs, inputs) = (self.out_features, self.in_features);
        match &self.panels {
            Panels::F32(_) => Self::bytes_of(outputs, inputs, WeightDtype::F32),
            Panels::Bf16(_) => Self::bytes_of(outputs, inputs, WeightDtype::Bf16),
            Panels::FourBits(_) => Self::bytes_of_blocks(outputs, inputs, CodeBits::Four),
            Panels::FiveBits(_) => Self::bytes_of_blocks(outputs, inputs, CodeBits::Five),
            Panels::SixBits(_) => Self::bytes_of_blocks(outputs, inputs, CodeBits::Six),
            Panels::EightBits(_) => Self::bytes_of_blocks(outputs, inputs, CodeBits::Eight),
        }
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.out_features.div_ceil(PANEL)
    }

    /// One panel, `[in_features, 32]`.
    pub(crate) fn panel(&self, panel: usize) -> Panel<'_> {
        self.panel_inputs(panel, 0..self.in_features)
    }

    /// Some inputs of a panel; of coded weights, whole blocks; of bf16, whole pairs.
    pub(crate) fn panel_inputs(&self, panel: usize, inputs: Range<usize>) -> Panel<'_> {
        assert!(inputs.end <= self.in_features, "inputs {inputs:?} of {}", self.in_features);
        let first = panel * self.in_features;
        let lines = first + inputs.start..first + inputs.end;
        match &self.panels {
            Panels::F32(panels) => Panel::F32(&panels[lines.start * PANEL..lines.end * PANEL]),
            Panels::Bf16(panels) => {
                assert!(inputs.start.is_multiple_of(2), "inputs from half a pair on");
                let first = panel * self.in_features.div_ceil(2);
                Panel::Bf16(flat(&panels[first + inputs.start / 2..first + inputs.end.div_ceil(2)]))
            }
            Panels::FourBits(blocks) => Panel::FourBits(&blocks[whole_blocks(lines)]),
            Panels::FiveBits(blocks) => Panel::FiveBits(&blocks[whole_blocks(lines)]),
            Panels::SixBits(blocks) => Panel::SixBits(&blocks[whole_blocks(lines)]),
            Panels::EightBits(blocks) => Panel::EightBits(&blocks[whole_blocks(lines)]),
        }
    }
}

impl Panel<'_> {
    /// Writes out the weights as f32, `[inputs, 32]`.
    pub(super) fn widen(self, weights: &mut [f32]) {
        struct Widen<'a>(Panel<'a>, &'a mut [f32]);
        impl Kernel for Widen<'_> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                match self.0 {
                    Panel::F32(panel) => self.1.copy_from_slice(panel),
                    Panel::Bf16(panel) => widen_pairs(s, panel, self.1),
                    Panel::FourBits(blocks) => write_out(s, blocks, self.1),
                    Panel::FiveBits(blocks) => write_out(s, blocks, self.1),
                    Panel::SixBits(blocks) => write_out(s, blocks, self.1),
                    Panel::EightBits(blocks) => write_out(s, blocks, self.1),
                }
            }
        }
        run(Widen(self, weights));
    }

    /// `transposed[output, input]` of the first `columns` inputs, as wide as so many columns need.
    pub(super) fn transpose(self, columns: usize, transposed: &mut [f32]) {
        match self {
            Self::F32(block) => pack_transposed(block, PANEL, columns, PANEL, transposed),
            _ => {
                let mut weights = [0.0; BLOCK * PANEL];
                self.widen(&mut weights[..columns * PANEL]);
                pack_transposed(&weights, PANEL, columns, PANEL, transposed);
            }
        }
    }
}

/// Writes out pairs as f32, the upper halves' line before the lower halves'; of an odd number of lines the last
/// has no lower halves.
#[inline(always)]
fn widen_pairs<S: Simd>(s: S, panel: &[Pair], weights: &mut [f32]) {
    for (lines, pairs) in weights.chunks_mut(2 * PANEL).zip(panel.chunks_exact(PANEL)) {
        for (half, pairs) in pairs.chunks_exact(LANES).enumerate() {
            // SAFETY: the chunk has 16 pairs, which have the size of numbers.
            let [upper, lower] = s.widen_pairs(unsafe { s.load(pairs.as_ptr().cast()) });
            s.write(&mut lines[half * LANES..], upper);
            if lines.len() > PANEL {
                s.write(&mut lines[PANEL + half * LANES..], lower);
            }
        }
    }
}

/// The blocks of some lines of panels.
fn whole_blocks(lines: Range<usize>) -> Range<usize> {
    assert!(lines.start.is_multiple_of(BLOCK) && lines.end.is_multiple_of(BLOCK), "inputs of half a block");
    lines.start / BLOCK..lines.end / BLOCK
}

/// Brings rows of blocks into the order of panels.
fn pack_blocks<C: Codes>(out_features: usize, in_features: usize, rows: &BlockRows) -> Vec<C> {
    let blocks = in_features / BLOCK;
    let mut panels = vec![C::ZERO; out_features.div_ceil(PANEL) * blocks];
    for output in 0..out_features {
        let panel = &mut panels[output / PANEL * blocks..][..blocks];
        for (i, block) in panel.iter_mut().enumerate() {
            let place = output * blocks + i;
            let runs = BLOCK / C::BITS.run();
            for run in 0..runs {
                let place = place * runs + run;
                block.set_scale(run, output % PANEL, rows.scales[place], rows.offsets[place]);
            }
            for (input, code) in rows.codes[place * BLOCK..][..BLOCK].iter().enumerate() {
                block.set_code(input, output % PANEL, *code);
            }
        }
    }
    panels
}

fn copy_coded<C: Codes>(blocks: &[C], output: usize, row: &mut [f32]) {
    for (to, block) in row.chunks_exact_mut(BLOCK).zip(blocks) {
        for (input, slot) in to.iter_mut().enumerate() {
            *slot = block.weight(input, output);
        }
    }
}

/// Brings rows into the order of panels.
fn pack(panels: &mut [f32], in_features: usize, rows: &[f32]) {
    for (output, row) in rows.chunks_exact(in_features.max(1)).enumerate() {
        let start = output / PANEL * in_features * PANEL + output % PANEL;
        for (value, slot) in row.iter().zip(panels[start..].iter_mut().step_by(PANEL)) {
            *slot = *value;
        }
    }
}

/// Brings rows into the order of panels of pairs.
fn pack_pairs(in_features: usize, rows: &[f32], round: fn(f32) -> bf16) -> Vec<PairLine> {
    let lines = in_features.div_ceil(2);
    let outputs = rows.len() / in_features.max(1);
    let mut panels = vec![PairLine([Pair::default(); PANEL]); outputs.div_ceil(PANEL) * lines];
    for (output, row) in rows.chunks_exact(in_features.max(1)).enumerate() {
        let panel = &mut panels[output / PANEL * lines..][..lines];
        for (inputs, line) in row.chunks(2).zip(panel) {
            let half = |input: usize| inputs.get(input).map_or(bf16::ZERO, |value| round(*value));
            line.0[output % PANEL] = Pair::new(half(0), half(1));
        }
    }
    panels
}

/// The weights of one output of a panel.
fn copy_column(panel: &[f32], output: usize, row: &mut [f32]) {
    for (slot, value) in row.iter_mut().zip(panel[output..].iter().step_by(PANEL)) {
        *slot = *value;
    }
}

fn copy_halves(panel: &[Pair], output: usize, row: &mut [f32]) {
    for (slots, pair) in row.chunks_mut(2).zip(panel[output..].iter().step_by(PANEL)) {
        slots.copy_from_slice(&pair.widen()[..slots.len()]);
    }
}

fn flat(lines: &[PairLine]) -> &[Pair] {
    // SAFETY: a line is 32 pairs without padding.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * PANEL) }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix [{}, {}] {}", self.out_features, self.in_features, self.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_went_in() {
        for (outputs, inputs) in [(1, 1), (31, 5), (32, 7), (33, 3), (70, 16)] {
            // Small whole numbers and their thirds: the first are exact in either type.
            let rows: Vec<f32> =
                (0..outputs * inputs).map(|i| (i % 200 + 1) as f32 / (1 + i % 2 * 2) as f32).collect();
            for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
                let matrix = Matrix::with_dtype(dtype, outputs, inputs, &rows);
                assert_eq!(matrix.dtype(), dtype);
                let mut row = vec![0.0; inputs];
                for (output, given) in rows.chunks(inputs).enumerate() {
                    matrix.copy_row(output, &mut row);
                    let expected: Vec<f32> = given.iter().map(|value| dtype.round(*value)).collect();
                    assert_eq!(row, expected);
                }
                let lines = if dtype == WeightDtype::F32 { inputs } else { inputs.next_multiple_of(2) };
                let padding = matrix.panels() * PANEL * lines - rows.len();
                let zeros = (0..matrix.panels()).map(|panel| match matrix.panel(panel) {
                    Panel::F32(values) => values.iter().filter(|value| **value == 0.0).count(),
                    Panel::Bf16(pairs) => {
                        pairs.iter().flat_map(|pair| pair.widen()).filter(|value| *value == 0.0).count()
                    }
                    _ => unreachable!("made of numbers"),
                });
                assert_eq!(zeros.sum::<usize>(), padding, "what no output fills is zero");
                assert_eq!(matrix.bytes(), (padding + rows.len()) * dtype.bytes());
            }
        }
    }
}

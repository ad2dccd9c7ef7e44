//! Weights in blocks of 32, as GGUF files hold them: `weight = code · scale + offset`.

use serde::{Deserialize, Serialize};

use super::{
    matrix::PANEL,
    simd::{LANES, Simd},
    tile::{Element, Factors},
};

/// Weights of a row that share a scale and an offset.
pub const BLOCK: usize = 32;

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodeBits {
    /// 0 to 15.
    Four,
    /// -128 to 127.
    Eight,
}

/// A row-major matrix whose rows are made of blocks.
///
/// A weight is `code · scale + offset`, rounded once: what llama.cpp and candle make of Q4_0, Q4_1 and Q8_0,
/// whose product of a short code and an f16 is exact.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockRows {
    pub bits: CodeBits,
    /// One a weight, `[out, in]`; of four bits, the value itself.
    pub codes: Vec<i8>,
    /// `[out, in / 32]`.
    pub scales: Vec<f32>,
    /// `[out, in / 32]`.
    pub offsets: Vec<f32>,
}

impl BlockRows {
    /// The value of one weight, by its place in row-major order.
    pub fn value(&self, index: usize) -> f32 {
        f32::from(self.codes[index]).mul_add(self.scales[index / BLOCK], self.offsets[index / BLOCK])
    }
}

/// 32 inputs of a panel in codes of four bits: 6 bits a weight.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct FourBits {
    scales: [f32; PANEL],
    offsets: [f32; PANEL],
    /// Of an input: output i in the low half of byte i, output 16 + i in the high half.
    codes: [[u8; LANES]; BLOCK],
}

/// 32 inputs of a panel in codes of eight bits: 10 bits a weight.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct EightBits {
    scales: [f32; PANEL],
    offsets: [f32; PANEL],
    codes: [[i8; PANEL]; BLOCK],
}

/// A block of a panel.
pub(crate) trait Codes: Copy + Element<Input = f32> {
    /// All weights zero.
    const ZERO: Self;

    fn set_scale(&mut self, output: usize, scale: f32, offset: f32);

    fn set_code(&mut self, input: usize, output: usize, code: i8);

    /// The weight of an input and an output of the block.
    fn weight(&self, input: usize, output: usize) -> f32;

    /// Scales and offsets of all outputs.
    fn scales(&self) -> (&[f32; PANEL], &[f32; PANEL]);

    /// Codes of an input and the 16 outputs of `half`, as numbers.
    fn line<S: Simd>(&self, s: S, input: usize, half: usize) -> S::V;
}

impl Codes for FourBits {
    const ZERO: Self = Self { scales: [0.0; PANEL], offsets: [0.0; PANEL], codes: [[0; LANES]; BLOCK] };

    fn set_scale(&mut self, output: usize, scale: f32, offset: f32) {
        (self.scales[output], self.offsets[output]) = (scale, offset);
    }

    fn set_code(&mut self, input: usize, output: usize, code: i8) {
        debug_assert!((0..16).contains(&code));
        self.codes[input][output % LANES] |= (code as u8) << (4 * (output / LANES));
    }

    fn weight(&self, input: usize, output: usize) -> f32 {
        let code = self.codes[input][output % LANES] >> (4 * (output / LANES)) & 15;
        f32::from(code).mul_add(self.scales[output], self.offsets[output])
    }

    #[inline(always)]
    fn scales(&self) -> (&[f32; PANEL], &[f32; PANEL]) {
        (&self.scales, &self.offsets)
    }

    #[inline(always)]
    fn line<S: Simd>(&self, s: S, input: usize, half: usize) -> S::V {
        s.read_nibbles(&self.codes[input], half)
    }
}

impl Codes for EightBits {
    const ZERO: Self = Self { scales: [0.0; PANEL], offsets: [0.0; PANEL], codes: [[0; PANEL]; BLOCK] };

    fn set_scale(&mut self, output: usize, scale: f32, offset: f32) {
        (self.scales[output], self.offsets[output]) = (scale, offset);
    }

    fn set_code(&mut self, input: usize, output: usize, code: i8) {
        self.codes[input][output] = code;
    }

    fn weight(&self, input: usize, output: usize) -> f32 {
        f32::from(self.codes[input][output]).mul_add(self.scales[output], self.offsets[output])
    }

    #[inline(always)]
    fn scales(&self) -> (&[f32; PANEL], &[f32; PANEL]) {
        (&self.scales, &self.offsets)
    }

    #[inline(always)]
    fn line<S: Simd>(&self, s: S, input: usize, half: usize) -> S::V {
        s.read_i8(&self.codes[input][half * LANES..])
    }
}

/// Adds the terms of one product, in order, to a tile's sums; `b` points to the panel's blocks, and
/// `depth` is a multiple of theirs.
///
/// # Safety
///
/// The operands must cover the tile.
#[inline(always)]
pub(super) unsafe fn chain_blocks<C: Codes, S: Simd, const R: usize, const N: usize>(
    s: S,
    sums: &mut [[S::V; N]; R],
    factors: &Factors<C>,
    row: usize,
    column: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let a_row = factors.a_row;
        let mut a = factors.a.add(row * a_row);
        let first_half = column / LANES;
        for block in 0..factors.depth / BLOCK {
            let block = &*factors.b.add(block);
            let (scales, offsets) = block.scales();
            let mut scale = [s.splat(0.0); N];
            let mut offset = [s.splat(0.0); N];
            for j in 0..N {
                let lanes = (first_half + j) * LANES;
                scale[j] = s.read(&scales[lanes..]);
                offset[j] = s.read(&offsets[lanes..]);
            }
            for input in 0..BLOCK {
                let mut b_columns = [s.splat(0.0); N];
                for j in 0..N {
                    b_columns[j] = s.fma(block.line(s, input, first_half + j), scale[j], offset[j]);
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a_element = s.splat(*a.add(i * a_row));
                    for (sum, b_column) in sums.iter_mut().zip(b_columns) {
                        *sum = s.fma(a_element, b_column, *sum);
                    }
                }
                a = a.wrapping_add(factors.a_step);
            }
        }
    }
}

/// Writes out the weights of some blocks, `[32 · blocks, 32]`.
#[inline(always)]
pub(super) fn write_out<C: Codes, S: Simd>(s: S, blocks: &[C], weights: &mut [f32]) {
    for (block, to) in blocks.iter().zip(weights.chunks_exact_mut(BLOCK * PANEL)) {
        let (scales, offsets) = block.scales();
        for half in 0..PANEL / LANES {
            let (scale, offset) = (s.read(&scales[half * LANES..]), s.read(&offsets[half * LANES..]));
            for input in 0..BLOCK {
                let line = s.fma(block.line(s, input, half), scale, offset);
                s.write(&mut to[input * PANEL + half * LANES..], line);
            }
        }
    }
}

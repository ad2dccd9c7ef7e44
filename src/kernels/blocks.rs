//! Weights in blocks of 32, as GGUF files hold them: `weight = code · scale + offset`.

use super::{
    matrix::PANEL,
    simd::{LANES, Simd},
    tile::{Element, Factors},
};

/// Weights of a row that are held together.
pub const BLOCK: usize = 32;

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CodeBits {
    /// 0 to 15.
    Four,
    /// 0 to 31.
    Five,
    /// -32 to 31, without an offset.
    Six,
    /// -128 to 127.
    Eight,
}

impl CodeBits {
    /// Weights of a row that share a scale and an offset.
    pub const fn run(self) -> usize {
        match self {
            Self::Four | Self::Five | Self::Eight => BLOCK,
            Self::Six => BLOCK / 2,
        }
    }
}

/// A row-major matrix whose rows are made of blocks.
///
/// A weight is `code · scale + offset`, rounded once: what llama.cpp and candle make of Q4_0, Q4_1 and the like,
/// whose product of a short code and an f16 is exact, and of Q6_K, whose is rounded and has nothing added.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockRows {
    pub bits: CodeBits,
    /// One a weight, `[out, in]`: the value itself.
    pub codes: Vec<i8>,
    /// `[out, in / run]`, with the [run](CodeBits::run) of `bits`.
    pub scales: Vec<f32>,
    /// `[out, in / run]`; of six bits, zeros.
    pub offsets: Vec<f32>,
}

impl BlockRows {
    /// The value of one weight, by its place in row-major order.
    pub fn value(&self, index: usize) -> f32 {
        let run = index / self.bits.run();
        f32::from(self.codes[index]).mul_add(self.scales[run], self.offsets[run])
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

/// A bit of each of 32 outputs' codes, of one input.
type Plane = u32;

/// 32 inputs of a panel in codes of five bits: 7 bits a weight.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct FiveBits {
    scales: [f32; PANEL],
    offsets: [f32; PANEL],
    /// As of [`FourBits`].
    low: [[u8; LANES]; BLOCK],
    /// Worth 16.
    high: [Plane; BLOCK],
}

/// 32 inputs of a panel in codes of six bits, in two's complement, with a scale for 16 of them: 8 bits a weight.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct SixBits {
    scales: [[f32; PANEL]; 2],
    /// As of [`FourBits`].
    low: [[u8; LANES]; BLOCK],
    /// Worth 16.
    high: [Plane; BLOCK],
    /// Worth -32.
    sign: [Plane; BLOCK],
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

    const BITS: CodeBits;

    fn set_scale(&mut self, run: usize, output: usize, scale: f32, offset: f32);

    fn set_code(&mut self, input: usize, output: usize, code: i8);

    fn code(&self, input: usize, output: usize) -> i8;

    /// Scales and offsets of all outputs for a [run](CodeBits::run) of inputs.
    fn scales(&self, run: usize) -> (&[f32; PANEL], &[f32; PANEL]);

    /// Codes of an input and the 16 outputs of `half`, as numbers.
    fn line<S: Simd>(&self, s: S, input: usize, half: usize) -> S::V;

    /// The weight of an input and an output of the block.
    fn weight(&self, input: usize, output: usize) -> f32 {
        let (scales, offsets) = self.scales(input / Self::BITS.run());
        f32::from(self.code(input, output)).mul_add(scales[output], offsets[output])
    }
}

const ZEROS: [f32; PANEL] = [0.0; PANEL];

/// Sets the low half of a code.
fn set_nibble(low: &mut [[u8; LANES]; BLOCK], input: usize, output: usize, code: i8) {
    low[input][output % LANES] |= (code as u8 & 15) << (4 * (output / LANES));
}

fn nibble(low: &[[u8; LANES]; BLOCK], input: usize, output: usize) -> i8 {
    (low[input][output % LANES] >> (4 * (output / LANES)) & 15) as i8
}

/// Sets an output's bit to bit `bit` of its code.
fn set_bit(plane: &mut Plane, output: usize, code: i8, bit: u32) {
    *plane |= Plane::from(code as u8 >> bit & 1) << output;
}

fn bit(plane: Plane, output: usize) -> i8 {
    (plane >> output & 1) as i8
}

/// A plane's bits of 16 outputs.
#[inline(always)]
fn half_of(plane: Plane, half: usize) -> u16 {
    (plane >> (LANES * half)) as u16
}

impl Codes for FourBits {
    const ZERO: Self = Self { scales: ZEROS, offsets: ZEROS, codes: [[0; LANES]; BLOCK] };

    const BITS: CodeBits = CodeBits::Four;

    fn set_scale(&mut self, _: usize, output: usize, scale: f32, offset: f32) {
        (self.scales[output], self.offsets[output]) = (scale, offset);
    }

    fn set_code(&mut self, input: usize, output: usize, code: i8) {
        debug_assert!((0..16).contains(&code));
        set_nibble(&mut self.codes, input, output, code);
    }

    fn code(&self, input: usize, output: usize) -> i8 {
        nibble(&self.codes, input, output)
    }

    #[inline(always)]
    fn scales(&self, _: usize) -> (&[f32; PANEL], &[f32; PANEL]) {
        (&self.scales, &self.offsets)
    }

    #[inline(always)]
    fn line<S: Simd>(&self, s: S, input: usize, half: usize) -> S::V {
        s.read_nibbles(&self.codes[input], half)
    }
}

impl Codes for FiveBits {
    const ZERO: Self = Self { scales: ZEROS, offsets: ZEROS, low: [[0; LANES]; BLOCK], high: [0; BLOCK] };

    const BITS: CodeBits = CodeBits::Five;

    fn set_scale(&mut self, _: usize, output: usize, scale: f32, offset: f32) {
        (self.scales[output], self.offsets[output]) = (scale, offset);
    }

    fn set_code(&mut self, input: usize, output: usize, code: i8) {
        debug_assert!((0..32).contains(&code));
        set_nibble(&mut self.low, input, output, code);
        set_bit(&mut self.high[input], output, code, 4);
    }

    fn code(&self, input: usize, output: usize) -> i8 {
        nibble(&self.low, input, output) + 16 * bit(self.high[input], output)
    }

    #[inline(always)]
    fn scales(&self, _: usize) -> (&[f32; PANEL], &[f32; PANEL]) {
        (&self.scales, &self.offsets)
    }

    #[inline(always)]
    fn line<S: Simd>(&self, s: S, input: usize, half: usize) -> S::V {
        let low = s.read_nibbles(&self.low[input], half);
        s.add_where(half_of(self.high[input], half), low, 16.0)
    }
}

impl Codes for SixBits {
    const ZERO: Self =
        Self { scales: [ZEROS; 2], low: [[0; LANES]; BLOCK], high: [0; BLOCK], sign: [0; BLOCK] };

    const BITS: CodeBits = CodeBits::Six;

    fn set_scale(&mut self, run: usize, output: usize, scale: f32, offset: f32) {
        debug_assert_eq!(offset, 0.0);
        self.scales[run][output] = scale;
    }

    fn set_code(&mut self, input: usize, output: usize, code: i8) {
        debug_assert!((-32..32).contains(&code));
        set_nibble(&mut self.low, input, output, code);
        set_bit(&mut self.high[input], output, code, 4);
        set_bit(&mut self.sign[input], output, code, 5);
    }

    fn code(&self, input: usize, output: usize) -> i8 {
        let low = nibble(&self.low, input, output);
        low + 16 * bit(self.high[input], output) - 32 * bit(self.sign[input], output)
    }

    #[inline(always)]
    fn scales(&self, run: usize) -> (&[f32; PANEL], &[f32; PANEL]) {
        (&self.scales[run], &ZEROS)
    }

    #[inline(always)]
    fn line<S: Simd>(&self, s: S, input: usize, half: usize) -> S::V {
        let low = s.read_nibbles(&self.low[input], half);
        let high = s.add_where(half_of(self.high[input], half), low, 16.0);
        s.add_where(half_of(self.sign[input], half), high, -32.0)
    }
}

impl Codes for EightBits {
    const ZERO: Self = Self { scales: ZEROS, offsets: ZEROS, codes: [[0; PANEL]; BLOCK] };

    const BITS: CodeBits = CodeBits::Eight;

    fn set_scale(&mut self, _: usize, output: usize, scale: f32, offset: f32) {
        (self.scales[output], self.offsets[output]) = (scale, offset);
    }

    fn set_code(&mut self, input: usize, output: usize, code: i8) {
        self.codes[input][output] = code;
    }

    fn code(&self, input: usize, output: usize) -> i8 {
        self.codes[input][output]
    }

    #[inline(always)]
    fn scales(&self, _: usize) -> (&[f32; PANEL], &[f32; PANEL]) {
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
            let run = C::BITS.run();
            for place in 0..BLOCK / run {
                let (scales, offsets) = block.scales(place);
                let mut scale = [s.splat(0.0); N];
                let mut offset = [s.splat(0.0); N];
                for j in 0..N {
                    let lanes = (first_half + j) * LANES;
                    scale[j] = s.read(&scales[lanes..]);
                    offset[j] = s.read(&offsets[lanes..]);
                }
                for input in place * run..(place + 1) * run {
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
}

/// Writes out the weights of some blocks, `[32 · blocks, 32]`.
#[inline(always)]
pub(super) fn write_out<C: Codes, S: Simd>(s: S, blocks: &[C], weights: &mut [f32]) {
    for (block, to) in blocks.iter().zip(weights.chunks_exact_mut(BLOCK * PANEL)) {
        let run = C::BITS.run();
        for (place, half) in (0..BLOCK / run).flat_map(|place| [(place, 0), (place, 1)]) {
            let (scales, offsets) = block.scales(place);
            let (scale, offset) = (s.read(&scales[half * LANES..]), s.read(&offsets[half * LANES..]));
            for input in place * run..(place + 1) * run {
                let line = s.fma(block.line(s, input, half), scale, offset);
                s.write(&mut to[input * PANEL + half * LANES..], line);
            }
        }
    }
}

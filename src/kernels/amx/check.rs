//! Whether tiles compute what the path's bits are defined as.

use super::{Emulated, SIDE, TWO, Tiles, in_tiles};
use crate::kernels::{
    pair::Pair,
    tile::{Block, Factors, Start},
};

/// Blocks of every kind of numbers and edges: some milliseconds, once a process.
const BLOCKS: u64 = 14;

/// What the operands of a block are like.
#[derive(Debug, Clone, Copy)]
enum Numbers {
    /// Up to two and not much less: every sum is rounded.
    Plain,
    /// Of very different sizes, so that each order and place of a rounding gives other bits.
    Uneven,
    /// Small whole numbers: exact, with sums of zero.
    Whole,
    /// Products, and outputs, around the smallest normal number: what is subnormal becomes zero.
    Tiny,
    /// Products around the largest number, and so infinities and what is no number.
    Huge,
    /// Any bits.
    Any,
}

const NUMBERS: [Numbers; 6] =
    [Numbers::Plain, Numbers::Uneven, Numbers::Whole, Numbers::Tiny, Numbers::Huge, Numbers::Any];

/// Computes blocks on `tiles` and emulated; the first difference is the error.
pub(super) fn agrees<T: Tiles>(tiles: &mut T) -> Result<(), String> {
    for seed in 0..BLOCKS {
        let numbers = NUMBERS[seed as usize % NUMBERS.len()];
        // Two tiles of rows and columns and one of fewer; two whole steps and a shorter one.
        let (rows, columns) = if seed % 2 == 0 { (TWO + 5, TWO - 3) } else { (SIDE - 3, SIDE - 7) };
        let (pairs, c_row) = (2 * SIDE + 3, TWO + 1);
        let mut random = Random(seed);
        let a: Vec<Pair> = (0..rows * pairs).map(|_| random.pair(numbers)).collect();
        let b: Vec<Pair> = (0..pairs * TWO).map(|_| random.pair(numbers)).collect();
        let outputs: Vec<f32> = (0..rows * c_row).map(|_| random.output(numbers)).collect();
        let (mut found, mut expected) = (outputs.clone(), outputs);
        let block = |c: &mut Vec<f32>| Block {
            rows,
            columns,
            product: Factors {
                a: a.as_ptr(),
                a_row: pairs,
                a_step: 1,
                b: b.as_ptr(),
                b_step: TWO,
                depth: pairs,
            },
            second: None,
            c: c.as_mut_ptr(),
            c_row,
            start: if seed % 3 == 0 { Start::Zero } else { Start::Stored },
        };
        // SAFETY: the operands have the sizes that the block says, and C is this function's own.
        unsafe {
            in_tiles(tiles, &block(&mut found));
            in_tiles(&mut Emulated::default(), &block(&mut expected));
        }
        let alike = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        if let Some(place) = found.iter().zip(&expected).position(|pair| !alike(pair)) {
            let (row, column) = (place / c_row, place % c_row);
            return Err(format!(
                "{numbers:?} numbers, seed {seed}: output [{row}, {column}] is {:08x} and not {:08x}",
                found[place].to_bits(),
                expected[place].to_bits()
            ));
        }
    }
    Ok(())
}

/// Numbers that look random: splitmix64.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 32) as u32
    }

    /// A number of random digits whose exponent is one of `count` from `first` on.
    fn with_exponent(&mut self, first: i32, count: u32) -> f32 {
        let bits = self.bits();
        f32::from_bits(bits & 0x807f_ffff | ((127 + first) as u32 + self.bits() % count) << 23)
    }

    fn operand(&mut self, numbers: Numbers) -> f32 {
        match numbers {
            Numbers::Plain => self.with_exponent(-5, 6),
            Numbers::Uneven => self.with_exponent(-12, 24),
            Numbers::Whole => (self.bits() % 7) as f32 - 3.0,
            Numbers::Tiny => self.with_exponent(-66, 6),
            Numbers::Huge => self.with_exponent(60, 4),
            Numbers::Any => f32::from_bits(self.bits()),
        }
    }

    fn pair(&mut self, numbers: Numbers) -> Pair {
        // Cut off, not rounded: any upper half is a bf16.
        let half = |value: f32| half::bf16::from_bits((value.to_bits() >> 16) as u16);
        let (upper, lower) = (self.operand(numbers), self.operand(numbers));
        Pair::new(half(upper), half(lower))
    }

    fn output(&mut self, numbers: Numbers) -> f32 {
        match numbers {
            Numbers::Tiny => f32::from_bits(self.bits() & 0x81ff_ffff),
            Numbers::Huge => self.with_exponent(120, 8),
            _ => self.operand(numbers),
        }
    }
}

//! Tiles in plain memory: the definition of the path's bits.

use super::{SIDE, Shape, Tiles};

/// Eight tiles as `TDPBF16PS`'s pseudocode has them (Intel SDM, volume 2, "TDPBF16PS"; Bochs computes the same).
///
/// Subnormal operands are zero, and a subnormal result becomes zero. Numbers that are no NaN have the instruction's
/// bits, but for one corner: a fused sum that lies so close below 2⁻¹²⁶ that it is rounded to that. Operands of
/// [`round_weight`](crate::kernels::pair::round_weight) and its like have no such sums.
#[derive(Default)]
pub(super) struct Emulated {
    shape: Option<Shape>,
    pub(super) tiles: [[[u32; SIDE]; SIDE]; 8],
}

impl Emulated {
    /// Rows and columns of a tile that is used.
    pub(super) fn shape(&self, tile: u8) -> (usize, usize) {
        let (rows, columns) = self.shape.expect("tiles are configured").of(tile.into());
        assert!(rows > 0, "tile {tile} is used");
        (rows, columns)
    }
}

impl Tiles for Emulated {
    fn configure(&mut self, shape: &Shape) {
        *self = Self { shape: Some(*shape), ..Self::default() };
    }

    fn zero<const T: u8>(&mut self) {
        self.shape(T);
        self.tiles[usize::from(T)] = Default::default();
    }

    unsafe fn load<const T: u8>(&mut self, from: *const u32, step: usize) {
        let (rows, columns) = self.shape(T);
        let tile = &mut self.tiles[usize::from(T)];
        *tile = Default::default();
        for (row, to) in tile.iter_mut().enumerate().take(rows) {
            for (column, to) in to.iter_mut().enumerate().take(columns) {
                // SAFETY: the caller's promise, that the tile's rows are readable.
                *to = unsafe { from.byte_add(row * step).add(column).read_unaligned() };
            }
        }
    }

    unsafe fn store<const T: u8>(&mut self, to: *mut u32, step: usize) {
        let (rows, columns) = self.shape(T);
        for (row, from) in self.tiles[usize::from(T)].iter().enumerate().take(rows) {
            for (column, from) in from.iter().enumerate().take(columns) {
                // SAFETY: the caller's promise, that the tile's rows are writable.
                unsafe { to.byte_add(row * step).add(column).write_unaligned(*from) };
            }
        }
    }

    fn dot<const C: u8, const A: u8, const B: u8>(&mut self) {
        let ((rows, columns), (_, pairs)) = (self.shape(C), self.shape(A));
        assert_eq!((self.shape(A).0, self.shape(B)), (rows, (pairs, columns)), "tiles fit each other");
        for row in 0..rows {
            let a_row = self.tiles[usize::from(A)][row];
            let mut halves = [[0.0f32; SIDE]; 2];
            for (a, b_row) in a_row.iter().zip(&self.tiles[usize::from(B)]).take(pairs) {
                for (half, sums) in halves.iter_mut().enumerate() {
                    let a = number(widened(*a, half));
                    for (sum, b) in sums.iter_mut().zip(b_row) {
                        *sum = flushed(a.mul_add(number(widened(*b, half)), *sum));
                    }
                }
            }
            let [lower, upper] = halves;
            for (column, c) in self.tiles[usize::from(C)][row].iter_mut().enumerate().take(columns) {
                let sum = flushed(lower[column] + upper[column]);
                *c = flushed(number(*c) + sum).to_bits();
            }
        }
    }

    fn release(&mut self) {
        self.shape = None;
    }
}

/// Bits of the lower (0) or the upper half of a pair as f32.
pub(super) fn widened(pair: u32, half: usize) -> u32 {
    if half == 0 { pair << 16 } else { pair & 0xffff_0000 }
}

/// An operand (DAZ).
fn number(bits: u32) -> f32 {
    flushed(f32::from_bits(bits))
}

/// A result (FTZ): zeros keep their sign.
fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

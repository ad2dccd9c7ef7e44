//! Everything but the instructions: against their definition written out, f64, and units that compute otherwise.

use proptest::prelude::*;

use super::{Emulated, Shape, Tiles, check, emulation, in_tiles};
use crate::kernels::{
    pair::{Pair, round_input},
    tests::{chain_of_tiles, noise},
    tile::{Block, Factors, Start},
};

/// Numbers that are bf16, of several sizes.
fn operands(seed: u64, len: usize) -> Vec<f32> {
    let sizes = noise(seed + 1, len).into_iter().map(|value| (4.0 * value).exp2());
    noise(seed, len).into_iter().zip(sizes).map(|(value, size)| round_input(value * size)).collect()
}

/// Rows of numbers as rows of pairs.
fn pairs(values: &[f32], depth: usize) -> Vec<Pair> {
    let half = |value: f32| half::bf16::from_f32(value);
    let row = |row: &[f32]| {
        row.chunks(2)
            .map(|two| Pair::new(half(two[0]), half(two.get(1).copied().unwrap_or(0.0))))
            .collect::<Vec<_>>()
    };
    values.chunks(depth.max(1)).flat_map(row).collect()
}

/// A product of so many rows and columns, in a C that is wider.
struct Product {
    rows: usize,
    columns: usize,
    depth: usize,
    start: Start,
    /// `[rows, depth]`
    x: Vec<f32>,
    /// `[32, depth]`
    w: Vec<f32>,
    /// `[rows, C_ROW]`
    before: Vec<f32>,
}

const C_ROW: usize = 35;

impl Product {
    fn new(rows: usize, columns: usize, depth: usize, start: Start) -> Self {
        let (x, w) = (operands(1, rows * depth), operands(3, 32 * depth));
        Self { rows, columns, depth, start, x, w, before: noise(5, rows * C_ROW) }
    }

    /// What C is behind it.
    fn in_tiles<T: Tiles>(&self, tiles: &mut T) -> Vec<f32> {
        let lines = self.depth.div_ceil(2);
        let a = pairs(&self.x, self.depth);
        let by_output = pairs(&self.w, self.depth);
        let b: Vec<Pair> = (0..lines * 32).map(|place| by_output[place % 32 * lines + place / 32]).collect();
        let mut c = self.before.clone();
        let (a, b) = (a.as_ptr(), b.as_ptr());
        let product = Factors { a, a_row: lines, a_step: 1, b, b_step: 32, depth: lines };
        let (rows, columns, start, to) = (self.rows, self.columns, self.start, c.as_mut_ptr());
        // SAFETY: the operands have these sizes.
        unsafe {
            in_tiles(tiles, &Block { rows, columns, product, second: None, c: to, c_row: C_ROW, start });
        }
        c
    }

    /// C with each of its elements from `output(x, w, start)`.
    fn expected(&self, output: impl Fn(&[f32], &[f32], f32) -> f32) -> Vec<f32> {
        let mut c = self.before.clone();
        for (row, c) in c.chunks_exact_mut(C_ROW).enumerate() {
            for (column, c) in c.iter_mut().enumerate().take(self.columns) {
                let start = if self.start == Start::Zero { 0.0 } else { *c };
                let (x, w) = (&self.x[row * self.depth..], &self.w[column * self.depth..]);
                *c = output(&x[..self.depth], &w[..self.depth], start);
            }
        }
        c
    }

    fn has_the_bits_of_its_definition(&self) {
        let found = self.in_tiles(&mut Emulated::default());
        let expected = self.expected(chain_of_tiles);
        let place = found.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits());
        let Self { rows, columns, depth, .. } = self;
        assert_eq!(place, None, "place in C of {rows} x {columns}, {depth} terms");
    }
}

#[test]
fn every_number_of_rows_and_columns_has_the_bits_of_the_definition() {
    for (rows, columns) in
        (1..=70).map(|rows| (rows, 1 + rows * 7 % 32)).chain([(64, 32), (16, 16), (32, 17)])
    {
        Product::new(rows, columns, 77, Start::Zero).has_the_bits_of_its_definition();
    }
}

#[test]
fn every_number_of_terms_has_the_bits_of_the_definition() {
    for depth in 0..=70 {
        for start in [Start::Zero, Start::Stored] {
            Product::new(3, 20, depth, start).has_the_bits_of_its_definition();
        }
    }
    // More than stay in a first-level cache, in parts of several sizes.
    for depth in [384, 385, 800, 1_700] {
        Product::new(50, 32, depth, Start::Stored).has_the_bits_of_its_definition();
    }
}

#[test]
fn a_row_has_the_same_bits_among_any_rows() {
    let all = Product::new(67, 32, 900, Start::Zero);
    let together = all.in_tiles(&mut Emulated::default());
    for row in [0, 15, 16, 31, 32, 66] {
        let alone = Product {
            rows: 1,
            x: all.x[row * 900..][..900].to_vec(),
            w: all.w.clone(),
            before: all.before[row * C_ROW..][..C_ROW].to_vec(),
            ..all
        };
        assert_eq!(alone.in_tiles(&mut Emulated::default()), together[row * C_ROW..][..C_ROW], "row {row}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Each rounding is at most half a unit in the last place of a sum that is at most the sum of sizes; behind a
    /// term come at most as many as there are terms in its chain, of steps, and one of the two chains.
    #[test]
    fn random_blocks_are_near_f64(rows in 1usize..40, columns in 1usize..=32, depth in 1usize..300, zero: bool) {
        let product = Product::new(rows, columns, depth, if zero { Start::Zero } else { Start::Stored });
        let found = product.in_tiles(&mut Emulated::default());
        let roundings = (16 + 1 + depth.div_ceil(32)) as f64;
        for row in 0..rows {
            for column in 0..C_ROW {
                let (place, before) = (row * C_ROW + column, f64::from(product.before[row * C_ROW + column]));
                if column >= columns {
                    prop_assert_eq!(f64::from(found[place]), before);
                    continue;
                }
                let terms = product.x[row * depth..][..depth].iter().zip(&product.w[column * depth..]);
                let terms = terms.map(|(x, w)| f64::from(*x) * f64::from(*w));
                let start = if zero { 0.0 } else { before };
                let (sum, size) = terms.fold((start, start.abs()), |(sum, size), term| (sum + term, size + term.abs()));
                let error = (f64::from(found[place]) - sum).abs();
                prop_assert!(error <= 1.01 * roundings * size * f64::from(f32::EPSILON) / 2.0, "{} of {}", error, size);
            }
        }
    }
}

/// What tells the instruction from the chain of `vdpbf16ps`, and what becomes of subnormal numbers, by hand.
#[test]
fn a_step_is_two_chains_from_zero_that_are_added_to_the_output() {
    let one = |x: [f32; 4], w: [f32; 4], start: f32| {
        let product = Product {
            rows: 1,
            columns: 1,
            depth: 4,
            start: Start::Stored,
            x: x.to_vec(),
            w: [w.to_vec(), vec![0.0; 31 * 4]].concat(),
            before: [vec![start], vec![0.0; C_ROW - 1]].concat(),
        };
        product.in_tiles(&mut Emulated::default())[0]
    };
    // Half a unit in the last place of the output, twice: lost one by one, together it counts.
    let (half, ones) = (f32::EPSILON / 2.0, [1.0; 4]);
    assert_eq!(one([half, half, 0.0, 0.0], ones, 1.0), 1.0 + f32::EPSILON);
    assert_eq!(crate::kernels::tests::chain_of_tiles(&[half, half], &[1.0, 1.0], 1.0), 1.0 + f32::EPSILON);
    // The even terms cancel before the odd one, much smaller, is added.
    assert_eq!(one([2f32.powi(60), 1.0, -2f32.powi(60), 0.0], ones, 0.0), 1.0);
    assert_eq!(one([2f32.powi(60), -2f32.powi(60), 1.0, 0.0], ones, 0.0), 0.0);
    // Zeros: subnormal operands, products, outputs that it starts from, and what is left of normal numbers.
    let (tiny, normal) = (f32::from_bits(0x0040_0000), f32::MIN_POSITIVE);
    assert_eq!(one([tiny, 0.0, 0.0, 0.0], [2f32.powi(100), 0.0, 0.0, 0.0], 0.0), 0.0);
    assert_eq!(one([2f32.powi(-64), 0.0, 0.0, 0.0], [2f32.powi(-63), 0.0, 0.0, 0.0], 0.0), 0.0);
    assert_eq!(one([0.0; 4], ones, tiny).to_bits(), 0);
    assert_eq!(one([1.5 * normal, 0.0, -normal, 0.0], ones, 0.0), 0.0);
    assert_eq!(one([1.5 * normal, 0.0, -normal, 0.0], ones, normal), normal);
    assert!(one([f32::INFINITY, f32::NEG_INFINITY, 0.0, 0.0], ones, 0.0).is_nan());
    assert_eq!(one([f32::INFINITY, 1.0, 0.0, 0.0], ones, 0.0), f32::INFINITY);
}

/// A unit that goes wrong in one place.
#[derive(Default)]
struct Faulty {
    tiles: Emulated,
    fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
enum Fault {
    #[default]
    None,
    /// The order of `vdpbf16ps`.
    OneChain,
    KeepsSubnormals,
    /// A load leaves the last row out.
    ForgetsARow,
    /// A tile has more columns than it was given.
    WritesBeyond,
    /// The lower right outputs get the upper rows.
    TakesOtherRows,
}

impl Tiles for Faulty {
    fn configure(&mut self, shape: &Shape) {
        let mut shape = *shape;
        if self.fault == Fault::WritesBeyond {
            shape.columns[0] = 16;
        }
        self.tiles.configure(&shape);
    }

    fn zero<const T: u8>(&mut self) {
        self.tiles.zero::<T>();
    }

    unsafe fn load<const T: u8>(&mut self, from: *const u32, step: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.tiles.load::<T>(from, step) };
        if self.fault == Fault::ForgetsARow && T >= 6 {
            let (rows, _) = self.tiles.shape(T);
            self.tiles.tiles[usize::from(T)][rows - 1] = Default::default();
        }
    }

    unsafe fn store<const T: u8>(&mut self, to: *mut u32, step: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.tiles.store::<T>(to, step) };
    }

    fn dot<const C: u8, const A: u8, const B: u8>(&mut self) {
        if self.fault == Fault::TakesOtherRows && C == 3 {
            return self.tiles.dot::<3, 4, 7>();
        }
        let subnormals = self.fault == Fault::KeepsSubnormals;
        if !subnormals && self.fault != Fault::OneChain {
            return self.tiles.dot::<C, A, B>();
        }
        let ((rows, columns), (_, pairs)) = (self.tiles.shape(C), self.tiles.shape(A));
        let [a, b] = [A, B].map(|tile| self.tiles.tiles[usize::from(tile)]);
        for row in 0..rows {
            for column in 0..columns {
                let c = &mut self.tiles.tiles[usize::from(C)][row][column];
                let terms = (0..pairs).flat_map(|k| [1, 0].map(|half| (k, half)));
                let term = |k: usize, half| {
                    let value = |bits| f32::from_bits(emulation::widened(bits, half));
                    (value(a[row][k]), value(b[k][column]))
                };
                *c = match subnormals {
                    false => terms.fold(f32::from_bits(*c), |sum, (k, half)| {
                        let (a, b) = term(k, half);
                        a.mul_add(b, sum)
                    }),
                    true => {
                        let chain = |half| {
                            (0..pairs).fold(0.0f32, |sum, k| {
                                let (a, b) = term(k, half);
                                a.mul_add(b, sum)
                            })
                        };
                        f32::from_bits(*c) + (chain(0) + chain(1))
                    }
                }
                .to_bits();
            }
        }
    }

    fn release(&mut self) {
        self.tiles.release();
    }
}

#[test]
fn a_unit_that_computes_otherwise_is_found_out() {
    let with = |fault| check::agrees(&mut Faulty { fault, ..Faulty::default() });
    assert_eq!(with(Fault::None), Ok(()));
    for fault in [
        Fault::OneChain,
        Fault::KeepsSubnormals,
        Fault::ForgetsARow,
        Fault::WritesBeyond,
        Fault::TakesOtherRows,
    ] {
        assert!(with(fault).is_err(), "{fault:?}");
    }
    assert!(with(Fault::OneChain).unwrap_err().starts_with("Plain numbers, seed 0: output ["));
}

#[test]
fn shapes_leave_out_what_a_block_does_not_have() {
    let all = |shape: Shape| [0, 1, 2, 3, 4, 5, 6, 7].map(|tile| shape.of(tile));
    assert_eq!(all(Shape::new(100, 32, 16)), [(16, 16); 8]);
    assert_eq!(all(Shape::new(21, 9, 3)), [(16, 9), (0, 0), (5, 9), (0, 0), (16, 3), (5, 3), (3, 9), (0, 0)]);
    assert_eq!(
        all(Shape::new(1, 32, 16)),
        [(1, 16), (1, 16), (0, 0), (0, 0), (1, 16), (0, 0), (16, 16), (16, 16)]
    );
}

/// Intel SDM, volume 1, the table of `LDTILECFG`'s operand.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn a_configuration_has_the_layout_of_palette_one() {
    let config = super::unit::Config::of(&Shape::new(21, 25, 3));
    // SAFETY: it is 64 bytes without padding.
    let bytes = unsafe { std::mem::transmute::<super::unit::Config, [u8; 64]>(config) };
    let mut expected = [0; 64];
    expected[0] = 1;
    for (tile, (rows, row_bytes)) in
        [(16, 64), (16, 36), (5, 64), (5, 36), (16, 12), (5, 12), (3, 64), (3, 36)].into_iter().enumerate()
    {
        expected[16 + 2 * tile] = row_bytes;
        expected[48 + tile] = rows;
    }
    assert_eq!(bytes, expected);
}

/// Where there are tiles they were compared already, when the path was chosen.
#[test]
fn a_unit_is_used_only_if_it_agrees() {
    let is_offered = crate::kernels::paths().contains(&"amx_bf16");
    match super::amx() {
        None => assert!(!is_offered, "this CPU has no AMX"),
        Some(Ok(())) => assert!(is_offered),
        Some(Err(reason)) => assert!(!is_offered && !reason.is_empty(), "{reason}"),
    }
}

//! The one matrix product under all others: a block of `C = A·B`, `C` at most 32 columns wide.
//!
//! Each element of `C` is one chain of fused products in the order of the reduction, held in one
//! lane of one register from its first term to its last (or parked in memory between two calls,
//! which loses nothing). It follows that its bits depend on its row of `A` and its column of `B`
//! alone: not on the number of rows, on how the work is split, nor on the kernel path.
//!
//! ```text
//!                      B   depth x columns, rows b_step apart, 16 or 32 columns readable
//! A   rows x depth     C   rows x columns, rows c_row apart
//! element (i, k) of A is at i·a_row + k·a_step: either order of A is fine
//! ```

use super::{
    amx,
    blocks::{EightBits, FiveBits, FourBits, SixBits, chain_blocks},
    pair::Pair,
    simd::{Kernel, LANES, Simd, has_tiles, run, run_dot},
};

/// A product's operands; `B` is made of `E`, widened to f32 as it is read. Of pairs, `depth` counts the pairs.
#[derive(Clone, Copy)]
pub(super) struct Factors<E: Element = f32> {
    pub a: *const E::Input,
    pub a_row: usize,
    pub a_step: usize,
    pub b: *const E,
    pub b_step: usize,
    pub depth: usize,
}

/// What a block of `C` starts from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Zero,
    /// The chain goes on from the values that `C` has.
    Stored,
}

/// A block of `C = A·B`, or `C = A·B + A'·B'` if there is a second product.
#[derive(Clone, Copy)]
pub(super) struct Block<E: Element = f32> {
    pub rows: usize,
    /// At most 32.
    pub columns: usize,
    pub product: Factors<E>,
    /// Continues each element's chain: the low-rank part of an adapted layer.
    pub second: Option<Factors>,
    pub c: *mut f32,
    pub c_row: usize,
    pub start: Start,
}

impl<E: Element> Block<E> {
    /// Computes the block.
    ///
    /// # Safety
    ///
    /// `A` must be readable at all its elements, each row of `B` for 16 values if there are at
    /// most 16 columns and else for 32, and `C` writable at all its elements (and readable if
    /// the block starts from them). Nobody else may touch `C` meanwhile.
    pub(super) unsafe fn compute(self) {
        debug_assert!(self.columns <= 2 * LANES);
        // SAFETY: the caller's promise.
        unsafe { E::compute(self) }
    }
}

impl<E: Element> Kernel for Block<E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut column = 0;
        while column < self.columns {
            let vectors = if S::TILE_ROWS[1] > 0 && self.columns - column > LANES { 2 } else { 1 };
            let mut row = 0;
            while row < self.rows {
                let rows = (self.rows - row).min(S::TILE_ROWS[vectors - 1]);
                // SAFETY: the promise of `compute`, the only way here: the tile lies in the block.
                unsafe {
                    match vectors {
                        2 => dispatch_rows::<S, E, 2>(s, &self, row, column, rows),
                        _ => dispatch_rows::<S, E, 1>(s, &self, row, column, rows),
                    }
                }
                row += rows;
            }
            column += vectors * LANES;
        }
    }
}

/// Calls the tile that has so many rows.
#[inline(always)]
unsafe fn dispatch_rows<S: Simd, E: Element, const N: usize>(
    s: S,
    block: &Block<E>,
    row: usize,
    column: usize,
    rows: usize,
) {
    // SAFETY: the caller's promise, that the tile lies in the block.
    unsafe {
        match rows {
            1 => tile::<S, E, 1, N>(s, block, row, column),
            2 => tile::<S, E, 2, N>(s, block, row, column),
            3 => tile::<S, E, 3, N>(s, block, row, column),
            4 => tile::<S, E, 4, N>(s, block, row, column),
            5 => tile::<S, E, 5, N>(s, block, row, column),
            6 => tile::<S, E, 6, N>(s, block, row, column),
            7 => tile::<S, E, 7, N>(s, block, row, column),
            8 => tile::<S, E, 8, N>(s, block, row, column),
            9 => tile::<S, E, 9, N>(s, block, row, column),
            10 => tile::<S, E, 10, N>(s, block, row, column),
            11 => tile::<S, E, 11, N>(s, block, row, column),
            _ => tile::<S, E, 12, N>(s, block, row, column),
        }
    }
}

/// `R` rows by `N` vectors of columns, from (`row`, `column`) of the block.
#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    block: &Block<E>,
    row: usize,
    column: usize,
) {
    // SAFETY: the caller's promise, that the tile lies in the block.
    unsafe {
        let c = block.c.add(row * block.c_row + column);
        let columns = (block.columns - column).min(N * LANES);
        let whole = columns == N * LANES;
        let mut sums = [[s.splat(0.0); N]; R];
        if block.start == Start::Stored {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let from = c.add(i * block.c_row + j * LANES);
                    *sum = match whole {
                        true => s.load(from),
                        false => s.read_some(part(from, columns, j), 0.0),
                    };
                }
            }
        }
        E::chain(s, &mut sums, &block.product, row, column);
        if let Some(second) = &block.second {
            f32::chain(s, &mut sums, second, row, column);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                let to = c.add(i * block.c_row + j * LANES);
                match whole {
                    true => s.store(to, *sum),
                    false => s.write_some(part_mut(to, columns, j), *sum),
                }
            }
        }
    }
}

/// Rows of `B` that are fetched ahead. A CPU's own prefetching stops at the end of a page, which of a panel is 32 rows: a few
/// rows of `A` would wait for memory at each (a quarter of decoding 8 sequences on an Emerald Rapids).
const AHEAD: usize = 32;

/// Adds the terms of one product, in order, to a tile's sums.
#[inline(always)]
unsafe fn chain<S: Simd, const R: usize, const N: usize>(
    s: S,
    sums: &mut [[S::V; N]; R],
    factors: &Factors,
    row: usize,
    column: usize,
) {
    // SAFETY: the caller's promise, that the operands cover the tile.
    unsafe {
        let a_row = factors.a_row;
        let mut a = factors.a.add(row * a_row);
        let mut b = factors.b.add(column);
        let ahead = AHEAD.wrapping_mul(factors.b_step);
        for _ in 0..factors.depth {
            for j in 0..N {
                s.prefetch(b.wrapping_add(ahead).wrapping_add(j * LANES));
            }
            let b_columns: [S::V; N] = std::array::from_fn(|j| s.load(b.add(j * LANES)));
            add_terms(s, sums, a, a_row, b_columns);
            a = a.wrapping_add(factors.a_step);
            b = b.wrapping_add(factors.b_step);
        }
    }
}

/// The same for bf16 weights, widened, and inputs in f32; `depth` counts inputs.
#[inline(always)]
unsafe fn chain_wide<S: Simd, const R: usize, const N: usize>(
    s: S,
    sums: &mut [[S::V; N]; R],
    factors: &Factors<WidePair>,
    row: usize,
    column: usize,
) {
    // SAFETY: the caller's promise, that the operands cover the tile.
    unsafe {
        let a_row = factors.a_row;
        let mut a = factors.a.add(row * a_row);
        let mut b = factors.b.cast::<f32>().add(column);
        for pair in 0..factors.depth.div_ceil(2) {
            let halves: [[S::V; 2]; N] = std::array::from_fn(|j| s.widen_pairs(s.load(b.add(j * LANES))));
            add_terms(s, sums, a, a_row, halves.map(|[upper, _]| upper));
            a = a.wrapping_add(factors.a_step);
            if 2 * pair + 1 < factors.depth {
                add_terms(s, sums, a, a_row, halves.map(|[_, lower]| lower));
                a = a.wrapping_add(factors.a_step);
            }
            b = b.wrapping_add(factors.b_step);
        }
    }
}

/// One term for each sum.
#[inline(always)]
unsafe fn add_terms<S: Simd, const R: usize, const N: usize>(
    s: S,
    sums: &mut [[S::V; N]; R],
    a: *const f32,
    a_row: usize,
    b_columns: [S::V; N],
) {
    for (i, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise, that so many rows of A have this element.
        let a_element = s.splat(unsafe { *a.add(i * a_row) });
        for (sum, b_column) in sums.iter_mut().zip(b_columns) {
            *sum = s.fma(a_element, b_column, *sum);
        }
    }
}

/// The same for pairs, two terms at a time.
#[inline(always)]
unsafe fn chain_pairs<S: Simd, const R: usize, const N: usize>(
    s: S,
    sums: &mut [[S::V; N]; R],
    factors: &Factors<Pair>,
    row: usize,
    column: usize,
) {
    // SAFETY: the caller's promise, that the operands cover the tile.
    unsafe {
        let a_row = factors.a_row;
        let mut a = factors.a.add(row * a_row);
        let mut b = factors.b.cast::<f32>().add(column);
        for _ in 0..factors.depth {
            let b_columns: [S::V; N] = std::array::from_fn(|j| s.load(b.add(j * LANES)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let a_pair = s.splat((*a.add(i * a_row)).as_f32());
                for (sum, b_column) in sums.iter_mut().zip(b_columns) {
                    *sum = s.dot_pairs(a_pair, b_column, *sum);
                }
            }
            a = a.wrapping_add(factors.a_step);
            b = b.wrapping_add(factors.b_step);
        }
    }
}

/// Two bf16 weights whose inputs are f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct WidePair(Pair);

impl WidePair {
    pub(super) fn of(pairs: &[Pair]) -> &[Self] {
        // SAFETY: it is a pair by another name, transparently.
        unsafe { std::slice::from_raw_parts(pairs.as_ptr().cast(), pairs.len()) }
    }
}

/// What `B` is made of.
pub(super) trait Element: Copy {
    /// What `A` is made of.
    type Input: Copy;

    /// Computes a block, as this machine does it best.
    ///
    /// # Safety
    ///
    /// What [`Block::compute`] asks for.
    unsafe fn compute(block: Block<Self>);

    /// Adds the terms of one product, in order, to a tile's sums.
    ///
    /// # Safety
    ///
    /// The operands must cover the tile.
    unsafe fn chain<S: Simd, const R: usize, const N: usize>(
        s: S,
        sums: &mut [[S::V; N]; R],
        factors: &Factors<Self>,
        row: usize,
        column: usize,
    );
}

/// Elements whose chain is that of another function.
macro_rules! element {
    ($element:ty, $input:ty, $compute:ident, $chain:ident) => {
        impl Element for $element {
            type Input = $input;

            unsafe fn compute(block: Block<Self>) {
                $compute(block)
            }

            #[inline(always)]
            unsafe fn chain<S: Simd, const R: usize, const N: usize>(
                s: S,
                sums: &mut [[S::V; N]; R],
                factors: &Factors<Self>,
                row: usize,
                column: usize,
            ) {
                // SAFETY: the caller's promise.
                unsafe { $chain(s, sums, factors, row, column) }
            }
        }
    };
}

element!(f32, f32, run, chain);
element!(WidePair, f32, run, chain_wide);
element!(Pair, Pair, run_pairs, chain_pairs);
element!(FourBits, f32, run, chain_blocks);
element!(FiveBits, f32, run, chain_blocks);
element!(SixBits, f32, run, chain_blocks);
element!(EightBits, f32, run, chain_blocks);

/// A block of products of pairs.
fn run_pairs(block: Block<Pair>) {
    if !has_tiles() {
        return run_dot(block);
    }
    let Block { rows, columns, second, c, c_row, .. } = block;
    // SAFETY: whoever comes from `Block::compute` has promised what both ask for; the second product goes on from
    // what the first has left.
    unsafe {
        amx::compute(&block);
        if let Some(product) = second {
            Block { rows, columns, product, second: None, c, c_row, start: Start::Stored }.compute();
        }
    }
}

/// The values of vector `j` in a row of `columns` values.
#[inline(always)]
unsafe fn part<'a>(from: *const f32, columns: usize, j: usize) -> &'a [f32] {
    // SAFETY: the caller's promise, that the row has so many values from there on.
    unsafe { std::slice::from_raw_parts(from, columns.saturating_sub(j * LANES).min(LANES)) }
}

#[inline(always)]
unsafe fn part_mut<'a>(to: *mut f32, columns: usize, j: usize) -> &'a mut [f32] {
    // SAFETY: as in `part`.
    unsafe { std::slice::from_raw_parts_mut(to, columns.saturating_sub(j * LANES).min(LANES)) }
}

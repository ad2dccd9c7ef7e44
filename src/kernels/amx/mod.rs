//! Products of [pairs](super::pair) on Intel AMX: 16 x 16 outputs and 32 terms of each in one instruction.
//!
//! ```text
//!              C  outputs          A  inputs               B  weights
//! tile         2i + j              4 + i                   6 + j              i, j: 0 or 1
//! holds        16 rows x 16 f32    16 rows x 16 pairs      16 pairs x 16 columns
//! ```
//!
//! B is as weights are packed for every other path, so nothing is packed again: a line of a panel is a pair of
//! inputs for 32 outputs. Edges are tiles of fewer rows, columns or pairs; nothing is padded.
//!
//! **Its bits are its own.** `TDPBF16PS` (Intel SDM, volume 2) adds the products of the upper halves of its 16
//! pairs in one chain of fused multiply-adds and those of the lower halves in another, both from zero, then adds the
//! two, and then that to the output. `vdpbf16ps` and the paths without it add each product to the output itself. So
//! this is a path with [numerics](super::numerics) of its own, and on it all products of pairs take tiles, one
//! row's as well. Terms are counted off in steps of 32 from the start of the reduction, so here, too, a row's bits
//! depend on its inputs and the weights alone.
//!
//! **It has not run on a CPU with AMX yet.** All but the instructions themselves is generic over [`Tiles`] and runs
//! in the tests over [`Emulated`]; and where a process finds the instructions, [`check`] compares them with the
//! emulation before anything else uses them. That check, as a program without an operating system, has passed in Bochs
//! (783b58f, a Sapphire Rapids), an emulator by other people, once its `f32` subtraction no longer made zeros of
//! differences from 2⁻¹²⁶ to 2⁻¹²⁵.

#[cfg(any(test, all(target_arch = "x86_64", target_os = "linux")))]
mod check;
mod emulation;
#[cfg(test)]
mod tests;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod unit;

use super::{
    pair::Pair,
    tile::{Block, Start},
};
use emulation::Emulated;

/// Rows of a tile, and its columns of four bytes.
const SIDE: usize = 16;

/// Columns and rows of C that two tiles side by side hold.
const TWO: usize = 2 * SIDE;

/// Rows that are multiplied with a weight together.
pub(super) const TILE_ROWS: usize = TWO;

/// Terms of an output that are added in one step: whoever cuts a reduction in parts cuts it between two steps.
pub(super) const STEP_TERMS: usize = 2 * SIDE;

/// Steps whose weights are used for all rows before the next ones are: 24 KiB of a first-level cache of 48.
const RESIDENT_STEPS: usize = 12;

/// A set of eight tiles and what computes with them.
trait Tiles {
    /// Gives the tiles these shapes; all are zero then.
    fn configure(&mut self, shape: &Shape);

    /// Tile `T` becomes zero.
    fn zero<const T: u8>(&mut self);

    /// Tile `T` gets its rows from memory, `step` bytes apart.
    ///
    /// # Safety
    ///
    /// They must be readable.
    unsafe fn load<const T: u8>(&mut self, from: *const u32, step: usize);

    /// The rows of tile `T` go to memory, `step` bytes apart.
    ///
    /// # Safety
    ///
    /// They must be writable.
    unsafe fn store<const T: u8>(&mut self, to: *mut u32, step: usize);

    /// `C += A · B`, as `TDPBF16PS` does.
    fn dot<const C: u8, const A: u8, const B: u8>(&mut self);

    /// Gives the tiles back: a thread without any is switched faster.
    fn release(&mut self);
}

/// The shapes of the tiles: of a block of C of up to 32 x 32, and of a step of so many pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Of the upper and the lower tiles of C.
    rows: [usize; 2],
    /// Of the left and the right ones.
    columns: [usize; 2],
    pairs: usize,
}

impl Shape {
    fn new(rows: usize, columns: usize, pairs: usize) -> Self {
        let halves = |len: usize| [len.min(SIDE), len.saturating_sub(SIDE).min(SIDE)];
        Self { rows: halves(rows), columns: halves(columns), pairs }
    }

    /// Rows and columns of a tile; none of both if it is not used.
    fn of(&self, tile: usize) -> (usize, usize) {
        let (rows, columns) = match tile {
            0..4 => (self.rows[tile / 2], self.columns[tile % 2]),
            4..6 => (self.rows[tile - 4], self.pairs),
            _ => (self.pairs, self.columns[tile - 6]),
        };
        if rows == 0 || columns == 0 { (0, 0) } else { (rows, columns) }
    }
}

/// Computes a block whose product is one of pairs.
///
/// # Safety
///
/// What [`Block::compute`] asks for.
pub(super) unsafe fn compute(block: &Block<Pair>) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if let Some(mut tiles) = unit::Unit::get().filter(|_| !is_emulated()) {
            return in_tiles(&mut tiles, block);
        }
        in_tiles(&mut Emulated::default(), block);
    }
}

/// The same on these tiles, without the second product.
///
/// # Safety
///
/// As there.
unsafe fn in_tiles<T: Tiles>(tiles: &mut T, block: &Block<Pair>) {
    debug_assert!((1..=TWO).contains(&block.columns) && block.product.a_step == 1);
    let depth = block.product.depth;
    let mut start = block.start;
    // Whole steps, and then what is left for one that is shorter.
    for (first, steps, pairs) in [(0, depth / SIDE, SIDE), (depth / SIDE * SIDE, 1, depth % SIDE)] {
        if pairs == 0 || (steps == 0 && depth > 0) {
            continue;
        }
        // SAFETY: the caller's promise; the steps lie in the reduction.
        unsafe { add_steps(tiles, block, first, steps, pairs, start) };
        start = Start::Stored;
    }
    tiles.release();
}

/// Adds so many steps, each of so many pairs, from pair `first` on.
///
/// # Safety
///
/// As in [`compute`], and the steps must lie in the reduction.
unsafe fn add_steps<T: Tiles>(
    tiles: &mut T,
    block: &Block<Pair>,
    first: usize,
    steps: usize,
    pairs: usize,
    mut start: Start,
) {
    let product = &block.product;
    // Without a second group of rows no weights are used twice.
    let parts = if block.rows > TWO { steps.div_ceil(RESIDENT_STEPS).max(1) } else { 1 };
    let mut configured = None;
    for part in 0..parts {
        let part = steps * part / parts..steps * (part + 1) / parts;
        for row in (0..block.rows).step_by(TWO) {
            let shape = Shape::new(block.rows - row, block.columns, pairs);
            if configured.replace(shape) != Some(shape) {
                tiles.configure(&shape);
            }
            let pair = first + part.start * SIDE;
            let group = Group {
                a: product.a.wrapping_add(row * product.a_row + pair).cast(),
                a_step: product.a_row * size_of::<Pair>(),
                b: product.b.wrapping_add(pair * product.b_step).cast(),
                b_step: product.b_step * size_of::<Pair>(),
                c: block.c.wrapping_add(row * block.c_row).cast(),
                c_step: block.c_row * size_of::<f32>(),
                steps: part.len(),
                start,
            };
            // SAFETY: the caller's promise; a tile has just the rows and columns that there are.
            unsafe {
                match (shape.rows[1] > 0, shape.columns[1] > 0) {
                    (false, false) => group.add::<T, 1, 1>(tiles),
                    (false, true) => group.add::<T, 1, 2>(tiles),
                    (true, false) => group.add::<T, 2, 1>(tiles),
                    (true, true) => group.add::<T, 2, 2>(tiles),
                }
            }
        }
        start = Start::Stored;
    }
}

/// Up to 32 rows and columns of C, and some steps of their reduction. Steps are in bytes.
struct Group {
    a: *const u32,
    a_step: usize,
    b: *const u32,
    b_step: usize,
    c: *mut u32,
    c_step: usize,
    steps: usize,
    start: Start,
}

impl Group {
    /// Adds the steps to `R` by `N` tiles of C.
    ///
    /// # Safety
    ///
    /// The tiles must be configured, and their rows readable and of C writable.
    #[inline(always)]
    unsafe fn add<T: Tiles, const R: usize, const N: usize>(&self, tiles: &mut T) {
        let Self { mut a, a_step, mut b, b_step, c, c_step, .. } = *self;
        let right = c.wrapping_add(SIDE);
        let [lower, last] = [c, right].map(|c| c.wrapping_byte_add(SIDE * c_step));
        // SAFETY: the caller's promise; tiles that R and N leave out are not touched.
        unsafe {
            match self.start {
                Start::Zero => {
                    tiles.zero::<0>();
                    if N == 2 {
                        tiles.zero::<1>()
                    }
                    if R == 2 {
                        tiles.zero::<2>()
                    }
                    if R == 2 && N == 2 {
                        tiles.zero::<3>()
                    }
                }
                Start::Stored => {
                    tiles.load::<0>(c, c_step);
                    if N == 2 {
                        tiles.load::<1>(right, c_step)
                    }
                    if R == 2 {
                        tiles.load::<2>(lower, c_step)
                    }
                    if R == 2 && N == 2 {
                        tiles.load::<3>(last, c_step)
                    }
                }
            }
            for _ in 0..self.steps {
                tiles.load::<6>(b, b_step);
                tiles.load::<4>(a, a_step);
                tiles.dot::<0, 4, 6>();
                if N == 2 {
                    tiles.load::<7>(b.wrapping_add(SIDE), b_step);
                    tiles.dot::<1, 4, 7>();
                }
                if R == 2 {
                    tiles.load::<5>(a.wrapping_byte_add(SIDE * a_step), a_step);
                    tiles.dot::<2, 5, 6>();
                }
                if R == 2 && N == 2 {
                    tiles.dot::<3, 5, 7>()
                }
                a = a.wrapping_add(SIDE);
                b = b.wrapping_byte_add(SIDE * b_step);
            }
            tiles.store::<0>(c, c_step);
            if N == 2 {
                tiles.store::<1>(right, c_step)
            }
            if R == 2 {
                tiles.store::<2>(lower, c_step)
            }
            if R == 2 && N == 2 {
                tiles.store::<3>(last, c_step)
            }
        }
    }
}

/// Whether this machine's AMX is used for products of bf16: `None` if its CPU has none, else why not.
pub fn amx() -> Option<Result<(), &'static str>> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return unit::state();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    return None;
}

/// Whether the calling thread computes on emulated tiles.
#[inline(always)]
pub(super) fn is_emulated() -> bool {
    #[cfg(test)]
    return EMULATED.get();
    #[cfg(not(test))]
    false
}

#[cfg(test)]
thread_local! {
    static EMULATED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Does something with emulated tiles in the place of this machine's products of pairs, on this thread.
#[cfg(test)]
pub(crate) fn with_emulation<R>(work: impl FnOnce() -> R) -> R {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            EMULATED.set(self.0);
        }
    }
    let _before = Before(EMULATED.replace(true));
    work()
}

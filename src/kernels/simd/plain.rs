//! Arrays, left to the compiler.
//!
//! On aarch64, where NEON and fused products are always there, it makes vector code of them.
//! Elsewhere a fused product may be a call into the C library: right, and slow.

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(super) struct Plain;

type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

impl Simd for Plain {
    type V = V;

    /// 24 sums of 4 lanes in the 32 registers of NEON.
    const TILE_ROWS: [usize; 2] = [6, 0];

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> V {
        // SAFETY: the caller's promise; an array of f32 has the alignment of one.
        unsafe { from.cast::<V>().read() }
    }

    #[inline(always)]
    fn widen_pairs(self, pairs: V) -> [V; 2] {
        let upper = pairs.map(|pair| f32::from_bits(pair.to_bits() & 0xffff_0000));
        [upper, pairs.map(|pair| f32::from_bits(pair.to_bits() << 16))]
    }

    #[inline(always)]
    fn read_nibbles(self, bytes: &[u8; LANES], half: usize) -> V {
        bytes.map(|byte| f32::from(byte >> (4 * half) & 15))
    }

    #[inline(always)]
    fn add_where(self, mask: u16, v: V, amount: f32) -> V {
        std::array::from_fn(|lane| if mask >> lane & 1 == 1 { v[lane] + amount } else { v[lane] })
    }

    #[inline(always)]
    fn read_i8(self, values: &[i8]) -> V {
        let values = &values[..LANES];
        std::array::from_fn(|lane| f32::from(values[lane]))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: V) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<V>().write(v) }
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn select_less(self, a: V, b: V, x: V, y: V) -> V {
        std::array::from_fn(|lane| if a[lane] < b[lane] { x[lane] } else { y[lane] })
    }

    #[inline(always)]
    fn add_exponent(self, a: V, n: V) -> V {
        zip(a, n, |a, n| f32::from_bits(a.to_bits().wrapping_add(n.to_bits() << 23)))
    }

    #[inline(always)]
    fn sum(self, mut v: V) -> f32 {
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                v[lane] += v[lane + half];
            }
        }
        v[0]
    }
}

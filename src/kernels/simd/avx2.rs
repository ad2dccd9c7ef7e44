//! Two 256-bit registers a vector.

use std::arch::x86_64::*;

use super::Simd;

/// Proof that the CPU has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    ///
    /// The CPU must have AVX2 and FMA.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Both halves of `f` on the halves of its arguments.
macro_rules! halves {
    ($f:ident($($arg:expr),+)) => {
        // SAFETY: a value of `Avx2` exists, so the CPU has the instructions.
        unsafe { [$f($($arg[0]),+), $f($($arg[1]),+)] }
    };
}

// SAFETY of every block below: a value of this type exists, so the CPU has the instructions;
// memory operands are the caller's promise.
impl Simd for Avx2 {
    type V = [__m256; 2];

    /// 12 sums, two halves of a column and room for broadcasts in 16 registers.
    const TILE_ROWS: [usize; 2] = [6, 0];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    fn widen_pairs(self, pairs: Self::V) -> [Self::V; 2] {
        unsafe {
            let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let bits = pairs.map(|half| _mm256_castps_si256(half));
            [
                bits.map(|half| _mm256_castsi256_ps(_mm256_and_si256(half, upper))),
                bits.map(|half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(half))),
            ]
        }
    }

    /// Four squares of eight lanes.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; 16]) -> [Self::V; 16] {
        let mut columns = rows;
        for down in 0..2 {
            for across in 0..2 {
                let mut square = [rows[0][0]; 8];
                for i in 0..8 {
                    square[i] = rows[8 * down + i][across];
                }
                let turned = unsafe { transpose_eight(square) };
                for i in 0..8 {
                    columns[8 * across + i][down] = turned[i];
                }
            }
        }
        columns
    }

    #[inline(always)]
    fn read_nibbles(self, bytes: &[u8; 16], half: usize) -> Self::V {
        unsafe {
            [0, 8].map(|part| {
                let wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes.as_ptr().add(part).cast()));
                let low = match half {
                    0 => _mm256_and_si256(wide, _mm256_set1_epi32(15)),
                    _ => _mm256_srli_epi32::<4>(wide),
                };
                _mm256_cvtepi32_ps(low)
            })
        }
    }

    #[inline(always)]
    fn add_where(self, mask: u16, v: Self::V, amount: f32) -> Self::V {
        unsafe {
            let bit_of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let part = |v, bits: u16| {
                let bits = _mm256_and_si256(_mm256_set1_epi32(bits.into()), bit_of_lane);
                let is_set = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, bit_of_lane));
                _mm256_add_ps(v, _mm256_and_ps(is_set, _mm256_set1_ps(amount)))
            };
            [part(v[0], mask & 0xff), part(v[1], mask >> 8)]
        }
    }

    #[inline(always)]
    fn read_i8(self, values: &[i8]) -> Self::V {
        let values = &values[..16];
        unsafe {
            [0, 8].map(|part| {
                let bytes = _mm_loadl_epi64(values.as_ptr().add(part).cast());
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
            })
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        unsafe {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        halves!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn select_less(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        let less: [__m256; 2] = unsafe { [0, 1].map(|half| _mm256_cmp_ps::<_CMP_LT_OQ>(a[half], b[half])) };
        halves!(_mm256_blendv_ps(y, x, less))
    }

    #[inline(always)]
    fn add_exponent(self, a: Self::V, n: Self::V) -> Self::V {
        unsafe {
            [0, 1].map(|half| {
                let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(n[half]));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a[half]), shifted))
            })
        }
    }

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        unsafe { sum_of_eight(_mm256_add_ps(v[0], v[1])) }
    }
}

/// Within four lanes, then among the two halves of a register.
///
/// # Safety
///
/// The CPU must have AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose_eight(rows: [__m256; 8]) -> [__m256; 8] {
    let mut twos = rows;
    for i in (0..8).step_by(2) {
        twos[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        twos[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    let mut columns = rows;
    for j in 0..2 {
        for high in 0..2 {
            let mut fours = [rows[0]; 2];
            for quarter in 0..2 {
                let (even, odd) = (twos[4 * quarter + j], twos[4 * quarter + 2 + j]);
                let (even, odd) = (_mm256_castps_pd(even), _mm256_castps_pd(odd));
                fours[quarter] = _mm256_castpd_ps(match high {
                    0 => _mm256_unpacklo_pd(even, odd),
                    _ => _mm256_unpackhi_pd(even, odd),
                });
            }
            columns[2 * j + high] = _mm256_permute2f128_ps::<0x20>(fours[0], fours[1]);
            columns[4 + 2 * j + high] = _mm256_permute2f128_ps::<0x31>(fours[0], fours[1]);
        }
    }
    columns
}

/// Lane i and i + 4 added, then i and i + 2, then i and i + 1.
///
/// # Safety
///
/// The CPU must have AVX2.
#[inline(always)]
pub(super) unsafe fn sum_of_eight(v: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

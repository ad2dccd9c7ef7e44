//! One 512-bit register a vector.

use std::{
    arch::x86_64::*,
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};

use super::Simd;
use crate::kernels::pair::LEAST_INPUT;

/// Proof that the CPU has AVX-512 (F, DQ, BW, VL), and if `BF16`, AVX512-BF16.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    /// # Safety
    ///
    /// The CPU must have AVX-512 (F, DQ, BW, VL), and if `BF16`, AVX512-BF16.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY of every block below: a value of this type exists, so the CPU has the instructions;
// memory operands are the caller's promise.
impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;

    /// 24 sums, two columns, and room for broadcasts in 32 registers.
    const TILE_ROWS: [usize; 2] = [12, 12];

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    fn widen_pairs(self, pairs: __m512) -> [__m512; 2] {
        unsafe {
            let bits = _mm512_castps_si512(pairs);
            let upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [upper, _mm512_slli_epi32::<16>(bits)].map(|half| _mm512_castsi512_ps(half))
        }
    }

    #[inline(always)]
    fn dot_pairs(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        if BF16 {
            return unsafe { dot(a, b, sum) };
        }
        let ([a_upper, a_lower], [b_upper, b_lower]) = (self.widen_pairs(a), self.widen_pairs(b));
        self.fma(a_lower, b_lower, self.fma(a_upper, b_upper, sum))
    }

    #[inline(always)]
    fn round_to_pairs(self, numbers: [__m512; 2]) -> __m512 {
        if !BF16 {
            return super::round_lanes(self, numbers);
        }
        unsafe {
            let least = _mm512_set1_ps(LEAST_INPUT);
            // What is no number is not less than the least input.
            let numbers = numbers.map(|v| {
                let passes = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(v), least);
                _mm512_maskz_mov_ps(passes, v)
            });
            round(numbers)
        }
    }

    #[inline(always)]
    fn regroup_pairs(self, [first, last]: [__m512; 2]) -> [__m512; 2] {
        /// Words: the second neighbour's upper (or lower) half, and above it the first one's.
        const fn words(half: u16) -> [u16; 32] {
            let mut words = [0; 32];
            let mut pair = 0;
            while pair < 16 {
                words[2 * pair] = 4 * pair as u16 + 3 - half;
                words[2 * pair + 1] = 4 * pair as u16 + 1 - half;
                pair += 1;
            }
            words
        }
        const WORDS: [[u16; 32]; 2] = [words(0), words(1)];
        unsafe {
            let [first, last] = [first, last].map(|pairs| _mm512_castps_si512(pairs));
            [0, 1].map(|half| {
                let words = _mm512_loadu_si512(WORDS[half].as_ptr().cast());
                _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, words, last))
            })
        }
    }

    /// Within four lanes, then among the four quarters of a register.
    #[inline(always)]
    fn transpose(self, rows: [__m512; 16]) -> [__m512; 16] {
        unsafe {
            let mut twos = rows;
            for i in (0..16).step_by(2) {
                twos[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
                twos[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
            }
            // No `map` of the arrays: that of 16 is a function of its own, without the path's instructions.
            let mut fours = twos;
            for i in (0..16).step_by(4) {
                for high in 0..2 {
                    let [even, odd] =
                        [_mm512_castps_pd(twos[i + high]), _mm512_castps_pd(twos[i + high + 2])];
                    fours[i + 2 * high] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
                    fours[i + 2 * high + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
                }
            }
            let mut columns = rows;
            for j in 0..4 {
                let even = |i: usize| _mm512_shuffle_f32x4::<0x88>(fours[i + j], fours[i + 4 + j]);
                let odd = |i: usize| _mm512_shuffle_f32x4::<0xdd>(fours[i + j], fours[i + 4 + j]);
                columns[j] = _mm512_shuffle_f32x4::<0x88>(even(0), even(8));
                columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd(0), odd(8));
                columns[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even(0), even(8));
                columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd(0), odd(8));
            }
            columns
        }
    }

    #[inline(always)]
    fn read_nibbles(self, bytes: &[u8; 16], half: usize) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            let low = match half {
                0 => _mm512_and_si512(wide, _mm512_set1_epi32(15)),
                _ => _mm512_srli_epi32::<4>(wide),
            };
            _mm512_cvtepi32_ps(low)
        }
    }

    #[inline(always)]
    fn add_where(self, mask: u16, v: __m512, amount: f32) -> __m512 {
        unsafe { _mm512_mask_add_ps(v, mask, v, _mm512_set1_ps(amount)) }
    }

    #[inline(always)]
    fn read_i8(self, values: &[i8]) -> __m512 {
        let values = &values[..16];
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn select_less(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }

    #[inline(always)]
    fn add_exponent(self, a: __m512, n: __m512) -> __m512 {
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), shifted))
        }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            super::avx2::sum_of_eight(eight)
        }
    }
}

/// `vdpbf16ps`: odd elements of the operands' 32 first, which are the upper halves, then the even ones.
///
/// # Safety
///
/// The CPU must have AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn dot(a: __m512, b: __m512, sum: __m512) -> __m512 {
    // SAFETY: both types are 512 bits.
    let [a, b] = unsafe { [a, b].map(|pairs| std::mem::transmute::<__m512, __m512bh>(pairs)) };
    _mm512_dpbf16_ps(sum, a, b)
}

/// `vcvtne2ps2bf16`, and each pair's first number above the second.
///
/// # Safety
///
/// The CPU must have AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn round([first, last]: [__m512; 2]) -> __m512 {
    // SAFETY: both types are 512 bits.
    let pairs = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(last, first)) };
    _mm512_castsi512_ps(_mm512_rol_epi32::<16>(pairs))
}

/// Whether `vdpbf16ps` of this CPU is two fused multiply-adds in the order of Intel's manual, as what it is used
/// for asks: seen on Zen 4 and written there; a CPU that differs computes without it.
///
/// # Safety
///
/// The CPU must have AVX-512 (F, DQ, BW, VL) and AVX512-BF16.
pub(super) unsafe fn dot_is_a_chain() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        // Ones and thirds, so that each order and each place of a rounding gives other bits.
        let number =
            |i: u32| f32::from_bits((0x3f80_0000 + (i.wrapping_mul(0x9e37_79b9) >> 9)) & 0xffff_0000);
        let pair = |i: u32| f32::from_bits(number(i).to_bits() | number(i + 1).to_bits() >> 16);
        let agrees = (0..512).all(|i| {
            let (a, b, sum) = (pair(3 * i), pair(7 * i + 1), number(5 * i) / -3.0);
            // SAFETY: the caller's promise.
            let [one, two] = unsafe { [chained::<true>(a, b, sum), chained::<false>(a, b, sum)] };
            one.to_bits() == two.to_bits()
        });
        if !agrees {
            tracing::warn!(
                "vdpbf16ps of this CPU is not the chain that its manual describes: bf16 computes without it"
            );
        }
        agrees
    })
}

/// Whether `vdpbf16ps` of this CPU takes less time than the two fused multiply-adds that give the same bits: one cycle
/// on Zen 4 instead of two, but two on an Emerald Rapids instead of one. No CPU says so, hence it is timed; the least
/// of many tries, so that what else runs there doesn't matter. Speed alone hangs on it.
///
/// # Safety
///
/// The CPU must have AVX-512 (F, DQ, BW, VL) and AVX512-BF16.
pub(super) unsafe fn dot_is_fast() -> bool {
    /// Microseconds each.
    const TRIES: usize = 32;
    fn least(work: impl Fn() -> f32) -> Duration {
        let time = |_| {
            let start = Instant::now();
            black_box(work());
            start.elapsed()
        };
        (0..TRIES).map(time).min().unwrap_or_default()
    }
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        // SAFETY: the caller's promise.
        let [dot, fused] = unsafe { [least(|| many_chains::<true>()), least(|| many_chains::<false>())] };
        dot < fused
    })
}

/// As many chains of [`Simd::dot_pairs`] as a tile of a product has.
///
/// # Safety
///
/// The CPU must have AVX-512 and AVX512-BF16.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")]
unsafe fn many_chains<const BF16: bool>() -> f32 {
    // SAFETY: the caller's promise.
    let s = unsafe { Avx512::<BF16>::new() };
    let [a, b] = black_box([1.5f32, -0.75]).map(|pair| s.splat(pair));
    let mut sums = [s.splat(0.0); 24];
    for _ in 0..100 {
        for sum in &mut sums {
            *sum = s.dot_pairs(a, b, *sum);
        }
    }
    sums.into_iter().map(|sum| s.sum(sum)).sum()
}

/// # Safety
///
/// The CPU must have AVX-512, and if `BF16`, AVX512-BF16.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")]
unsafe fn chained<const BF16: bool>(a: f32, b: f32, sum: f32) -> f32 {
    // SAFETY: the caller's promise.
    let s = unsafe { Avx512::<BF16>::new() };
    s.lanes(s.dot_pairs(s.splat(a), s.splat(b), s.splat(sum)))[15]
}

//! Two bf16 side by side, as products of bf16 with bf16 read them.
//!
//! ```text
//!            upper half        lower half
//! pair p     element 2p        element 2p + 1        (0 behind the last of an odd number)
//! ```
//!
//! `vdpbf16ps` adds the product of the upper halves to a sum, then that of the lower halves, each rounded once:
//! in this order its chain is that of the elements. The product of two bf16 is exact in f32, so a fused
//! multiply-add in f32 gives the same bits, if no number is subnormal: the instruction takes those for zero and
//! makes zero of them. So [`round_weight`] and [`round_input`] let no number pass whose products could make one.

use half::bf16;

use super::simd::{Kernel, LANES, Simd, run, run_dot};

/// Two bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct Pair(u32);

/// Smaller weights are zero where inputs are rounded: 2⁻⁴⁰.
///
/// A bf16 that is not below 2ᵉ in size is a multiple of 2ᵉ⁻⁷. So products are multiples of 2⁻⁴⁷ · 2⁻⁷⁹ = 2⁻¹²⁶, the
/// smallest normal f32, and so are their sums, rounded or not.
const LEAST_WEIGHT: f32 = f32::from_bits((127 - 40) << 23);

/// Smaller inputs, activations and their gradients, are zero: 2⁻⁷².
pub(super) const LEAST_INPUT: f32 = f32::from_bits((127 - 72) << 23);

/// Upper half of an f32.
const UPPER: u32 = 0xffff_0000;

impl Pair {
    pub(crate) fn new(upper: bf16, lower: bf16) -> Self {
        Self(u32::from(upper.to_bits()) << 16 | u32::from(lower.to_bits()))
    }

    /// Two [inputs](round_input).
    #[inline(always)]
    pub(super) fn rounded([upper, lower]: [f32; 2]) -> Self {
        Self(rounded(upper) & UPPER | rounded(lower) >> 16)
    }

    /// Both, widened.
    #[inline(always)]
    pub(crate) fn widen(self) -> [f32; 2] {
        [f32::from_bits(self.0 & UPPER), f32::from_bits(self.0 << 16)]
    }

    /// As a number whose bits these are.
    #[inline(always)]
    pub(super) fn as_f32(self) -> f32 {
        f32::from_bits(self.0)
    }
}

/// A weight of a product whose inputs are rounded: to nearest, ties to even.
pub(crate) fn round_weight(value: f32) -> bf16 {
    bf16::from_f32(if value.abs() < LEAST_WEIGHT { 0.0 } else { value })
}

/// An input of such a product, widened again.
#[inline(always)]
pub(crate) fn round_input(value: f32) -> f32 {
    f32::from_bits(rounded(value) & UPPER)
}

/// Bits whose upper half is the rounded value. No branch, so that it becomes vector code.
#[inline(always)]
fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let number = if value.abs() < LEAST_INPUT { 0 } else { nearest };
    // What is no number stays none: its bits could overflow.
    if value.is_nan() { bits | 0x0040_0000 } else { number }
}

/// Rounds rows of `depth` values to pairs, each row to `depth.div_ceil(2)` of them; rows are `row_len` apart.
pub(super) fn round_to_pairs(rows: &[f32], row_len: usize, depth: usize, pairs: &mut [Pair]) {
    struct ToPairs<'a>(&'a [f32], usize, usize, &'a mut [Pair]);
    impl Kernel for ToPairs<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(rows, row_len, depth, pairs) = self;
            for (row, pairs) in rows.chunks(row_len).zip(pairs.chunks_exact_mut(depth.div_ceil(2))) {
                let (blocks, rest) = row[..depth].as_chunks::<{ 2 * LANES }>();
                let (to_blocks, to_rest) = pairs.split_at_mut(blocks.len() * LANES);
                for (to, block) in to_blocks.chunks_exact_mut(LANES).zip(blocks) {
                    let pairs = s.round_to_pairs([s.read(block), s.read(&block[LANES..])]);
                    // SAFETY: the chunk has 16 pairs, which have the size of numbers.
                    unsafe { s.store(to.as_mut_ptr().cast(), pairs) };
                }
                let (whole, last) = rest.as_chunks::<2>();
                for (pair, two) in to_rest.iter_mut().zip(whole) {
                    *pair = Pair::rounded(*two);
                }
                if let ([last], Some(pair)) = (last, to_rest.last_mut()) {
                    *pair = Pair::rounded([*last, 0.0]);
                }
            }
        }
    }
    if depth > 0 {
        run_dot(ToPairs(rows, row_len, depth, pairs));
    }
}

/// Rounds rows of `depth` values, `row_len` apart, to f32 that are bf16, end to end.
pub(super) fn round_rows(rows: &[f32], row_len: usize, depth: usize, to: &mut [f32]) {
    struct ToF32<'a>(&'a [f32], usize, usize, &'a mut [f32]);
    impl Kernel for ToF32<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            let Self(rows, row_len, depth, to) = self;
            for (row, to) in rows.chunks(row_len).zip(to.chunks_exact_mut(depth)) {
                for (to, value) in to.iter_mut().zip(&row[..depth]) {
                    *to = round_input(*value);
                }
            }
        }
    }
    if depth > 0 {
        run(ToF32(rows, row_len, depth, to));
    }
}

/// Memory for numbers, lent to pairs.
pub(super) fn as_pairs(values: &mut [f32]) -> &mut [Pair] {
    // SAFETY: both are four bytes of any bits, aligned alike, and the slice is borrowed exclusively.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::{Path, run_dot_on};

    #[test]
    fn rounds_to_nearest_ties_to_even() {
        let round = |bits: u32| round_input(f32::from_bits(bits)).to_bits();
        assert_eq!(round(0x3f80_8000), 0x3f80_0000, "a tie goes to the even one below");
        assert_eq!(round(0x3f81_8000), 0x3f82_0000, "and to the even one above");
        assert_eq!(round(0x3f80_8001), 0x3f81_0000);
        assert_eq!(round(0xbf80_8001), 0xbf81_0000);
        assert_eq!(round(0x7f7f_ffff), 0x7f80_0000, "too large for bf16");
    }

    #[test]
    fn rounds_as_the_definition_of_bf16_says() {
        for value in crate::kernels::tests::noise(1, 10_000) {
            for value in [value, value * 1e30, value * 1e-15, 3.0 * value] {
                assert_eq!(round_input(value).to_bits(), bf16::from_f32(value).to_f32().to_bits());
                if value.abs() > LEAST_WEIGHT {
                    assert_eq!(round_weight(value), bf16::from_f32(value));
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for bits in [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0x7fff_ffff, 0xffff_ffff] {
            assert!(round_input(f32::from_bits(bits)).is_nan(), "{bits:x}");
        }
        for infinite in [f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(round_input(infinite), infinite);
        }
    }

    /// Every upper half of an f32, with lower halves around a tie, among others.
    #[test]
    fn every_path_rounds_to_pairs_alike() {
        struct ToPairs<'a>(&'a [f32], &'a mut [f32]);
        impl Kernel for ToPairs<'_> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                s.write(self.1, s.round_to_pairs([s.read(self.0), s.read(&self.0[LANES..])]));
            }
        }
        let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let all = (0..=0xffffu32).flat_map(|upper| lower.map(|lower| f32::from_bits(upper << 16 | lower)));
        let mut all: Vec<f32> = all.collect();
        let least = LEAST_INPUT.to_bits();
        all.extend([least - 1, least, least + 1].map(f32::from_bits).repeat(16));
        for path in Path::available() {
            for block in all.chunks_exact(2 * LANES) {
                let mut found = [0.0; LANES];
                run_dot_on(path, ToPairs(block, &mut found));
                for (found, two) in found.iter().zip(block.as_chunks::<2>().0) {
                    assert_eq!(found.to_bits(), Pair::rounded(*two).0, "{path:?}: {two:?}");
                }
            }
        }
    }

    #[test]
    fn no_product_of_what_passes_is_subnormal() {
        let (weight, input) = (LEAST_WEIGHT, LEAST_INPUT);
        assert_eq!(round_weight(weight).to_f32(), weight);
        assert_eq!(round_input(input), input);
        assert_eq!(round_weight(weight.next_down()), bf16::ZERO);
        assert_eq!(round_input(-input.next_down()), 0.0);
        // The finest step among such products, and so among their sums.
        let step = |value: f32| f32::from_bits(value.to_bits() + (1 << 16)) - value;
        assert_eq!(step(weight) * step(input), f32::MIN_POSITIVE);
    }

    #[test]
    fn pairs_hold_elements_in_order() {
        let rows = [1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 9.0];
        let mut pairs = [Pair::default(); 4];
        round_to_pairs(&rows, 4, 3, &mut pairs);
        let found: Vec<f32> = pairs.iter().flat_map(|pair| pair.widen()).collect();
        assert_eq!(found, [1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0, 0.0]);
    }
}

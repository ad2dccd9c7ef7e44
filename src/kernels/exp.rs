//! The exponential function on vectors.

use super::simd::Simd;

/// Below this, e^x counts as 0; it is 1.6e-38, and what softmax adds it to is at least 1.
const SMALLEST: f32 = -87.0;
/// Above this, e^x is that of this, 1.7e38: finite, and large enough for a sigmoid to be 0.
const LARGEST: f32 = 88.0;

/// e^x, at most 2 units in the last place off between -87 and 88; 0 below, NaN of NaN.
///
/// `x = n ln 2 + r` with integral n and |r| at most ln 2 / 2; the polynomial for e^r is that of
/// Cephes' `expf`.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Adding 1.5·2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with trailing zeros so that n times it is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    let bounded = s.max(s.splat(SMALLEST), s.min(s.splat(LARGEST), x));
    let shifted = s.fma(bounded, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(shifted, s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN2_HIGH), bounded);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let e_r = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    s.select_less(x, s.splat(SMALLEST), s.splat(0.0), s.add_exponent(e_r, shifted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::{Kernel, LANES, Path, run_on};

    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for values in self.0.chunks_exact_mut(LANES) {
                let e = exp(s, s.read(values));
                s.write(values, e);
            }
        }
    }

    #[test]
    fn is_within_two_units_of_the_exact_value() {
        let xs: Vec<f32> = (0..200_000).map(|i| SMALLEST + i as f32 * (175.0 / 200_000.0)).collect();
        for path in Path::available() {
            let mut es = xs.clone();
            run_on(path, Exp(&mut es));
            for (x, e) in xs.iter().zip(es) {
                let exact = f64::from(*x).exp();
                let unit = f64::from((exact as f32).next_up() - exact as f32);
                assert!((f64::from(e) - exact).abs() <= 2.0 * unit, "e^{x} = {e}, not {exact} ({path:?})");
            }
        }
    }

    #[test]
    fn has_the_limits_that_softmax_and_sigmoid_need() {
        for path in Path::available() {
            let mut values = [0.0; LANES];
            values[..6].copy_from_slice(&[f32::NEG_INFINITY, -1e30, f32::INFINITY, 1e30, f32::NAN, 0.0]);
            run_on(path, Exp(&mut values));
            assert_eq!(values[..2], [0.0, 0.0]);
            assert!(values[2] > 1e38 && values[3] > 1e38);
            assert!(values[4].is_nan());
            assert_eq!(values[5], 1.0);
        }
    }
}

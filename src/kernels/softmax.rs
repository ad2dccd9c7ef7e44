//! Softmax over a vocabulary, one row at a time.

use super::{
    exp::exp,
    simd::{Kernel, LANES, Simd, run},
};

/// `ln Σ e^x` of a row of logits.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f32 {
    run(LogSumExp(logits))
}

/// Replaces a row of logits by `factor · softmax(logits)`, given their [`log_sum_exp`].
pub(crate) fn softmax_gradient(logits: &mut [f32], lse: f32, factor: f32) {
    run(SoftmaxGradient { logits, lse, factor })
}

struct LogSumExp<'a>(&'a [f32]);

impl Kernel for LogSumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut maxima = s.splat(f32::NEG_INFINITY);
        for logits in self.0.chunks(LANES) {
            maxima = s.max(s.read_some(logits, f32::NEG_INFINITY), maxima);
        }
        let max = s.largest(maxima);
        let mut sums = s.splat(0.0);
        for logits in self.0.chunks(LANES) {
            let shifted = s.sub(s.read_some(logits, f32::NEG_INFINITY), s.splat(max));
            sums = s.add(sums, exp(s, shifted));
        }
        max + s.sum(sums).ln()
    }
}

struct SoftmaxGradient<'a> {
    logits: &'a mut [f32],
    lse: f32,
    factor: f32,
}

impl Kernel for SoftmaxGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for logits in self.logits.chunks_mut(LANES) {
            let shifted = s.sub(s.read_some(logits, 0.0), s.splat(self.lse));
            s.write_some(logits, s.mul(exp(s, shifted), s.splat(self.factor)));
        }
    }
}

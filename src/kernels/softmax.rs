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

/// `−Σ p ln p` of `p = softmax(logits)`, given their [`log_sum_exp`], in nats.
pub(crate) fn entropy(logits: &[f32], lse: f32) -> f32 {
    run(Entropy { logits, lse })
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

struct Entropy<'a> {
    logits: &'a [f32],
    lse: f32,
}

impl Kernel for Entropy<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = s.splat(0.0);
        for logits in self.logits.chunks(LANES) {
            // Lanes that are not there: so unlikely that e^x is 0.
            let logprobs = s.sub(s.read_some(logits, f32::MIN / 2.0), s.splat(self.lse));
            sums = s.fma(exp(s, logprobs), logprobs, sums);
        }
        -s.sum(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_that_of_the_softmax() {
        for n in [1, 5, 16, 49] {
            let logits: Vec<f32> = (0..n).map(|i| ((i * 37) % 23) as f32 * 0.25 - 2.0).collect();
            let exps: Vec<f64> = logits.iter().map(|logit| f64::from(*logit).exp()).collect();
            let total: f64 = exps.iter().sum();
            let expected: f64 = exps.iter().map(|e| -e / total * (e / total).ln()).sum();
            let found = f64::from(entropy(&logits, log_sum_exp(&logits)));
            // Up to 49 terms below 3, each rounded to 6e-8 of itself.
            assert!((found - expected).abs() < 2e-6, "{n}: {found} and {expected}");
        }
    }

    #[test]
    fn a_certain_token_has_no_entropy() {
        let mut logits = [-200.0; 40];
        logits[7] = 50.0;
        assert_eq!(entropy(&logits, log_sum_exp(&logits)), 0.0);
    }
}

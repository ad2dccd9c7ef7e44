//! The losses: what a position adds to the sum S that is minimised, as a function of its
//! target's log-probability.
//!
//! Notation: `lp` the trainer's log-probability of the target, `q` the sampler's, `A` the
//! advantage, `w` the weight, `r = exp(lp − q)`.
//!
//! | loss | ℓ(lp) | ∂ℓ/∂lp | active if |
//! | --- | --- | --- | --- |
//! | `cross_entropy` | `−w·lp` | `−w` | `w ≠ 0` |
//! | `importance_sampling` | `−w·r·A` | `−w·r·A` | `A ≠ 0`, `w ≠ 0`, `mask > 0` |
//!
//! S is the sum over active positions that have a target; dividing it by their count is left
//! to `optim_step`. Names and formulas are those of the Tinker and Loops dialects.

use crate::types::LossFn;

/// A loss with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Loss {
    CrossEntropy,
    ImportanceSampling,
}

/// What a position brings to its loss besides the log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LossInputs {
    /// `w`: multiplies value and derivative. 1 where the caller gives none.
    pub weight: f32,
    /// `q`; 0 for losses that read none.
    pub sampler_logprob: f32,
    /// `A`; 0 for losses that read none.
    pub advantage: f32,
}

/// A loss at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LossAt {
    /// ℓ(lp).
    pub value: f64,
    /// ∂ℓ/∂lp.
    pub derivative: f64,
}

impl Loss {
    pub(super) fn new(loss_fn: LossFn) -> Self {
        match loss_fn {
            LossFn::CrossEntropy => Self::CrossEntropy,
            LossFn::ImportanceSampling => Self::ImportanceSampling,
        }
    }

    /// Names of the inputs that a datum must bring.
    pub(super) fn required_inputs(self) -> &'static [&'static str] {
        match self {
            Self::CrossEntropy => &[],
            Self::ImportanceSampling => &["logprobs", "advantages"],
        }
    }

    /// Names of the inputs that a datum may bring.
    pub(super) fn optional_inputs(self) -> &'static [&'static str] {
        match self {
            Self::CrossEntropy => &["target_tokens", "weights"],
            Self::ImportanceSampling => &["target_tokens", "mask", "weights"],
        }
    }

    /// Whether the loss compares the trainer's policy with the one that sampled the data.
    pub(super) fn is_of_sampled_data(self) -> bool {
        match self {
            Self::CrossEntropy => false,
            Self::ImportanceSampling => true,
        }
    }

    /// ℓ and its derivative at `lp`. Computed in f64: the ratio of two log-probabilities that
    /// are f32 is exact to their own rounding, and sums of many positions keep their digits.
    pub(super) fn at(self, lp: f32, inputs: &LossInputs) -> LossAt {
        let lp = f64::from(lp);
        let (value, derivative) = match self {
            Self::CrossEntropy => (-lp, -1.0),
            Self::ImportanceSampling => {
                let ratio = (lp - f64::from(inputs.sampler_logprob)).exp();
                let surrogate = -ratio * f64::from(inputs.advantage);
                (surrogate, surrogate)
            }
        };
        let weight = f64::from(inputs.weight);
        LossAt { value: weight * value, derivative: weight * derivative }
    }
}

/// How far the trainer's policy is from the sampler's at one token that the sampler drew.
///
/// `k1`, `k2`, `k3` estimate KL(sampler ‖ trainer); k3 is unbiased and never negative
/// (Schulman, "Approximating KL divergence", 2020).
pub(super) struct PolicyGap {
    /// `r = exp(lp − q)`.
    pub ratio: f64,
    /// `q − lp`.
    pub k1: f64,
    /// `½(lp − q)²`.
    pub k2: f64,
    /// `r − 1 − (lp − q)`.
    pub k3: f64,
    /// `|lp − q|`.
    pub gap: f64,
}

impl PolicyGap {
    pub(super) fn at(lp: f32, sampler_logprob: f32) -> Self {
        let difference = f64::from(lp) - f64::from(sampler_logprob);
        Self {
            ratio: difference.exp(),
            k1: -difference,
            k2: 0.5 * difference * difference,
            k3: difference.exp_m1() - difference,
            gap: difference.abs(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INPUTS: [LossInputs; 4] = [
        LossInputs { weight: 1.0, sampler_logprob: -1.25, advantage: 2.0 },
        LossInputs { weight: -0.5, sampler_logprob: -0.125, advantage: -1.5 },
        LossInputs { weight: 0.25, sampler_logprob: -3.0, advantage: 0.75 },
        LossInputs { weight: 2.0, sampler_logprob: -0.5, advantage: -0.25 },
    ];
    const LOGPROBS: [f32; 4] = [-0.75, -1.5, -2.0, -4.0];

    #[test]
    fn cross_entropy_is_the_weighted_negative_log_likelihood() {
        let inputs = LossInputs { weight: 0.5, sampler_logprob: 0.0, advantage: 0.0 };
        let at = Loss::CrossEntropy.at(-2.0, &inputs);
        assert_eq!(at, LossAt { value: 1.0, derivative: -0.5 });
    }

    #[test]
    fn importance_sampling_weighs_the_advantage_by_the_ratio() {
        let inputs = LossInputs { weight: 1.0, sampler_logprob: -2.0, advantage: 3.0 };
        assert_eq!(Loss::ImportanceSampling.at(-2.0, &inputs).value, -3.0);
        let at = Loss::ImportanceSampling.at(-1.0, &inputs);
        assert_eq!(at.value, -3.0 * std::f64::consts::E);
        assert_eq!(at.derivative, at.value);
    }

    /// Central differences over ±2⁻¹⁰, which f32 represents exactly here; the error of the
    /// difference is h²/6 times the third derivative, under 2e-7 of these values.
    #[test]
    fn derivatives_agree_with_finite_differences() {
        const STEP: f32 = 1.0 / 1024.0;
        for loss in LossFn::ALL.map(Loss::new) {
            for inputs in &INPUTS {
                for lp in LOGPROBS {
                    let (up, down) = (loss.at(lp + STEP, inputs).value, loss.at(lp - STEP, inputs).value);
                    let difference = (up - down) / (2.0 * f64::from(STEP));
                    let derivative = loss.at(lp, inputs).derivative;
                    assert!(
                        (difference - derivative).abs() <= 1e-6 * derivative.abs(),
                        "{loss:?} at {lp} with {inputs:?}: {difference} and {derivative}"
                    );
                }
            }
        }
    }

    #[test]
    fn equal_policies_have_no_gap() {
        let gap = PolicyGap::at(-1.5, -1.5);
        assert_eq!([gap.ratio, gap.k1.abs(), gap.k2, gap.k3, gap.gap], [1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_estimates_follow_their_formulas() {
        let gap = PolicyGap::at(-1.0, -1.5);
        assert_eq!(gap.k1, -0.5);
        assert_eq!(gap.k2, 0.125);
        assert!((gap.k3 - (0.5f64.exp() - 1.5)).abs() < 1e-15);
        assert_eq!(gap.gap, 0.5);
    }
}

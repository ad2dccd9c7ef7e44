//! The losses: what is added to the sum S that is minimised, as a function of the targets'
//! log-probabilities.
//!
//! Notation: `lp` the trainer's log-probability of the target, `q` the sampler's, `A` the
//! advantage, `w` the weight, `r = exp(lp − q)`, `sg` what takes no gradient.
//!
//! | loss | ℓ | ∂ℓ/∂lp |
//! | --- | --- | --- |
//! | `cross_entropy` | `−w·lp` | `−w` |
//! | `importance_sampling` | `−w·r·A` | `−w·r·A` |
//! | `ppo` | `−w·min(r·A, clip(r)·A)` | `−w·r·A` if `r·A ≤ clip(r)·A`, else 0 |
//! | `cispo` | `−w·sg(clip(r))·lp·A` | `−w·clip(r)·A` |
//! | `dro` | `−w·(lp·A − ½β(lp − q)²)` | `−w·(A − β(lp − q))` |
//! | `dppo` | `w·(−sg(k)·adv_tau·A·r + kl_tau·(lp − q)²)` | `w·(−k·adv_tau·A·r + 2·kl_tau·(lp − q))` |
//! | `gspo` | `−w·min(s·A, clip(s)·A)` | `−w·s·A` if `s·A ≤ clip(s)·A`, else 0 |
//! | `stable_reinforce` | `−w·(sg(min(r, 2))·lp·A − ½·kl_coeff·(lp − q)²)` | `−w·(min(r, 2)·A − kl_coeff·(lp − q))` |
//! | `dpo` | of a pair, see [`Preference`] | |
//!
//! `k` is 0 where the token's probability moved further than allowed, up with `A > 0` or down
//! with `A ≤ 0`, and else 1. `s = exp(mean of lp − q)` over the sequence; each position takes
//! its value, and a gradient of its own (GSPO-token, Zheng et al., 2025). `clip` bounds the
//! ratio itself.
//!
//! S is the sum over active positions that have a target; dividing it by their count is left
//! to `optim_step`. Names and formulas are those of the Tinker and Loops dialects, except
//! `stable_reinforce`, whose upstream definition is not public: this one is Lockstep's own.
//!
//! Everything is computed in f64: the ratio of two log-probabilities that are f32 is exact to
//! their own rounding, and sums of many positions keep their digits.

mod coupled;
mod gap;

use crate::types::{LossFn, LossInputs, LossSpec};

pub(super) use coupled::{Preference, Scored};
pub(super) use gap::PolicyGap;

/// A loss with its settings, by what it is a function of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Loss {
    /// Of one position's log-probability.
    Position(PositionLoss),
    /// `gspo`: of all those of a sequence.
    Sequence(Clip),
    /// `dpo`: of all those of two sequences.
    Pair(Preference),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum PositionLoss {
    CrossEntropy,
    ImportanceSampling,
    Ppo(Clip),
    Cispo(Clip),
    Dro { beta: f64 },
    Dppo { mask_high: f64, mask_low: f64, adv_tau: f64, kl_tau: f64 },
    StableReinforce { kl_coeff: f64 },
}

/// Bounds of a ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Clip {
    low: f64,
    high: f64,
}

/// A loss at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LossAt {
    /// ℓ. That of a pair stands at its first active position.
    pub value: f64,
    /// ∂ℓ/∂lp.
    pub derivative: f64,
    /// Whether a bound on the ratio took effect.
    pub clipped: Option<Side>,
}

/// Which bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Low,
    High,
}

/// Largest ratio of `stable_reinforce`.
const STABLE_RATIO: f64 = 2.0;

impl Loss {
    /// The loss that a valid specification asks for.
    pub(super) fn new(spec: &LossSpec) -> Self {
        // Each loss asks for settings of its own, which all have a default.
        let setting = |name| spec.setting(name).unwrap_or(f64::NAN);
        let clip = || Clip { low: setting("clip_low_threshold"), high: setting("clip_high_threshold") };
        let position = match spec.loss_fn {
            LossFn::CrossEntropy => PositionLoss::CrossEntropy,
            LossFn::ImportanceSampling => PositionLoss::ImportanceSampling,
            LossFn::Ppo => PositionLoss::Ppo(clip()),
            LossFn::Cispo => PositionLoss::Cispo(clip()),
            LossFn::Dro => PositionLoss::Dro { beta: setting("beta") },
            LossFn::Dppo => PositionLoss::Dppo {
                mask_high: setting("dppo_mask_high"),
                mask_low: setting("dppo_mask_low"),
                adv_tau: setting("adv_tau"),
                kl_tau: setting("kl_tau"),
            },
            LossFn::StableReinforce => PositionLoss::StableReinforce { kl_coeff: setting("kl_coeff") },
            LossFn::Gspo => return Self::Sequence(clip()),
            LossFn::Dpo => {
                let (beta, label_smoothing) = (setting("beta"), setting("label_smoothing"));
                return Self::Pair(Preference { beta, label_smoothing });
            }
        };
        Self::Position(position)
    }

    /// Whether a ratio is bounded, so that it is worth telling how often.
    pub(super) fn has_bounds(self) -> bool {
        match self {
            Self::Position(loss) => {
                use PositionLoss::{CrossEntropy, Dro, ImportanceSampling};
                !matches!(loss, CrossEntropy | ImportanceSampling | Dro { .. })
            }
            Self::Sequence(_) => true,
            Self::Pair(_) => false,
        }
    }
}

impl PositionLoss {
    /// ℓ and its derivative at `lp`.
    pub(super) fn at(self, lp: f32, inputs: &LossInputs) -> LossAt {
        let (lp, q, advantage) = (f64::from(lp), f64::from(inputs.logprob), f64::from(inputs.advantage));
        let difference = lp - q;
        let ratio = difference.exp();
        let at = match self {
            Self::CrossEntropy => LossAt { value: -lp, derivative: -1.0, clipped: None },
            Self::ImportanceSampling => LossAt::alike(-ratio * advantage),
            Self::Ppo(clip) => clip.given(inputs).surrogate(ratio, advantage),
            Self::Cispo(clip) => {
                let (ratio, clipped) = clip.given(inputs).apply(ratio);
                LossAt { value: -ratio * lp * advantage, derivative: -ratio * advantage, clipped }
            }
            Self::Dro { beta } => LossAt {
                value: 0.5 * beta * difference * difference - lp * advantage,
                derivative: beta * difference - advantage,
                clipped: None,
            },
            Self::Dppo { mask_high, mask_low, adv_tau, kl_tau } => {
                let moved = lp.exp() - q.exp();
                let masked = match advantage > 0.0 {
                    true => (moved > mask_high).then_some(Side::High),
                    false => (moved < -mask_low).then_some(Side::Low),
                };
                // Not multiplied by the mask: the ratio may be infinite.
                let surrogate = if masked.is_some() { 0.0 } else { -adv_tau * advantage * ratio };
                LossAt {
                    value: surrogate + kl_tau * difference * difference,
                    derivative: surrogate + 2.0 * kl_tau * difference,
                    clipped: masked,
                }
            }
            Self::StableReinforce { kl_coeff } => {
                let (ratio, clipped) = Clip { low: 0.0, high: STABLE_RATIO }.apply(ratio);
                LossAt {
                    value: 0.5 * kl_coeff * difference * difference - ratio * lp * advantage,
                    derivative: kl_coeff * difference - ratio * advantage,
                    clipped,
                }
            }
        };
        at.weighted(inputs.weight)
    }
}

impl Clip {
    /// These bounds, or those that the position brings.
    fn given(self, inputs: &LossInputs) -> Self {
        match inputs.clip {
            Some([low, high]) => Self { low: low.into(), high: high.into() },
            None => self,
        }
    }

    /// The ratio within the bounds.
    fn apply(self, ratio: f64) -> (f64, Option<Side>) {
        if ratio < self.low {
            (self.low, Some(Side::Low))
        } else if ratio > self.high {
            (self.high, Some(Side::High))
        } else {
            (ratio, None)
        }
    }

    /// `−min(r·A, clip(r)·A)`; the clipped term has no gradient.
    fn surrogate(self, ratio: f64, advantage: f64) -> LossAt {
        let (bounded, side) = self.apply(ratio);
        if ratio * advantage <= bounded * advantage {
            LossAt::alike(-ratio * advantage)
        } else {
            LossAt { value: -bounded * advantage, derivative: 0.0, clipped: side }
        }
    }
}

impl LossAt {
    /// Of a loss that is proportional to the ratio: `∂r/∂lp = r`.
    fn alike(value: f64) -> Self {
        Self { value, derivative: value, clipped: None }
    }

    fn weighted(self, weight: f32) -> Self {
        let weight = f64::from(weight);
        Self { value: weight * self.value, derivative: weight * self.derivative, ..self }
    }
}

#[cfg(test)]
mod tests;

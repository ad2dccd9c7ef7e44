//! Losses of whole sequences: no position's derivative is known before all are scored.

use crate::types::LossInputs;

use super::{Clip, LossAt};

/// A target with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::model) struct Scored {
    /// `lp`.
    pub logprob: f32,
    /// Absent where it is inactive.
    pub loss: Option<LossInputs>,
    /// `q`, where the position counts in its sequence's ratio.
    pub ratio_logprob: Option<f32>,
}

impl Clip {
    /// `gspo`: the loss at each target of one sequence; absent where inactive.
    ///
    /// A sequence in which no position counts has the ratio 1.
    pub(in crate::model) fn of_sequence(self, targets: &[Scored]) -> Vec<Option<LossAt>> {
        let (mut sum, mut count) = (0.0, 0u64);
        for target in targets {
            if let Some(q) = target.ratio_logprob {
                sum += f64::from(target.logprob) - f64::from(q);
                count += 1;
            }
        }
        let ratio = if count == 0 { 1.0 } else { (sum / count as f64).exp() };
        let at = |target: &Scored| {
            let inputs = target.loss.as_ref()?;
            let at = self.given(inputs).surrogate(ratio, inputs.advantage.into());
            Some(at.weighted(inputs.weight))
        };
        targets.iter().map(at).collect()
    }
}

/// `dpo`: with `P = Σ w·lp` and `R = Σ w·ref` over a sequence's active positions,
///
/// ```text
/// Δ     = (P_chosen − R_chosen) − (P_rejected − R_rejected)
/// ℓ     = −(1 − ls)·ln σ(β·Δ) − ls·ln σ(−β·Δ)
/// ∂ℓ/∂Δ = −β·((1 − ls)·σ(−β·Δ) − ls·σ(β·Δ))
/// ```
///
/// (Rafailov et al., 2023; label smoothing `ls` as in Mitchell, "A note on DPO with noisy
/// preferences", 2023).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::model) struct Preference {
    pub(super) beta: f64,
    pub(super) label_smoothing: f64,
}

/// The loss of one pair.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::model) struct PairLoss {
    /// At each target, chosen before rejected; absent where inactive.
    pub at: Vec<Option<LossAt>>,
    /// `β·(P − R)` of the chosen and the rejected sequence.
    pub rewards: [f64; 2],
}

impl Preference {
    /// The loss of a pair; absent if none of its positions is active.
    pub(in crate::model) fn of_pair(self, chosen: &[Scored], rejected: &[Scored]) -> Option<PairLoss> {
        let active = |target: &&Scored| target.loss.is_some();
        if !chosen.iter().chain(rejected).any(|target| active(&target)) {
            return None;
        }
        let rewards = [chosen, rejected].map(|targets| self.beta * log_ratio(targets));
        let margin = rewards[0] - rewards[1];
        let smoothing = self.label_smoothing;
        let mut value = softplus(-margin) * (1.0 - smoothing) + softplus(margin) * smoothing;
        let d_delta = -self.beta * ((1.0 - smoothing) * sigmoid(-margin) - smoothing * sigmoid(margin));
        let mut at = Vec::with_capacity(chosen.len() + rejected.len());
        for (targets, sign) in [(chosen, 1.0), (rejected, -1.0)] {
            at.extend(targets.iter().map(|target| {
                let derivative = sign * d_delta * f64::from(target.loss?.weight);
                Some(LossAt { value: std::mem::take(&mut value), derivative, clipped: None })
            }));
        }
        Some(PairLoss { at, rewards })
    }
}

/// `Σ w·(lp − ref)` over active positions.
fn log_ratio(targets: &[Scored]) -> f64 {
    let term = |target: &Scored| {
        let inputs = target.loss.as_ref()?;
        Some(f64::from(inputs.weight) * (f64::from(target.logprob) - f64::from(inputs.logprob)))
    };
    targets.iter().filter_map(term).sum()
}

/// `1 / (1 + e^−x)`.
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x) = −ln σ(−x)`, without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(logprob: f32, weight: f32, q: f32, advantage: f32) -> Scored {
        let inputs = LossInputs { weight, logprob: q, advantage, clip: None };
        Scored { logprob, loss: Some(inputs), ratio_logprob: Some(q) }
    }

    const UNREAD: Scored = Scored { logprob: f32::NAN, loss: None, ratio_logprob: None };
    const CLIP: Clip = Clip { low: 0.8, high: 1.2 };

    #[test]
    fn a_sequence_has_one_ratio_and_each_position_its_gradient() {
        // Differences 0.25 and −0.125: their mean is 0.0625.
        let targets = [scored(-1.0, 1.0, -1.25, 2.0), UNREAD, scored(-1.5, 0.5, -1.375, 1.0)];
        let at = CLIP.of_sequence(&targets);
        let ratio = 0.0625f64.exp();
        assert_eq!(at[0], Some(LossAt::alike(-2.0 * ratio)));
        assert_eq!(at[1], None);
        assert_eq!(at[2], Some(LossAt::alike(-0.5 * ratio)));
    }

    #[test]
    fn a_position_without_advantage_may_count_in_the_ratio() {
        let silent = Scored { loss: None, ..scored(-1.0, 1.0, -1.5, 0.0) };
        let at = CLIP.of_sequence(&[scored(-1.0, 1.0, -1.0, -1.0), silent]);
        assert_eq!(at[0].unwrap().value, (0.25f64).exp());
    }

    #[test]
    fn a_clipped_sequence_has_no_gradient() {
        let at = CLIP.of_sequence(&[scored(-1.0, 1.0, -2.0, 1.0), scored(-1.0, 1.0, -2.0, -1.0)]);
        assert_eq!((at[0].unwrap().value, at[0].unwrap().derivative), (-1.2, 0.0));
        assert_eq!(at[0].unwrap().clipped, Some(super::super::Side::High));
        // With a negative advantage the unclipped term is the smaller.
        assert_eq!(at[1], Some(LossAt::alike(1.0f64.exp())));
    }

    #[test]
    fn without_counted_positions_the_ratio_is_one() {
        let uncounted = Scored { ratio_logprob: None, ..scored(-1.0, 1.0, -3.0, 2.0) };
        assert_eq!(CLIP.of_sequence(&[uncounted])[0].unwrap().value, -2.0);
    }

    const PREFERENCE: Preference = Preference { beta: 0.5, label_smoothing: 0.125 };

    fn pair_value(preference: Preference, chosen: &[Scored], rejected: &[Scored]) -> f64 {
        let pair = preference.of_pair(chosen, rejected).unwrap();
        pair.at.iter().flatten().map(|at| at.value).sum()
    }

    #[test]
    fn equal_policies_lose_ln_two() {
        let same = [scored(-1.0, 1.0, -1.0, 0.0), scored(-2.0, 0.5, -2.0, 0.0)];
        for label_smoothing in [0.0, 0.25, 1.0] {
            let preference = Preference { beta: 0.5, label_smoothing };
            let value = pair_value(preference, &same, &same[..1]);
            assert!((value - std::f64::consts::LN_2).abs() < 1e-15, "{value}");
        }
    }

    /// Central differences over ±2⁻¹⁰, exact in f32; the error of the difference is h²/6 times
    /// the third derivative, which β³ keeps below 1e-8 here.
    #[test]
    fn a_pairs_derivatives_agree_with_finite_differences() {
        const STEP: f32 = 1.0 / 1024.0;
        let mut targets =
            [scored(-1.0, 1.0, -1.5, 0.0), scored(-2.0, 0.5, -1.25, 0.0), scored(-0.5, -1.0, -3.0, 0.0)];
        let at = PREFERENCE.of_pair(&targets[..2], &targets[2..]).unwrap().at;
        for i in 0..3 {
            let lp = targets[i].logprob;
            let mut value = |lp| {
                targets[i].logprob = lp;
                pair_value(PREFERENCE, &targets[..2], &targets[2..])
            };
            let difference = (value(lp + STEP) - value(lp - STEP)) / (2.0 * f64::from(STEP));
            targets[i].logprob = lp;
            let derivative = at[i].unwrap().derivative;
            assert!((difference - derivative).abs() <= 1e-6 * derivative.abs(), "{difference} {derivative}");
        }
    }

    #[test]
    fn a_pairs_loss_stands_at_its_first_active_position() {
        let pair = PREFERENCE.of_pair(&[UNREAD], &[UNREAD, scored(-1.0, 1.0, -1.0, 0.0)]).unwrap();
        assert_eq!((pair.at[0], pair.at[1]), (None, None));
        assert!(pair.at[2].unwrap().value > 0.0);
        assert_eq!(PREFERENCE.of_pair(&[UNREAD], &[]), None);
    }

    #[test]
    fn a_hopeless_pair_has_a_finite_loss() {
        let (far, near) = ([scored(-3e38, 1.0, 0.0, 0.0)], [scored(0.0, 1.0, -3e38, 0.0)]);
        let pair = PREFERENCE.of_pair(&far, &near).unwrap();
        assert!(pair.at.iter().flatten().all(|at| at.value.is_finite() && at.derivative.is_finite()));
    }
}

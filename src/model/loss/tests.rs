use super::*;

const fn inputs(weight: f32, logprob: f32, advantage: f32) -> LossInputs {
    LossInputs { weight, logprob, advantage, clip: None }
}

const INPUTS: [LossInputs; 4] =
    [inputs(1.0, -1.25, 2.0), inputs(-0.5, -0.125, -1.5), inputs(0.25, -3.0, 0.75), inputs(2.0, -0.5, -0.25)];
const LOGPROBS: [f32; 4] = [-0.75, -1.5, -2.0, -4.0];
const CLIP: Clip = Clip { low: 0.8, high: 1.2 };

fn position_losses() -> Vec<PositionLoss> {
    let of = |loss_fn| match Loss::new(&LossSpec::new(loss_fn)) {
        Loss::Position(loss) => Some(loss),
        Loss::Sequence(_) | Loss::Pair(_) => None,
    };
    LossFn::ALL.into_iter().filter_map(of).collect()
}

#[test]
fn cross_entropy_is_the_weighted_negative_log_likelihood() {
    let at = PositionLoss::CrossEntropy.at(-2.0, &inputs(0.5, 0.0, 0.0));
    assert_eq!(at, LossAt { value: 1.0, derivative: -0.5, clipped: None });
}

#[test]
fn importance_sampling_weighs_the_advantage_by_the_ratio() {
    let inputs = inputs(1.0, -2.0, 3.0);
    assert_eq!(PositionLoss::ImportanceSampling.at(-2.0, &inputs).value, -3.0);
    let at = PositionLoss::ImportanceSampling.at(-1.0, &inputs);
    assert_eq!(at.value, -3.0 * std::f64::consts::E);
    assert_eq!(at.derivative, at.value);
}

#[test]
fn ppo_clips_what_would_gain_from_moving_further() {
    let ppo = PositionLoss::Ppo(CLIP);
    // e¹ is above the high threshold, e⁻¹ below the low one.
    let at = |lp, advantage| ppo.at(lp, &inputs(1.0, -2.0, advantage));
    assert_eq!(at(-1.0, 2.0), LossAt { value: -2.4, derivative: 0.0, clipped: Some(Side::High) });
    assert_eq!(at(-3.0, -2.0), LossAt { value: 1.6, derivative: 0.0, clipped: Some(Side::Low) });
    assert_eq!(at(-1.0, -2.0), LossAt::alike(2.0 * std::f64::consts::E));
    assert_eq!(at(-3.0, 2.0), LossAt::alike(-2.0 * (-1.0f64).exp()));
}

#[test]
fn thresholds_of_a_position_replace_the_settings() {
    let own = LossInputs { clip: Some([0.5, 4.0]), ..inputs(1.0, -2.0, 2.0) };
    assert_eq!(PositionLoss::Ppo(CLIP).at(-1.0, &own).clipped, None);
    assert_eq!(PositionLoss::Cispo(CLIP).at(-3.0, &own).clipped, Some(Side::Low));
}

#[test]
fn a_weighted_log_likelihood_takes_no_gradient_from_its_ratio() {
    for loss in [PositionLoss::Cispo(CLIP), PositionLoss::StableReinforce { kl_coeff: 0.0 }] {
        for inputs in &INPUTS {
            for lp in LOGPROBS {
                let at = loss.at(lp, inputs);
                assert!((at.derivative * f64::from(lp) - at.value).abs() <= 1e-15 * at.value.abs());
            }
        }
    }
}

#[test]
fn dppo_masks_what_moved_too_far_and_keeps_its_penalty() {
    let dppo = PositionLoss::Dppo { mask_high: 0.2, mask_low: 0.2, adv_tau: 1.0, kl_tau: 0.5 };
    // Probabilities 0.37 and 0.14 are more than 0.2 apart.
    let up = dppo.at(-1.0, &inputs(1.0, -2.0, 3.0));
    assert_eq!(up, LossAt { value: 0.5, derivative: 1.0, clipped: Some(Side::High) });
    let down = dppo.at(-2.0, &inputs(1.0, -1.0, -3.0));
    assert_eq!(down, LossAt { value: 0.5, derivative: -1.0, clipped: Some(Side::Low) });
    assert_eq!(dppo.at(-2.0, &inputs(1.0, -1.0, 3.0)).clipped, None);
}

/// Central differences over ±2⁻¹⁰, which f32 represents exactly here; the error of the
/// difference is h²/6 times the third derivative, under 2e-7 of these values. No ratio here is
/// within a step of a threshold. Losses that stop a gradient are no function of lp alone.
#[test]
fn derivatives_agree_with_finite_differences() {
    const STEP: f32 = 1.0 / 1024.0;
    let stops =
        |loss: &PositionLoss| matches!(loss, PositionLoss::Cispo(_) | PositionLoss::StableReinforce { .. });
    for loss in position_losses().into_iter().filter(|loss| !stops(loss)) {
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

/// r overflows f64 at a difference of 710: where it is clipped or masked away, nothing of it
/// may remain.
#[test]
fn a_clipped_ratio_may_be_infinite() {
    let dppo = PositionLoss::Dppo { mask_high: 0.2, mask_low: 0.2, adv_tau: 1.0, kl_tau: 1e-3 };
    let stable = PositionLoss::StableReinforce { kl_coeff: 0.0 };
    for loss in [PositionLoss::Ppo(CLIP), PositionLoss::Cispo(CLIP), dppo, stable] {
        let at = loss.at(-0.5, &inputs(1.0, -1000.0, 1.0));
        assert!(at.value.is_finite() && at.derivative.is_finite(), "{loss:?}: {at:?}");
        assert_eq!(at.clipped, Some(Side::High), "{loss:?}");
    }
}

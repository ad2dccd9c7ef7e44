use crate::types::InvalidInput;

use super::{LossFn, LossSpec};

/// A number that a loss takes in [`LossSpec::config`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSetting {
    /// Its key.
    pub name: &'static str,
    /// Its value where the caller gives none: that of the Loops client.
    pub default: f64,
    /// Smallest and largest value.
    pub range: (f64, f64),
}

const fn setting(name: &'static str, default: f64, least: f64, most: f64) -> LossSetting {
    LossSetting { name, default, range: (least, most) }
}

/// 1: log-probabilities are reported of every target, 0: of active ones, and 0.0 elsewhere. What
/// nobody reads need not be computed: a sequence without advantage then costs nothing.
/// (`cross_entropy` reports them all: that is how sequences are scored.)
const SCORE_INACTIVE: LossSetting = setting("score_inactive", 0.0, 0.0, 1.0);

/// The thresholds bound the ratio itself, not its distance from 1.
const CLIP_LOW: LossSetting = setting("clip_low_threshold", 0.8, 0.0, f64::MAX);
const CLIP_HIGH: LossSetting = setting("clip_high_threshold", 1.2, 0.0, f64::MAX);

impl LossFn {
    /// What [`LossSpec::config`] may hold.
    pub fn settings(self) -> &'static [LossSetting] {
        match self {
            Self::CrossEntropy => &[],
            Self::ImportanceSampling => &const { [SCORE_INACTIVE] },
            Self::Ppo | Self::Cispo | Self::Gspo => &const { [CLIP_LOW, CLIP_HIGH, SCORE_INACTIVE] },
            Self::Dro => &const { [setting("beta", 0.05, 0.0, f64::MAX), SCORE_INACTIVE] },
            // The masks bound a change of probability, which is at most 1.
            Self::Dppo => {
                &const {
                    [
                        setting("dppo_mask_high", 0.2, 0.0, 1.0),
                        setting("dppo_mask_low", 0.2, 0.0, 1.0),
                        setting("adv_tau", 1.0, 0.0, f64::MAX),
                        setting("kl_tau", 1e-3, 0.0, f64::MAX),
                        SCORE_INACTIVE,
                    ]
                }
            }
            Self::Dpo => {
                &const {
                    [
                        setting("beta", 0.1, 0.0, f64::MAX),
                        setting("label_smoothing", 0.0, 0.0, 1.0),
                        SCORE_INACTIVE,
                    ]
                }
            }
            Self::StableReinforce => &const { [setting("kl_coeff", 0.0, 0.0, f64::MAX), SCORE_INACTIVE] },
        }
    }
}

impl LossSpec {
    /// A setting's value: the caller's, else its default; absent if the loss has no such
    /// setting.
    pub fn setting(&self, name: &str) -> Option<f64> {
        let setting = self.loss_fn.settings().iter().find(|setting| setting.name == name)?;
        Some(self.config.get(name).copied().unwrap_or(setting.default))
    }

    pub(super) fn validate_settings(&self) -> Result<(), InvalidInput> {
        let settings = self.loss_fn.settings();
        for (name, value) in &self.config {
            let refused = |problem| Err(InvalidInput::new(format!("loss_fn_config.{name}"), problem));
            let Some(setting) = settings.iter().find(|setting| setting.name == name) else {
                let known = match settings {
                    [] => "none".to_owned(),
                    some => some.iter().map(|setting| setting.name).collect::<Vec<_>>().join(", "),
                };
                return refused(format!("`{}` has no such setting; it knows {known}", self.loss_fn));
            };
            let (least, most) = setting.range;
            if !value.is_finite() {
                return refused(format!("must be a finite number, got {value}"));
            }
            if *value < least {
                return refused(format!("must be at least {least}, got {value}"));
            }
            if *value > most {
                return refused(format!("must be at most {most}, got {value}"));
            }
        }
        let thresholds = (self.setting("clip_low_threshold"), self.setting("clip_high_threshold"));
        if let (Some(low), Some(high)) = thresholds
            && low > high
        {
            let problem = format!("must be at most `clip_high_threshold`, which is {high}, got {low}");
            return Err(InvalidInput::new("loss_fn_config.clip_low_threshold", problem));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(loss_fn: LossFn, name: &str, value: f64) -> String {
        let mut loss = LossSpec::new(loss_fn);
        loss.config.insert(name.into(), value);
        loss.validate().unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_within_their_ranges() {
        for loss_fn in LossFn::ALL {
            LossSpec::new(loss_fn).validate().unwrap();
            for setting in loss_fn.settings() {
                let mut loss = LossSpec::new(loss_fn);
                assert_eq!(loss.setting(setting.name), Some(setting.default));
                loss.config.insert(setting.name.into(), setting.default);
                loss.validate().unwrap();
            }
        }
    }

    #[test]
    fn a_given_value_replaces_the_default() {
        let mut loss = LossSpec::new(LossFn::Dpo);
        loss.config.insert("beta".into(), 0.5);
        assert_eq!((loss.setting("beta"), loss.setting("label_smoothing")), (Some(0.5), Some(0.0)));
        assert_eq!(loss.setting("kl_tau"), None);
    }

    #[test]
    fn refuses_an_unknown_setting() {
        assert_eq!(
            refusal(LossFn::CrossEntropy, "beta", 0.1),
            "`loss_fn_config.beta`: `cross_entropy` has no such setting; it knows none"
        );
        assert_eq!(
            refusal(LossFn::ImportanceSampling, "beta", 0.1),
            "`loss_fn_config.beta`: `importance_sampling` has no such setting; it knows score_inactive"
        );
        assert_eq!(
            refusal(LossFn::Dpo, "kl_tau", 0.1),
            "`loss_fn_config.kl_tau`: `dpo` has no such setting; it knows beta, label_smoothing, score_inactive"
        );
    }

    #[test]
    fn refuses_settings_that_are_not_finite() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(
                refusal(LossFn::Dro, "beta", value),
                format!("`loss_fn_config.beta`: must be a finite number, got {value}")
            );
        }
    }

    #[test]
    fn refuses_settings_out_of_range() {
        assert_eq!(
            refusal(LossFn::Dppo, "kl_tau", -0.5),
            "`loss_fn_config.kl_tau`: must be at least 0, got -0.5"
        );
        assert_eq!(
            refusal(LossFn::Dpo, "label_smoothing", 1.5),
            "`loss_fn_config.label_smoothing`: must be at most 1, got 1.5"
        );
    }

    #[test]
    fn refuses_thresholds_in_the_wrong_order() {
        assert_eq!(
            refusal(LossFn::Ppo, "clip_low_threshold", 1.5),
            "`loss_fn_config.clip_low_threshold`: must be at most `clip_high_threshold`, which is 1.2, got 1.5"
        );
    }
}

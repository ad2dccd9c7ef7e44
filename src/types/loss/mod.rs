//! Losses by name, their settings, and the data that they are given.

mod data;
mod settings;

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::InvalidInput;

pub use data::{CheckedDatum, CheckedTarget, DataLimits, LossInputs};
pub use settings::LossSetting;

/// A loss function by its wire name. Formulas stand with their implementation in
/// `model::loss`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossFn {
    /// Negative log-likelihood of the targets, weighted.
    CrossEntropy,
    /// REINFORCE with an importance ratio between the trainer's and the sampler's policy.
    ImportanceSampling,
    /// The clipped surrogate of Schulman et al. (2017).
    Ppo,
    /// The log-likelihood weighted by a clipped ratio that takes no gradient (MiniMax, 2025).
    Cispo,
    /// The advantage with a quadratic penalty on the log-ratio (Richemond et al., 2024).
    Dro,
    /// The importance-weighted advantage, masked where probabilities moved too far, with a
    /// quadratic penalty on the log-ratio.
    Dppo,
    /// Preferences between pairs of sequences (Rafailov et al., 2023).
    Dpo,
    /// The clipped surrogate with one ratio a sequence (Zheng et al., 2025).
    Gspo,
    /// The log-likelihood weighted by a ratio of at most 2, with an optional penalty.
    StableReinforce,
}

impl LossFn {
    /// Every loss.
    pub const ALL: [Self; 9] = [
        Self::CrossEntropy,
        Self::ImportanceSampling,
        Self::Ppo,
        Self::Cispo,
        Self::Dro,
        Self::Dppo,
        Self::Dpo,
        Self::Gspo,
        Self::StableReinforce,
    ];

    /// The name on the wire: `cross_entropy`, ….
    pub fn name(self) -> &'static str {
        match self {
            Self::CrossEntropy => "cross_entropy",
            Self::ImportanceSampling => "importance_sampling",
            Self::Ppo => "ppo",
            Self::Cispo => "cispo",
            Self::Dro => "dro",
            Self::Dppo => "dppo",
            Self::Dpo => "dpo",
            Self::Gspo => "gspo",
            Self::StableReinforce => "stable_reinforce",
        }
    }

    /// Consecutive datums that only together have a loss: 2 for `dpo`, whose data alternate
    /// between chosen and rejected. Whoever cuts a call's data cuts between such groups.
    pub fn datums_together(self) -> usize {
        match self {
            Self::Dpo => 2,
            _ => 1,
        }
    }

    /// Names of the inputs that a datum must bring.
    pub fn required_inputs(self) -> &'static [&'static str] {
        match self {
            Self::CrossEntropy => &[],
            Self::Dpo => &["ref_logprobs"],
            Self::ImportanceSampling
            | Self::Ppo
            | Self::Cispo
            | Self::Dro
            | Self::Dppo
            | Self::Gspo
            | Self::StableReinforce => &["logprobs", "advantages"],
        }
    }

    /// Names of the inputs that a datum may bring.
    pub fn optional_inputs(self) -> &'static [&'static str] {
        match self {
            Self::CrossEntropy | Self::Dpo => &["target_tokens", "weights"],
            Self::ImportanceSampling | Self::Dro | Self::Dppo | Self::StableReinforce => {
                &["target_tokens", "mask", "weights"]
            }
            Self::Ppo | Self::Cispo => {
                &["target_tokens", "mask", "weights", "clip_low_threshold", "clip_high_threshold"]
            }
            Self::Gspo => &[
                "target_tokens",
                "mask",
                "weights",
                "clip_low_threshold",
                "clip_high_threshold",
                "sequence_ratio_mask",
            ],
        }
    }

    /// Whether it compares the trainer's policy with the one that sampled the data.
    pub fn is_of_sampled_data(self) -> bool {
        !matches!(self, Self::CrossEntropy | Self::Dpo)
    }
}

impl fmt::Display for LossFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LossFn {
    type Err = InvalidInput;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|loss| loss.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            InvalidInput::new("loss_fn", format!("must be one of {known}, got {name:?}"))
        })
    }
}

/// A loss function and its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossSpec {
    /// Which loss.
    pub loss_fn: LossFn,
    /// Settings by name ([`LossFn::settings`]); what is absent takes its default, unknown
    /// names and non-finite values are refused.
    #[serde(default)]
    pub config: BTreeMap<String, f64>,
    /// Gradients are added unscaled and not counted: `optim_step` does not divide them by
    /// the number of active tokens.
    #[serde(default)]
    pub skip_token_normalization: bool,
    /// How many most likely tokens to report per position; 0 to 20.
    #[serde(default)]
    pub top_k_logprobs: u32,
}

/// Largest [`LossSpec::top_k_logprobs`].
const MAX_TOP_K_LOGPROBS: u32 = 20;

impl LossSpec {
    /// `loss_fn` with its default settings: a token mean, without alternatives.
    pub fn new(loss_fn: LossFn) -> Self {
        Self { loss_fn, config: BTreeMap::new(), skip_token_normalization: false, top_k_logprobs: 0 }
    }

    /// Refuses settings that the loss does not know, that are not finite or out of their range,
    /// and more than 20 alternatives.
    pub fn validate(&self) -> Result<(), InvalidInput> {
        self.validate_settings()?;
        if self.top_k_logprobs > MAX_TOP_K_LOGPROBS {
            let problem = format!("must be at most {MAX_TOP_K_LOGPROBS}, got {}", self.top_k_logprobs);
            return Err(InvalidInput::new("top_k_logprobs", problem));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_their_json_and_parse_back() {
        for loss in LossFn::ALL {
            assert_eq!(serde_json::to_string(&loss).unwrap(), format!("\"{loss}\""));
            assert_eq!(loss.name().parse::<LossFn>().unwrap(), loss);
        }
    }

    #[test]
    fn refuses_an_unknown_loss() {
        let error = "cross_entrpy".parse::<LossFn>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`loss_fn`: must be one of cross_entropy, importance_sampling, ppo, cispo, dro, dppo, dpo, gspo, \
             stable_reinforce, got \"cross_entrpy\""
        );
    }

    #[test]
    fn refuses_more_than_twenty_alternatives() {
        let mut loss = LossSpec::new(LossFn::CrossEntropy);
        loss.top_k_logprobs = 20;
        loss.validate().unwrap();
        loss.top_k_logprobs = 21;
        assert_eq!(loss.validate().unwrap_err().to_string(), "`top_k_logprobs`: must be at most 20, got 21");
    }

    #[test]
    fn absent_fields_take_the_defaults() {
        let loss: LossSpec = serde_json::from_str(r#"{"loss_fn": "cross_entropy"}"#).unwrap();
        assert_eq!(loss, LossSpec::new(LossFn::CrossEntropy));
    }
}

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::InvalidInput;

/// A loss function by its wire name. Formulas stand with their implementation in
/// `model::loss`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossFn {
    /// Negative log-likelihood of the targets, weighted.
    CrossEntropy,
    /// REINFORCE with an importance ratio between the trainer's and the sampler's policy.
    ImportanceSampling,
}

impl LossFn {
    /// Every loss.
    pub const ALL: [Self; 2] = [Self::CrossEntropy, Self::ImportanceSampling];

    /// The name on the wire: `cross_entropy`, ….
    pub fn name(self) -> &'static str {
        match self {
            Self::CrossEntropy => "cross_entropy",
            Self::ImportanceSampling => "importance_sampling",
        }
    }

    /// Names of the settings that `LossSpec::config` may hold.
    fn settings(self) -> &'static [&'static str] {
        match self {
            Self::CrossEntropy | Self::ImportanceSampling => &[],
        }
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
    /// Settings by name; unknown names and non-finite values are refused.
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

    /// Refuses settings that the loss does not know, settings that are not finite, and more
    /// than 20 alternatives.
    pub fn validate(&self) -> Result<(), InvalidInput> {
        let settings = self.loss_fn.settings();
        for (name, value) in &self.config {
            let field = format!("loss_fn_config.{name}");
            if !settings.contains(&name.as_str()) {
                let known = match settings {
                    [] => "none".to_owned(),
                    some => some.join(", "),
                };
                let problem = format!("`{}` has no such setting; it knows {known}", self.loss_fn);
                return Err(InvalidInput::new(field, problem));
            }
            if !value.is_finite() {
                return Err(InvalidInput::new(field, format!("must be a finite number, got {value}")));
            }
        }
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
            "`loss_fn`: must be one of cross_entropy, importance_sampling, got \"cross_entrpy\""
        );
    }

    #[test]
    fn refuses_an_unknown_setting() {
        let mut loss = LossSpec::new(LossFn::ImportanceSampling);
        loss.config.insert("beta".into(), 0.1);
        assert_eq!(
            loss.validate().unwrap_err().to_string(),
            "`loss_fn_config.beta`: `importance_sampling` has no such setting; it knows none"
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

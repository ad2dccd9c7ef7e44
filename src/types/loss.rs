use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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

/// A loss function and its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossSpec {
    /// Which loss.
    pub loss_fn: LossFn,
    /// Settings by name; unknown names and non-finite values are refused.
    pub config: BTreeMap<String, f64>,
    /// Gradients are added unscaled and not counted: `optim_step` does not divide them by
    /// the number of active tokens.
    pub skip_token_normalization: bool,
    /// How many most likely tokens to report per position; 0 to 20.
    pub top_k_logprobs: u32,
}

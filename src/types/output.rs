use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::TensorData;

/// What a loss reports for one datum, by name (`logprobs` of shape `[N]` or `[N, K]`).
pub type DatumOutput = BTreeMap<String, TensorData>;

/// Result of `forward` and `forward_backward`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForwardBackwardOutput {
    /// Token mean of the loss (its sum under `skip_token_normalization`); 0 if no position
    /// is active.
    pub loss: f64,
    /// Name of the loss.
    pub loss_fn_output_type: String,
    /// One entry per datum, in order.
    pub loss_fn_outputs: Vec<DatumOutput>,
    /// Finite figures by name; `loss` is among them.
    pub metrics: BTreeMap<String, f64>,
}

/// Result of `optim_step`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimStepResponse {
    /// `step`, `learning_rate`, `grad_norm` (before clipping) and more.
    pub metrics: BTreeMap<String, f64>,
}

/// Result of `save_state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveWeightsResponse {
    /// `bt://loops:<run>/weights/<name>`.
    pub path: String,
}

/// Result of `save_weights_for_sampler`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveWeightsForSamplerResponse {
    /// `bt://loops:<run>/sampler_weights/<name>`.
    pub path: String,
    /// The step count of the weights that were saved.
    pub version: u64,
}

/// Result of `load_state` and `load_state_with_optimizer`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadWeightsResponse {
    /// The step after loading.
    pub step: u64,
}

/// Result of making a fresh adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitTrainerServerResponse {
    /// Always 0.
    pub step: u64,
    /// The adapter's rank.
    pub lora_rank: u32,
}

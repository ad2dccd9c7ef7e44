use serde::{Deserialize, Serialize};

/// Parameters of one Adam step with decoupled weight decay and bias correction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdamParams {
    /// Step size; at least 0. 0 leaves the weights as they are and still counts as a step.
    pub learning_rate: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment; above 0.
    pub eps: f64,
    /// Decoupled decay, multiplied by the learning rate; at least 0.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub grad_clip_norm: f64,
}

impl Default for AdamParams {
    /// The Loops client's defaults.
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-12,
            weight_decay: 0.0,
            grad_clip_norm: 1.0,
        }
    }
}

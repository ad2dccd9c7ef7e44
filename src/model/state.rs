use std::sync::Arc;

use crate::types::{AdamParams, Digest, OperationError, OptimStepResponse};

use super::{Adapter, AdapterError, LoraLayout, ModelConfig, ParamVector};

/// Whether accumulated gradients are divided by the token count at `optim_step`; the two
/// never meet in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientKind {
    /// Divided by the number of active tokens.
    TokenMean,
    /// Taken as the sum (`skip_token_normalization`).
    Sum,
}

/// A run's state: everything that replay must bring back. All vectors have `layout.len()`
/// values.
#[derive(Clone)]
pub struct TrainState {
    pub layout: Arc<LoraLayout>,
    pub weights: ParamVector,
    /// First and second moments.
    pub m: ParamVector,
    pub v: ParamVector,
    /// Steps of the current moments, for the bias correction.
    pub moment_steps: u64,
    /// Sum of gradients since the last `optim_step`; absent: zero.
    pub gradient: Option<ParamVector>,
    /// Active tokens counted since the last `optim_step`.
    pub tokens: u64,
    pub kind: Option<GradientKind>,
    pub step: u64,
}

impl TrainState {
    /// A fresh adapter, step 0.
    pub fn fresh(layout: Arc<LoraLayout>) -> Self {
        let _ = layout;
        todo!()
    }

    /// The state after adding one operation's gradient sum. Refuses mixing kinds.
    pub fn accumulate(
        &self,
        gradient: &[f32],
        tokens: u64,
        kind: GradientKind,
    ) -> Result<Self, OperationError> {
        let _ = (gradient, tokens, kind);
        todo!()
    }

    /// The state after one optimiser step, and its metrics. A non-finite gradient norm is
    /// refused (`NotFinite`); the caller then keeps this state with the gradient cleared.
    pub fn optim_step(&self, adam: &AdamParams) -> Result<(Self, OptimStepResponse), OperationError> {
        let _ = adam;
        todo!()
    }

    /// The same weights with moments and gradient dropped and step 0.
    pub fn without_optimizer(&self) -> Self {
        todo!()
    }

    /// The adapter of the present weights.
    pub fn adapter(&self) -> Adapter {
        todo!()
    }

    /// SHA-256 over all of it.
    pub fn digest(&self) -> Digest {
        todo!()
    }

    /// Canonical bytes (safetensors).
    pub fn to_bytes(&self) -> Vec<u8> {
        todo!()
    }

    /// Reads [`TrainState::to_bytes`].
    pub fn from_bytes(model: &ModelConfig, bytes: &[u8]) -> Result<Self, AdapterError> {
        let _ = (model, bytes);
        todo!()
    }
}

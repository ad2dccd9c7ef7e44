use std::ops::Range;

use crate::{
    kernels::Team,
    types::{Datum, DatumOutput, InvalidInput, LossSpec, OperationError},
};

use super::{AdapterRows, BaseModel, ModelConfig, Workspace};

/// A datum checked against the loss and the model, ready to compute.
pub struct Example {}

impl Example {
    /// Positions of its sequence: what the budget of a micro-batch counts.
    pub fn tokens(&self) -> usize {
        todo!()
    }
}

/// What one micro-batch contributes.
#[derive(Debug, Clone, Default)]
pub struct MicroBatchOutput {
    /// Σ over active positions, in f64, in a fixed order.
    pub loss_sum: f64,
    /// Active positions.
    pub active: u64,
    /// One per example, in order.
    pub outputs: Vec<DatumOutput>,
    /// Further sums by name (for the sampler/trainer gap: `kl_sum`, …), added over micro-batches.
    pub sums: std::collections::BTreeMap<String, f64>,
}

/// Checks `data` (the whole call) and makes examples of it: empty data, unknown config keys,
/// tokens outside the vocabulary, shapes, lengths, NaN at active positions.
pub fn prepare(
    config: &ModelConfig,
    max_seq_len: usize,
    loss: &LossSpec,
    data: &[Datum],
) -> Result<Vec<Example>, InvalidInput> {
    let _ = (config, max_seq_len, loss, data);
    todo!()
}

/// Cuts examples into micro-batches: consecutive, at most `budget` tokens each; one over the
/// budget is alone. A pure function of its arguments.
pub fn cut_micro_batches(examples: &[Example], budget: usize) -> Vec<Range<usize>> {
    let _ = (examples, budget);
    todo!()
}

/// Loss and log-probabilities of one micro-batch; with `gradient` (`layout.len()` zeroed
/// values) also the gradient of the loss's sum.
pub fn run_micro_batch(
    model: &BaseModel,
    adapter: AdapterRows<'_>,
    loss: &LossSpec,
    examples: &[Example],
    gradient: Option<&mut [f32]>,
    workspace: &mut Workspace,
    team: &Team,
) -> Result<MicroBatchOutput, OperationError> {
    let _ = (model, adapter, loss, examples, gradient, workspace, team);
    todo!()
}

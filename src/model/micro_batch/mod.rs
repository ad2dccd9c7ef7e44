mod output;

use std::ops::Range;

use crate::{
    kernels::Team,
    types::{Datum, InvalidInput, LossSpec, OperationError},
};

use super::{AdapterRows, BaseModel, ModelConfig, Workspace};

pub use output::MicroBatchOutput;

/// A datum checked against the loss and the model, ready to compute.
pub struct Example {}

impl Example {
    /// Positions to compute: what the budget of a micro-batch counts, and ranks weigh. 1 for an
    /// example of which nothing is to be computed, so that no micro-batch weighs nothing.
    pub fn tokens(&self) -> usize {
        todo!()
    }
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

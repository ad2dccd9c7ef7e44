use crate::{
    kernels::Team,
    model::{Adapter, BaseModel, KvCache, LoraLayout},
};

/// Sequences packed end to end, without padding; each sees only itself.
pub struct Batch<'a> {
    pub sequences: Vec<BatchSequence<'a>>,
}

/// One sequence's new rows in a [`Batch`].
pub struct BatchSequence<'a> {
    /// Token ids of the new rows; at least one.
    pub tokens: &'a [u32],
    /// Keys and values of the positions before, to which this call appends. Absent when
    /// training: the rows are the whole sequence.
    pub kv_cache: Option<&'a mut KvCache>,
    /// The adapter of these rows; absent: the base model.
    pub adapter: Option<AdapterRows<'a>>,
}

/// LoRA weights as the decoder reads them.
#[derive(Clone, Copy)]
pub struct AdapterRows<'a> {
    pub layout: &'a LoraLayout,
    /// `layout.len()` values.
    pub values: &'a [f32],
}

/// What the forward keeps for the backward: the activations of one micro-batch.
#[derive(Default)]
pub struct Tape {}

/// Buffers that are used again from call to call, so that steady state allocates nothing.
#[derive(Default)]
pub struct Workspace {}

impl<'a> From<&'a Adapter> for AdapterRows<'a> {
    fn from(adapter: &'a Adapter) -> Self {
        let _ = adapter;
        todo!()
    }
}

/// Runs the decoder over `batch` and returns the final hidden states after the last norm,
/// `[rows, hidden]`, rows in the batch's order.
///
/// With a `tape`, records what [`backward`] needs (all rows must then share one adapter and
/// have no cache). A row's bits depend on its sequence, its adapter and the kernel path only:
/// not on its neighbours, the number of rows, the team, or on whether earlier positions came
/// through the cache in one call or several.
pub fn forward(
    model: &BaseModel,
    batch: &mut Batch<'_>,
    tape: Option<&mut Tape>,
    workspace: &mut Workspace,
    team: &Team,
) -> Vec<f32> {
    let _ = (model, batch, tape, workspace, team);
    todo!()
}

/// Adds the gradient with respect to the adapter's values to `gradient` (`layout.len()`
/// values), given `d_hidden`, the gradient with respect to what [`forward`] returned.
pub fn backward(
    model: &BaseModel,
    adapter: AdapterRows<'_>,
    tape: &mut Tape,
    d_hidden: &[f32],
    gradient: &mut [f32],
    workspace: &mut Workspace,
    team: &Team,
) {
    let _ = (model, adapter, tape, d_hidden, gradient, workspace, team);
    todo!()
}

/// Logits of the chosen `rows` of `hidden`, `[rows.len(), vocab]` into `logits`.
pub fn head_logits(
    model: &BaseModel,
    hidden: &[f32],
    rows: &[usize],
    logits: &mut Vec<f32>,
    workspace: &mut Workspace,
    team: &Team,
) {
    let _ = (model, hidden, rows, logits, workspace, team);
    todo!()
}

/// Log-probabilities of chosen targets, in chunks of rows so that the full logits never exist.
///
/// `targets[i] = (row of hidden, token id)`, sorted by row. For each, `logprob_i` is written
/// to `logprobs`, and `factor(i, logprob_i)` returns ∂S/∂logprob_i. If `d_hidden` is given
/// (`[rows, hidden]`, zeroed by the caller), ∂S/∂hidden is added to it:
/// `Σ_i factor_i · (onehot(token_i) − softmax(row_i)) · W_head`. Targets whose factor is 0
/// cost no backward.
///
/// With `top_k` above 0, `alternatives` receives for each target's row the `top_k` most
/// likely (token, logprob), descending, lowest id first on a tie.
#[allow(clippy::too_many_arguments)]
pub fn head_logprobs(
    model: &BaseModel,
    hidden: &[f32],
    targets: &[(usize, u32)],
    factor: &mut dyn FnMut(usize, f32) -> f32,
    logprobs: &mut Vec<f32>,
    d_hidden: Option<&mut [f32]>,
    top_k: usize,
    alternatives: &mut Vec<Vec<(u32, f32)>>,
    workspace: &mut Workspace,
    team: &Team,
) {
    let _ = (model, hidden, targets, factor, logprobs, d_hidden, top_k, alternatives, workspace, team);
    todo!()
}

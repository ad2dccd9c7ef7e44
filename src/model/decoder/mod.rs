//! The decoder, forward and backward, with low-rank adapters on its linear layers.
//!
//! One forward serves training and sampling; a [`Tape`] makes the difference. The backward goes
//! layer by layer over what the tape holds and computes again what is cheap (norms, the gated
//! activation, attention's weights), so that memory is a formula: 23 KB per token and layer for
//! SmolLM2-135M. With activation checkpointing a tape holds each layer's input alone (2.3 KB), and the
//! backward begins a layer by running its forward again.
//!
//! Legend of shapes: r rows (positions of all sequences, packed), d hidden width, q query heads
//! times head width, k key heads times head width, i intermediate width, v vocabulary, s slots (one
//! row at one expert), e experts.

mod backward;
mod experts;
mod forward;
mod head;
mod plan;
mod recompute;
mod tape;
#[cfg(test)]
pub(super) mod tests;

use crate::model::{Adapter, KvCache, LoraLayout, ParamVector};

pub use backward::backward;
pub use forward::forward;
pub(super) use head::{HeadChunk, head_chunk_rows, likeliest_tokens};
pub use head::{HeadGradient, HeadRequest, HeadScores, head_logits, head_logprobs};
pub use tape::{Tape, Workspace};

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
    pub values: &'a ParamVector,
}

impl<'a> From<&'a Adapter> for AdapterRows<'a> {
    fn from(adapter: &'a Adapter) -> Self {
        Self { layout: &adapter.layout, values: &adapter.values }
    }
}

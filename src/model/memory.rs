//! What a model and its runs take of a node's memory, as formulas over the configuration.
//!
//! ```text
//!   node  =  weights of each model                                     shared by all its runs, see below
//!         +  4 P of each run that a rank holds                         weights, both moments, gradient
//!         +  of each rank at work: rows · (row + rank · row_of_rank)   activations of a micro-batch
//!                                  + workspace + 14 P                  the head's logits; sums on their way
//! ```
//!
//! A row is the activations of every layer; with activation checkpointing the input of every layer, and
//! the activations of one.
//!
//! Nodes of one machine that have the same data directory map the weights from one file, so they are in its memory
//! once (`pack/`). Each is reckoned with the whole of them all the same: which nodes share is not known to whoever
//! plans, and a node that can't write the file has its own.
//!
//! P is the adapter's values; everything is f32 but the base weights' matrices: their bytes come from the files
//! ([`Library::footprint`](super::Library::footprint)). A micro-batch has as many rows as its budget of
//! tokens, or as the longest sequence, if that is longer. Caches of replicas are bounded by themselves and come
//! on top.

use crate::types::{LoraConfig, LoraTarget};

use super::{ComputeOptions, ModelConfig, decoder::head_chunk_rows};

/// Vectors of the adapter's size that a run's state has: weights, two moments, the gradient.
const STATE_VECTORS: u64 = 4;

/// And those of a rank at work: one partial sum for each level of a tree over 1,024
/// micro-batches, the gradient of the present one, the sum, the next gradient, one to serialise.
const WORK_VECTORS: u64 = 14;

/// Outputs of a packed matrix come in panels of this many.
const PANEL: u64 = 32;

/// Bytes of an f32.
const F32: u64 = 4;

/// What a base model costs; numbers that whoever plans needs no model to reckon with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of the weights in memory.
    pub weights: u64,
    /// Values of an adapter on each target, for each unit of its rank; in the order of
    /// [`LoraTarget::ALL`].
    pub adapter_values: [u64; 8],
    /// Bytes of a row of a micro-batch, adapters aside.
    pub row: u64,
    /// Bytes of a row for each unit of the rank.
    pub row_of_rank: u64,
    /// Bytes of a rank at work, however few its rows.
    pub workspace: u64,
    /// `row` and `row_of_rank` with activation checkpointing; absent where they are that already.
    pub checkpointed: Option<(u64, u64)>,
}

/// What a run takes of each rank that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunMemory {
    /// Bytes of its state, as long as the rank holds it.
    pub state: u64,
    /// Bytes while one of its operations runs.
    pub work: u64,
    /// Bytes of a GPU that a rank keeps for adding up gradients with ranks on other GPUs.
    pub link: u64,
}

impl Footprint {
    /// The same model on a node with activation checkpointing.
    pub fn with_checkpointing(self) -> Self {
        let (row, row_of_rank) = self.checkpointed.unwrap_or((self.row, self.row_of_rank));
        Self { row, row_of_rank, checkpointed: None, ..self }
    }

    /// The same model on a node whose GPU computes: the weights pass through the host's memory, and a run's state stays
    /// in it.
    pub fn beside_a_gpu(self) -> Self {
        Self { row: 0, row_of_rank: 0, workspace: 0, checkpointed: None, ..self }
    }

    /// Values of an adapter.
    pub fn values(&self, lora: &LoraConfig) -> u64 {
        let rank = u64::from(lora.rank);
        let of_target = |target: &LoraTarget| self.adapter_values[*target as usize].saturating_mul(rank);
        lora.targets.iter().map(of_target).fold(0, u64::saturating_add)
    }

    /// The memory of a run with this adapter and micro-batches of at most `rows` rows.
    pub fn run(&self, lora: &LoraConfig, rows: u64) -> RunMemory {
        let row = self.row.saturating_add(self.row_of_rank.saturating_mul(u64::from(lora.rank)));
        let adapter = self.values(lora).saturating_mul(F32);
        RunMemory {
            state: adapter.saturating_mul(STATE_VECTORS),
            work: row
                .saturating_mul(rows)
                .saturating_add(self.workspace)
                .saturating_add(adapter.saturating_mul(WORK_VECTORS)),
            link: 0,
        }
    }
}

impl ModelConfig {
    /// What the model costs in memory of a node that computes so.
    pub fn footprint(&self, options: &ComputeOptions) -> Footprint {
        let layers = || (0..self.num_layers).map(|layer| LayerValues::of(self, layer));
        let hidden = self.hidden_size as u64;
        let vocabulary = matrix(self.vocab_size as u64, hidden);
        let tables = if self.tie_word_embeddings { vocabulary } else { 2 * vocabulary };
        let most = |value: fn(&LayerValues) -> u64| layers().map(|layer| value(&layer)).max().unwrap_or(0);
        let sum = |value: fn(&LayerValues) -> u64| layers().map(|layer| value(&layer)).sum::<u64>();
        // Residual streams of the workspace, in both directions, and the results of both.
        let streams = 8 * hidden;
        let rotary = self.head_dim as u64;
        let chunk = head_chunk_rows(self.vocab_size) as u64;
        let passing = (
            F32 * (most(|layer| layer.passing) + streams + rotary),
            F32 * most(|layer| layer.passing_of_rank),
        );
        let kept =
            (F32 * sum(|layer| layer.kept) + passing.0, F32 * sum(|layer| layer.kept_of_rank) + passing.1);
        // Of each layer its input, and one layer at a time as a whole.
        let checkpointed = (
            F32 * (self.num_layers as u64 * hidden + most(|layer| layer.kept)) + passing.0,
            F32 * most(|layer| layer.kept_of_rank) + passing.1,
        );
        let (row, row_of_rank) = if options.activation_checkpointing { checkpointed } else { kept };
        Footprint {
            weights: options.dtype.bytes() as u64 * (tables + sum(|layer| layer.matrices))
                + F32 * (hidden + sum(|layer| layer.vectors)),
            adapter_values: LoraTarget::ALL.map(|target| {
                let values = |layer: usize| {
                    let (inputs, outputs) = self.linear_shape(layer, target);
                    let experts = self.layer_experts(layer).filter(|_| target.parent() == Some("mlp"));
                    ((inputs + outputs) * experts.map_or(1, |experts| experts.count)) as u64
                };
                let layers = if target == LoraTarget::LmHead { 1 } else { self.num_layers };
                (0..layers).map(values).sum()
            }),
            row,
            row_of_rank,
            workspace: F32 * chunk * (2 * hidden + self.vocab_size as u64),
            checkpointed: (!options.activation_checkpointing).then_some(checkpointed),
        }
    }
}

/// Values of one layer.
struct LayerValues {
    matrices: u64,
    vectors: u64,
    /// Of each row, from the forward to the backward.
    kept: u64,
    kept_of_rank: u64,
    /// Of each row while the layer is at work.
    passing: u64,
    passing_of_rank: u64,
}

impl LayerValues {
    fn of(config: &ModelConfig, layer: usize) -> Self {
        let size = |size: usize| size as u64;
        let (hidden, dim) = (size(config.hidden_size), size(config.head_dim));
        let (q, k) = (size(config.num_heads) * dim, size(config.num_kv_heads) * dim);
        let experts = config.layer_experts(layer);
        // A row takes a slot at each of its experts; a plain MLP is one slot and no router.
        let (slots, wide, routed) = match experts {
            None => (1, size(config.intermediate_size), 0),
            Some(experts) => (size(experts.per_row), size(experts.intermediate_size), size(experts.count)),
        };
        let mlp = 2 * matrix(wide, hidden) + matrix(hidden, wide);
        let experts_weights = experts.map_or(mlp, |e| size(e.count) * mlp + matrix(size(e.count), hidden));
        let attention = matrix(q, hidden) + 2 * matrix(k, hidden) + matrix(hidden, q);
        let bias = if config.family.has_qkv_bias() { q + 2 * k } else { 0 };
        let (norm, raw) = if config.family.has_qk_norm() { (2 * dim, q + k) } else { (0, 0) };
        // A choice of an expert: its number, its weight, its slot, and the way back.
        let choices = if experts.is_some() { 6 * slots } else { 0 };
        let brought = if experts.is_some() { 2 * slots * hidden } else { 0 };
        let cached = size(config.num_kv_heads) * (dim + dim.next_multiple_of(16));
        Self {
            matrices: attention + experts_weights,
            vectors: bias + norm + 2 * hidden,
            kept: 2 * hidden
                + 2 * q
                + 2 * k
                + raw
                + size(config.num_heads)
                + 2 * slots * wide
                + routed
                + choices,
            kept_of_rank: 4 + 3 * slots,
            passing: 4 * slots * wide + brought + routed + 4 * q + 2 * k + cached,
            // Two more of the head, whose rows come in chunks.
            passing_of_rank: 3 * slots + 2,
        }
    }
}

/// Values of a packed matrix.
fn matrix(outputs: u64, inputs: u64) -> u64 {
    outputs.next_multiple_of(PANEL) * inputs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kernels::WeightDtype, model::tiny};

    #[test]
    fn a_run_is_its_state_and_its_micro_batch() {
        let footprint = tiny::config().footprint(&ComputeOptions::default());
        let memory = |rank, rows| footprint.run(&LoraConfig::new(rank, 0), rows);
        // Two layers of q 32→32, k and v 32→16, o 32→32, gate and up 32→64, down 64→32.
        let values = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64));
        assert_eq!(memory(4, 0).state, 4 * 4 * (4 * values));
        assert_eq!(memory(4, 0).work - footprint.workspace, 14 * 4 * (4 * values));
        assert_eq!(memory(4, 10).work - memory(4, 0).work, 10 * (footprint.row + 4 * footprint.row_of_rank));
        let mut attention = LoraConfig::new(4, 0);
        attention.targets.truncate(1);
        assert_eq!(footprint.run(&attention, 0).state, 4 * 4 * (4 * 2 * (32 + 32)));
    }

    #[test]
    fn forged_sizes_end_in_a_large_number_not_in_a_wrong_one() {
        let footprint = Footprint { row: u64::MAX, ..tiny::config().footprint(&ComputeOptions::default()) };
        assert_eq!(footprint.run(&LoraConfig::new(8, 0), 1 << 40).work, u64::MAX);
    }

    /// The figures of SmolLM2-135M, which the README and the design speak of.
    #[test]
    fn smollm2_takes_what_is_said_of_it() {
        let smollm2 = ModelConfig {
            vocab_size: 49_152,
            hidden_size: 576,
            intermediate_size: 1536,
            num_layers: 30,
            num_heads: 9,
            num_kv_heads: 3,
            head_dim: 64,
            ..tiny::config()
        };
        let weights =
            |dtype| smollm2.footprint(&ComputeOptions { dtype, ..ComputeOptions::default() }).weights;
        assert_eq!(weights(WeightDtype::F32), 4 * 134_515_008, "every width is whole panels");
        // 61 norms of 576 stay as they are.
        assert_eq!(weights(WeightDtype::Bf16), 2 * 134_515_008 + 2 * 61 * 576);
        let kept = LayerValues::of(&smollm2, 0);
        assert_eq!(4 * kept.kept, 23_076, "23 KB per row and layer");
        let footprint = smollm2.footprint(&ComputeOptions::default());
        let checkpointed = footprint.with_checkpointing();
        assert_eq!((footprint.row, checkpointed.row), (747_832, 147_748), "a token of all layers");
    }
}

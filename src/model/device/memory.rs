//! What a model and its runs take of a GPU's memory, as formulas over the configuration.
//!
//! ```text
//!   GPU  =  weights of each model                                  shared by all its runs
//!        +  1,024 rows of steps of decoding of each, and a page    what recorded steps hold, at most
//!        +  4 P of each run, in T                                  versions of its adapter
//!        +  3 P of each run with ranks on other GPUs, f32,         NCCL's link: partial sums of the gradient, their sum,
//!                + 2 pieces of each of those ranks                 and what comes of the others' partial sums
//!        +  of the one micro-batch at work: rows · kept            activations, for the way back
//!                + the larger of  rows · passing                   one layer on its way back
//!                            and  chunk of rows · head             logits and their gradient
//!                + 4 P, f32                                        the adapter's gradient
//! ```
//!
//! P is the adapter's values, T what products compute in. Ranks and replicas of a GPU take turns, so one micro-batch is
//! there at a time; a replica's step draws within the head of as many rows, which has no gradient then. A run's state is in
//! the host's memory ([`Footprint`](crate::model::Footprint)); caches of replicas are bounded by themselves and come on top.
//! The names are those of the variables of `forward.rs`, `backward.rs` and `head.rs`, in which these formulas are to be read
//! again when they change; tests hold them against what the emulation allocates.

use crate::{
    collective::nccl_memory,
    gpu::PAGE,
    kernels::WeightDtype,
    model::{ComputeOptions, ModelConfig, RunMemory},
    types::LoraConfig,
};

use super::head::rows_most;

/// Versions of an adapter that are on the GPU at once: a trainer's last and next, a replica's live and staged.
const VERSIONS: u64 = 4;

/// Bytes of an f32.
const F32: u64 = 4;

/// Positions of the smallest table of rotary angles.
const ROTARY_LEAST: u64 = 512;

/// Bytes of a row's places in lists: its token, its position, its share of tiles and pages, and for the head its row,
/// token, factor, log-probability and statistics.
const LISTS: u64 = 16;
const HEAD_LISTS: u64 = 40;

/// Rows whose steps of decoding are held recorded, at most: about one step of each number of rows that is recorded
/// (`steps/padded.rs`), which are 871 rows.
const STEP_ROWS: u64 = 1024;

/// What a base model costs of a GPU; numbers that whoever plans needs no model to reckon with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuFootprint {
    /// Bytes of the weights.
    pub weights: u64,
    /// Bytes that recorded steps of decoding hold, at most.
    pub steps: u64,
    /// Bytes of a value of T.
    pub element: u64,
    /// Of a micro-batch's rows.
    pub rows: GpuRows,
    /// The same with activation checkpointing; absent where they are that already.
    pub checkpointed: Option<GpuRows>,
    /// Rows of a chunk of the head, at most.
    pub head_rows: u64,
    /// Bytes of each, and for each unit of the rank.
    pub head: u64,
    pub head_of_rank: u64,
    /// Bytes of a micro-batch, however few its rows.
    pub workspace: u64,
}

/// Bytes of a row, and of a row for each unit of the rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuRows {
    /// From the forward to the backward.
    pub kept: u64,
    pub kept_of_rank: u64,
    /// While a layer is on its way back.
    pub passing: u64,
    pub passing_of_rank: u64,
}

impl GpuFootprint {
    /// Bytes that the model holds as long as it is there, whatever its runs: at most.
    pub fn model(&self) -> u64 {
        self.weights.saturating_add(self.steps)
    }

    /// The same model on a node with activation checkpointing.
    pub fn with_checkpointing(self) -> Self {
        Self { rows: self.checkpointed.unwrap_or(self.rows), checkpointed: None, ..self }
    }

    /// The memory of a run of so many ranks with an adapter of so many values, and micro-batches of at most `rows` rows.
    pub fn run(&self, lora: &LoraConfig, values: u64, rows: u64, ranks: u64) -> RunMemory {
        let rank = u64::from(lora.rank);
        let of = |row: u64, of_rank: u64, rows: u64| {
            row.saturating_add(of_rank.saturating_mul(rank)).saturating_mul(rows)
        };
        let GpuRows { kept, kept_of_rank, passing, passing_of_rank } = self.rows;
        let head = of(self.head, self.head_of_rank, rows.min(self.head_rows));
        let work = of(kept, kept_of_rank, rows)
            .saturating_add(of(passing, passing_of_rank, rows).max(head))
            .saturating_add(self.workspace)
            .saturating_add(values.saturating_mul(F32));
        RunMemory {
            state: values.saturating_mul(self.element).saturating_mul(VERSIONS),
            work,
            link: nccl_memory(values, ranks),
        }
    }
}

impl ModelConfig {
    /// What the model costs of a GPU's memory. Of a model that no kernel covers it says nothing that is of use.
    pub fn gpu_footprint(&self, options: &ComputeOptions) -> GpuFootprint {
        let size = |size: usize| size as u64;
        let element = match options.dtype {
            WeightDtype::F32 => F32,
            WeightDtype::Bf16 => 2,
        };
        let [d, w, vocab] = [self.hidden_size, self.intermediate_size, self.vocab_size].map(size);
        let [heads, layers, dim] = [self.num_heads, self.num_layers, self.head_dim].map(size);
        let (q, k) = (heads * dim, size(self.num_kv_heads) * dim);
        let bias = if self.family.has_qkv_bias() { q + 2 * k } else { 0 };
        let (norms, raw) = if self.family.has_qk_norm() { (2 * dim, q + k) } else { (0, 0) };
        let tables = if self.tie_word_embeddings { vocab * d } else { 2 * vocab * d };
        let matrices = layers * (2 * d * q + 2 * d * k + 3 * d * w) + tables;
        let vectors = layers * (2 * d + bias + norms) + d;

        // Activations, of one layer: input, middle, lse; raw, q, k, v, attended, gate, up; and `A x` of six products.
        let (input, of_layer) = (F32 * d, F32 * d + F32 * heads + element * (raw + 2 * q + 2 * k + 2 * w));
        let low = 6 * element;
        // last, hidden and d_hidden, to the end.
        let whole = F32 * d + 2 * element * d + LISTS;
        // residual; then the larger of both halves of a layer.
        let feed_forward = 2 * w + w.max(2 * d);
        let attention = match raw {
            0 => (2 * q + 2 * k).max(q + 2 * k + 2 * d),
            _ => (2 * q + 3 * k + 2 * d).max(2 * q + 2 * k),
        };
        let passing = F32 * d + element * feed_forward.max(attention) + F32 * heads;
        let kept = GpuRows {
            kept: whole + layers * (input + of_layer),
            kept_of_rank: layers * low,
            passing,
            passing_of_rank: 2 * element,
        };
        let checkpointed = GpuRows {
            kept: whole + layers * input,
            kept_of_rank: 0,
            passing: passing + of_layer,
            passing_of_rank: 2 * element + low,
        };
        let recomputes = options.activation_checkpointing;
        GpuFootprint {
            weights: element * matrices + F32 * vectors,
            steps: if options.plain_decoding { 0 } else { steps_most(self, element) },
            element,
            rows: if recomputes { checkpointed } else { kept },
            checkpointed: (!recomputes).then_some(checkpointed),
            head_rows: size(rows_most(self.vocab_size)),
            // logits and d_logits; hidden, dx and the rows of an adapted head.
            head: (F32 + element) * vocab + 3 * element * d + HEAD_LISTS,
            head_of_rank: 3 * element,
            workspace: F32 * ROTARY_LEAST * dim,
        }
    }
}

/// Bytes that recorded steps of a model hold, at most, and a page for the rows that pad them.
pub(super) fn steps_most(config: &ModelConfig, element: u64) -> u64 {
    let page = 2 * config.num_layers * config.num_kv_heads * config.head_dim * PAGE;
    STEP_ROWS * step_row(config, element) + page as u64 * element
}

/// Bytes of a row of a step: as much of each size as there is at once. A pool gives no array memory of another size.
pub(super) fn step_row(config: &ModelConfig, element: u64) -> u64 {
    let [d, w] = [config.hidden_size as u64, config.intermediate_size as u64];
    let [heads, dim] = [config.num_heads as u64, config.head_dim as u64];
    let (q, k) = (heads * dim, config.num_kv_heads as u64 * dim);
    let raw = if config.family.has_qk_norm() { q + k } else { 0 };
    // The residual stream before, within and behind a layer; what a norm or a product makes of it; raw, q, k, v, attended,
    // gate, up and their product; lse.
    3 * F32 * d + element * (d + raw + 2 * q + 2 * k + 3 * w) + F32 * heads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Family, tiny};

    #[test]
    fn a_run_is_its_versions_and_one_micro_batch() {
        let footprint = tiny::config().gpu_footprint(&ComputeOptions::default());
        let lora = LoraConfig::new(4, 0);
        let memory = |values, rows| footprint.run(&lora, values, rows, 1);
        assert_eq!(memory(1000, 0).state, 4 * 4 * 1000);
        assert_eq!(memory(1000, 0).work, footprint.workspace + 4 * 1000);
        assert_eq!((memory(1000, 0).link, footprint.run(&lora, 1000, 0, 2).link), (0, nccl_memory(1000, 2)));
        let more_than_a_chunk = 100 * footprint.head_rows;
        let by_row = memory(0, more_than_a_chunk).work - footprint.workspace;
        let GpuRows { kept, kept_of_rank, passing, passing_of_rank } = footprint.rows;
        assert_eq!(by_row, more_than_a_chunk * (kept + passing + 4 * (kept_of_rank + passing_of_rank)));
    }

    /// Of Qwen3-1.7B in bf16, as the README says.
    #[test]
    fn recorded_steps_of_a_model_take_little_beside_its_weights() {
        let config = ModelConfig {
            family: Family::Qwen3,
            hidden_size: 2048,
            intermediate_size: 6144,
            num_layers: 28,
            num_heads: 16,
            num_kv_heads: 8,
            head_dim: 128,
            ..tiny::config()
        };
        assert_eq!(steps_most(&config, 2), 89_718_784);
    }

    #[test]
    fn forged_sizes_end_in_a_large_number_not_in_a_wrong_one() {
        let mut footprint = tiny::config().gpu_footprint(&ComputeOptions::default());
        footprint.rows.kept = u64::MAX;
        assert_eq!(footprint.run(&LoraConfig::new(8, 0), u64::MAX, 1 << 40, 1).work, u64::MAX);
    }
}

//! What a model and its runs take of a GPU's memory, as formulas over the configuration.
//!
//! ```text
//!   GPU  =  weights of each model                                  shared by all its runs
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
    kernels::WeightDtype,
    model::{ComputeOptions, ModelConfig, RunMemory},
    types::LoraConfig,
};

use super::head::rows_most;

/// Versions of an adapter that are on the GPU at once: a trainer's last and next, a replica's live and staged.
const VERSIONS: u64 = 4;

/// Partial sums of a gradient that a rank has: a range of micro-batches is mostly one or two subtrees. Few and unequal ranges
/// are more, up to two a level; the link grows then beyond what is reckoned with.
const PARTIAL_SUMS: u64 = 2;

/// Bytes of a partial sum of another rank that are on the GPU at once, at most: `PIECE` of `collective/nccl`.
const PIECE: u64 = 16 << 20;

/// Bytes of an f32.
const F32: u64 = 4;

/// Positions of the smallest table of rotary angles.
const ROTARY_LEAST: u64 = 512;

/// Bytes of a row's places in lists: its token, its position, its share of tiles and pages, and for the head its row,
/// token, factor, log-probability and statistics.
const LISTS: u64 = 16;
const HEAD_LISTS: u64 = 40;

/// What a base model costs of a GPU; numbers that whoever plans needs no model to reckon with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuFootprint {
    /// Bytes of the weights.
    pub weights: u64,
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
            link: link(values, ranks),
        }
    }
}

/// Bytes of the link of one of so many ranks that each have a GPU; none of a rank alone.
fn link(values: u64, ranks: u64) -> u64 {
    if ranks < 2 {
        return 0;
    }
    let own = values.saturating_mul(F32).saturating_mul(PARTIAL_SUMS + 1);
    let piece = values.div_ceil(ranks).saturating_mul(F32).min(PIECE);
    own.saturating_add(piece.saturating_mul(PARTIAL_SUMS).saturating_mul(ranks - 1))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tiny;

    #[test]
    fn a_run_is_its_versions_and_one_micro_batch() {
        let footprint = tiny::config().gpu_footprint(&ComputeOptions::default());
        let lora = LoraConfig::new(4, 0);
        let memory = |values, rows| footprint.run(&lora, values, rows, 1);
        assert_eq!(memory(1000, 0).state, 4 * 4 * 1000);
        assert_eq!(memory(1000, 0).work, footprint.workspace + 4 * 1000);
        let more_than_a_chunk = 100 * footprint.head_rows;
        let by_row = memory(0, more_than_a_chunk).work - footprint.workspace;
        let GpuRows { kept, kept_of_rank, passing, passing_of_rank } = footprint.rows;
        assert_eq!(by_row, more_than_a_chunk * (kept + passing + 4 * (kept_of_rank + passing_of_rank)));
    }

    /// What `collective/nccl/layout.rs` makes of it, by hand.
    #[test]
    fn ranks_on_other_gpus_take_vectors_and_pieces() {
        assert_eq!((link(1000, 0), link(1000, 1)), (0, 0));
        // Each rank's slice is less than a piece.
        assert_eq!(link(1000, 2), 4 * (3 * 1000 + 2 * 500));
        // And more.
        assert_eq!(link(1 << 30, 4), 4 * (3 << 30) + 3 * 2 * (16 << 20));
    }

    #[test]
    fn forged_sizes_end_in_a_large_number_not_in_a_wrong_one() {
        let mut footprint = tiny::config().gpu_footprint(&ComputeOptions::default());
        footprint.rows.kept = u64::MAX;
        assert_eq!(footprint.run(&LoraConfig::new(8, 0), u64::MAX, 1 << 40, 1).work, u64::MAX);
        assert_eq!(link(u64::MAX, u64::MAX), u64::MAX);
    }
}

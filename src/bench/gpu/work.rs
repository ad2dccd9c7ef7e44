//! What a token costs at least: operations of products, and bytes that must be read.

use crate::{kernels::WeightDtype, model::ModelConfig};

/// A model's figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    /// Weights of all layers' matrices.
    layers: f64,
    /// And of the head, tied or not.
    head: f64,
    /// Width of the queries, times layers.
    queries: f64,
    /// Values of an adapter on all seven linear layers for each unit of its rank.
    adapter: f64,
    /// Bytes of a weight.
    bytes: f64,
    /// Bytes of keys and values of a position.
    position: f64,
}

impl Work {
    pub(super) fn of(config: &ModelConfig, dtype: WeightDtype) -> Self {
        let size = |size: usize| size as f64;
        let (d, w, layers) =
            (size(config.hidden_size), size(config.intermediate_size), size(config.num_layers));
        let (q, k) = (size(config.num_heads * config.head_dim), size(config.num_kv_heads * config.head_dim));
        Self {
            layers: layers * (2.0 * d * q + 2.0 * d * k + 3.0 * d * w),
            head: d * size(config.vocab_size),
            queries: layers * q,
            adapter: layers * (2.0 * (d + q) + 2.0 * (d + k) + 3.0 * (d + w)),
            bytes: size(dtype.bytes()),
            position: layers * 2.0 * k * size(dtype.bytes()),
        }
    }

    /// Operations of a trained token in sequences of `seq`: two a weight forward and two for the gradient of what a layer
    /// read (frozen weights have none of their own), six for each value of the adapter; attention over the positions before,
    /// scores and values, forward and twice that backward. What is computed again is no work.
    pub(super) fn trained(&self, seq: u32, rank: u32) -> f64 {
        let attention = 3.0 * self.attention(f64::from(seq + 1) / 2.0);
        4.0 * (self.layers + self.head) + 6.0 * self.adapter * f64::from(rank) + attention
    }

    /// Operations of a token of a prompt, of which only the last one asks the head.
    pub(super) fn prefilled(&self, prompt: u32) -> f64 {
        let head = self.head / f64::from(prompt);
        2.0 * (self.layers + head) + self.attention(f64::from(prompt + 1) / 2.0)
    }

    /// Bytes of a step that draws a token for each of `streams`: every weight once, and every stream's past.
    pub(super) fn decoded_bytes(&self, streams: u32, positions: f64) -> f64 {
        (self.layers + self.head) * self.bytes + f64::from(streams) * positions * self.position
    }

    /// Of a row that attends to so many.
    fn attention(&self, positions: f64) -> f64 {
        4.0 * self.queries * positions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::gpu::Shape;

    /// By hand, from the shape that its model card gives.
    #[test]
    fn qwen3_8b_costs_what_its_card_implies() {
        let work = Work::of(&Shape::Qwen3_8b.config(), WeightDtype::Bf16);
        let layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288;
        assert_eq!(work.layers, f64::from(36 * (layer / 1_000)) * 1_000.0 + f64::from(36 * (layer % 1_000)));
        // "8.2 billion parameters, 6.95 without embeddings", of which one table is no product.
        assert!((work.layers / 1e9 - 6.95).abs() < 0.01, "{}", work.layers);
        assert!(((work.layers + 2.0 * work.head) / 1e9 - 8.19).abs() < 0.01);
        // 144 KiB of keys and values a position.
        assert_eq!(work.position, 147_456.0);
        let trained = work.trained(1024, 16);
        assert!((trained - 4.0 * (work.layers + work.head)) / trained < 0.06, "the rest is little");
        assert_eq!(work.decoded_bytes(1, 0.0), 2.0 * (work.layers + work.head));
        assert_eq!(work.decoded_bytes(4, 10.0) - work.decoded_bytes(4, 0.0), 40.0 * 147_456.0);
    }
}

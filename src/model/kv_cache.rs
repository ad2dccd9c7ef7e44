use std::sync::Arc;

use crate::kernels::{ATTENTION_BLOCK, Buffer, Heads, KvBlocks, Shared};

use super::ModelConfig;

/// Keys and values of one sequence's past positions, in blocks shared between forks.
#[derive(Clone)]
pub struct KvCache {
    heads: Heads,
    layers: usize,
    len: usize,
    /// Enough for `len` positions. A block that others share is copied before it is written to.
    blocks: Vec<Arc<Buffer>>,
}

impl KvCache {
    /// Positions that are allocated, and shared between forks, together: what admission to a
    /// replica reserves is a multiple of it.
    pub const BLOCK: usize = ATTENTION_BLOCK;

    /// An empty cache.
    pub fn new(config: &ModelConfig) -> Self {
        Self::with_layers(config.heads(), config.num_layers)
    }

    /// A cache of some layers only: one, if a forward uses it for each layer in turn.
    pub(super) fn with_layers(heads: Heads, layers: usize) -> Self {
        Self { heads, layers, len: 0, blocks: Vec::new() }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no position.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Another sequence with the same past: shares full blocks, copies the last one (when
    /// either of the two is first appended to).
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Bytes that one position takes, over all layers.
    pub fn bytes_per_position(config: &ModelConfig) -> usize {
        config.heads().block_len(config.num_layers) / Self::BLOCK * size_of::<f32>()
    }

    /// Forgets all positions and keeps the memory, if this is the cache's shape.
    pub(super) fn clear(&mut self, heads: Heads) {
        if heads != self.heads {
            *self = Self::with_layers(heads, self.layers);
        }
        self.len = 0;
    }

    /// The blocks, with room for `rows` more positions that are this cache's own.
    pub(super) fn reserve(&mut self, rows: usize) -> KvBlocks<'_> {
        let block_len = self.heads.block_len(self.layers);
        let blocks = (self.len + rows).div_ceil(Self::BLOCK);
        while self.blocks.len() < blocks {
            self.blocks.push(Arc::new(Buffer::zeroed(block_len)));
        }
        let own = self.len / Self::BLOCK;
        let blocks = self.blocks.iter_mut().enumerate().map(|(index, block)| match index < own {
            true => Shared::read_only(block),
            false => Shared::new(&mut *Arc::make_mut(block)),
        });
        KvBlocks { blocks: blocks.collect(), layers: self.layers }
    }

    /// The forward has appended `rows` positions to every layer.
    pub(super) fn advance(&mut self, rows: usize) {
        self.len += rows;
    }
}

#[cfg(test)]
impl KvCache {
    /// Bytes of memory that it holds.
    pub(super) fn allocated(&self) -> usize {
        self.blocks.iter().map(|block| block.allocated()).sum()
    }
}

impl ModelConfig {
    /// Attention's heads, as the kernels take them.
    pub(super) fn heads(&self) -> Heads {
        Heads { queries: self.num_heads, keys: self.num_kv_heads, dim: self.head_dim }
    }
}

use crate::kernels::{Team, buffer::Shared};

use super::{BLOCK, Heads, Span};

/// Where the keys and values of a block of 32 positions stand in its memory.
///
/// ```text
/// layer 0, key head 0:  keys    [d, 32]          transposed: scores need lanes of keys
///                       values  [32, d padded]
/// layer 0, key head 1:  …
/// ```
impl Heads {
    /// Values of a block of so many layers.
    pub(crate) fn block_len(self, layers: usize) -> usize {
        layers * self.keys * self.head_len()
    }

    fn head_len(self) -> usize {
        BLOCK * (self.dim + self.padded())
    }

    /// Start of a head's keys.
    pub(super) fn keys_at(self, layer: usize, head: usize) -> usize {
        (layer * self.keys + head) * self.head_len()
    }

    /// Start of a head's values.
    pub(super) fn values_at(self, layer: usize, head: usize) -> usize {
        self.keys_at(layer, head) + BLOCK * self.dim
    }
}

/// The blocks of one sequence, from its first position on.
pub(crate) struct KvBlocks<'a> {
    pub blocks: Vec<Shared<'a>>,
    /// Layers in them: all, or one that serves each layer in turn.
    pub layers: usize,
}

impl KvBlocks<'_> {
    /// Which of its layers serves this layer of the model.
    pub(super) fn layer(&self, layer: usize) -> usize {
        layer % self.layers
    }
}

/// Writes the keys and values of all rows (`[rows, key heads · d]`) into the blocks of their
/// sequences. The blocks of a span's positions must belong to it alone.
pub(crate) fn append(
    heads: Heads,
    layer: usize,
    spans: &[Span],
    k: &[f32],
    v: &[f32],
    blocks: &[KvBlocks<'_>],
    team: &Team,
) {
    let dim = heads.dim;
    let row_len = heads.keys * dim;
    let write = |task: usize| {
        let (index, head) = (task / heads.keys, task % heads.keys);
        let (span, blocks) = (&spans[index], &blocks[index]);
        let layer = blocks.layer(layer);
        for row in 0..span.rows {
            let position = span.start + row;
            let block = blocks.blocks[position / BLOCK];
            let source = (span.first + row) * row_len + head * dim;
            let keys = heads.keys_at(layer, head);
            let values = heads.values_at(layer, head) + position % BLOCK * heads.padded();
            // SAFETY: this sequence's positions, this head: no other task writes there, and
            // nobody reads before all have written.
            unsafe {
                let keys = block.part(keys..keys + BLOCK * dim);
                let keys = keys[position % BLOCK..].iter_mut().step_by(BLOCK);
                keys.zip(&k[source..][..dim]).for_each(|(to, from)| *to = *from);
                block.part(values..values + dim).copy_from_slice(&v[source..][..dim]);
            }
        }
    };
    // A few rows are written before another thread is awake.
    const FEW: usize = 64;
    let tasks = spans.len() * heads.keys;
    match k.len() / row_len.max(1) {
        rows if rows < FEW => (0..tasks).for_each(write),
        _ => team.run(tasks, write),
    }
}

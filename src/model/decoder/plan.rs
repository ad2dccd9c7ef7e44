use std::{ops::Range, ptr};

use crate::{
    kernels::{LowRank, Span},
    model::{AdapterRows, Batch, LoraEntry},
    types::LoraTarget,
};

/// How the rows of a batch are to be read.
pub(super) struct Plan<'a> {
    pub rows: usize,
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<usize>,
    pub spans: Vec<Span>,
    /// Rows of one adapter, end to end.
    pub segments: Vec<Range<usize>>,
    /// The adapter of each segment.
    pub adapters: Vec<Option<AdapterRows<'a>>>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(batch: &Batch<'a>) -> Self {
        let mut plan = Self {
            rows: 0,
            tokens: Vec::new(),
            positions: Vec::new(),
            spans: Vec::with_capacity(batch.sequences.len()),
            segments: Vec::new(),
            adapters: Vec::new(),
        };
        for sequence in &batch.sequences {
            let start = sequence.kv_cache.as_ref().map_or(0, |cache| cache.len());
            let rows = sequence.tokens.len();
            plan.spans.push(Span { first: plan.rows, rows, start });
            plan.tokens.extend_from_slice(sequence.tokens);
            plan.positions.extend(start..start + rows);
            match (plan.segments.last_mut(), plan.adapters.last()) {
                (Some(segment), Some(adapter)) if is_same(*adapter, sequence.adapter) => segment.end += rows,
                _ => {
                    plan.segments.push(plan.rows..plan.rows + rows);
                    plan.adapters.push(sequence.adapter);
                }
            }
            plan.rows += rows;
        }
        plan
    }

    /// All rows, before the same weights.
    pub(super) fn whole(&self) -> Share<'_> {
        Share { expert: 0, rows: 0..self.rows, of: self.rows, segments: &self.segments }
    }

    /// The largest rank, 0 without adapters.
    pub(super) fn largest_rank(&self) -> usize {
        self.adapters.iter().flatten().map(|adapter| adapter.rank()).max().unwrap_or(0)
    }
}

/// Rows that meet the same weights: all rows of a batch, or those that went to one expert.
#[derive(Clone)]
pub(super) struct Share<'a> {
    /// Number of the expert; 0 where there is one MLP.
    pub expert: usize,
    /// Which of the rows, or of the slots at experts, they are.
    pub rows: Range<usize>,
    /// How many there are of all.
    pub of: usize,
    /// Rows of one adapter, end to end, counted from the first of these.
    pub segments: &'a [Range<usize>],
}

/// Whether two adapters are one, in one place.
fn is_same(a: Option<AdapterRows<'_>>, b: Option<AdapterRows<'_>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => ptr::eq(a.layout, b.layout) && ptr::eq(&**a.values, &**b.values),
        (None, None) => true,
        _ => false,
    }
}

impl<'a> AdapterRows<'a> {
    pub(super) fn rank(&self) -> usize {
        self.layout.config.rank as usize
    }

    /// The matrices of the head, if it is adapted.
    pub(super) fn head_low_rank(&self) -> Option<LowRank<'a>> {
        Some(self.low_rank_of(self.layout.head()?))
    }

    /// The matrices of one linear layer, if it is adapted; `expert` is 0 where there is one.
    pub(super) fn low_rank(&self, layer: usize, target: LoraTarget, expert: usize) -> Option<LowRank<'a>> {
        Some(self.low_rank_of(self.layout.entries_of(layer, target).get(expert)?))
    }

    fn low_rank_of(&self, entry: &LoraEntry) -> LowRank<'a> {
        LowRank {
            a: &self.values[entry.a.clone()],
            b: &self.values[entry.b.clone()],
            rank: self.rank(),
            scale: self.layout.scale(),
        }
    }
}

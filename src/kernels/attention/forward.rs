use crate::kernels::{
    Team,
    buffer::{Shared, with_scratch},
    exp::exp,
    simd::{Kernel, LANES, Simd, run},
    tile::{Block, Factors, Start},
};

use super::{BLOCK, Heads, KvBlocks, Span, locate};

/// `out = softmax(q kᵀ / sqrt(d)) v` for every row; `q` and `out` are `[rows, query heads · d]`.
///
/// The keys of the rows must be in the blocks already. If given, `lse` (`[rows, query heads]`)
/// receives the logarithm of each row's sum of exponentials.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention(
    heads: Heads,
    layer: usize,
    spans: &[Span],
    q: &[f32],
    blocks: &[KvBlocks<'_>],
    out: &mut [f32],
    lse: Option<&mut [f32]>,
    team: &Team,
) {
    let out = Shared::new(out);
    let lse = lse.map(Shared::new);
    let tasks = |span: &Span| query_blocks(span) * heads.keys;
    team.run(spans.iter().map(tasks).sum(), |task| {
        let (index, task) = locate(spans, task, tasks);
        let span = spans[index];
        let (block, head) = (span.start / BLOCK + task / heads.keys, task % heads.keys);
        let positions = span.start.max(block * BLOCK)..span.end().min((block + 1) * BLOCK);
        let queries =
            Queries { heads, head, first_row: span.first + positions.start - span.start, positions };
        with_scratch(queries.scratch_len(), |scratch| {
            queries.attend(layer, q, &blocks[index], out, lse, scratch);
        });
    });
}

fn query_blocks(span: &Span) -> usize {
    span.end().div_ceil(BLOCK) - span.start / BLOCK
}

/// Queries of one block of positions that share a key head: `positions · g` rows.
struct Queries {
    heads: Heads,
    /// The key head.
    head: usize,
    /// Row of the batch that holds the first position.
    first_row: usize,
    positions: std::ops::Range<usize>,
}

impl Queries {
    fn rows(&self) -> usize {
        self.positions.len() * self.heads.group()
    }

    fn scratch_len(&self) -> usize {
        self.rows() * (self.heads.dim + BLOCK + self.heads.padded() + 2)
    }

    /// Start of a row's query in `q`, and of its result in `out`.
    fn query(&self, row: usize) -> usize {
        let group = self.heads.group();
        let batch_row = self.first_row + row / group;
        (batch_row * self.heads.queries + self.head * group + row % group) * self.heads.dim
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        layer: usize,
        q: &[f32],
        blocks: &KvBlocks<'_>,
        out: Shared<'_>,
        lse: Option<Shared<'_>>,
        scratch: &mut [f32],
    ) {
        let (rows, dim, padded) = (self.rows(), self.heads.dim, self.heads.padded());
        let (queries, scratch) = scratch.split_at_mut(rows * dim);
        let (scores, scratch) = scratch.split_at_mut(rows * BLOCK);
        let (sums, scratch) = scratch.split_at_mut(rows * padded);
        let (maxima, totals) = scratch.split_at_mut(rows);
        for (row, query) in queries.chunks_exact_mut(dim).enumerate() {
            let from = &q[self.query(row)..][..dim];
            query.iter_mut().zip(from).for_each(|(to, from)| *to = from * self.heads.scale());
        }
        maxima.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        sums.fill(0.0);
        let layer = blocks.layer(layer);
        let (keys_at, values_at) =
            (self.heads.keys_at(layer, self.head), self.heads.values_at(layer, self.head));
        let last = self.positions.start / BLOCK;
        for (index, block) in blocks.blocks[..=last].iter().enumerate() {
            self.score(queries, block.at(keys_at), scores);
            let own_block = (index == last).then_some(self.positions.start % BLOCK);
            run(OnlineSoftmax { scores, maxima, totals, sums, padded, own_block, group: self.heads.group() });
            self.weigh(scores, block.at(values_at), own_block, sums);
        }
        for row in 0..rows {
            let to = self.query(row);
            // SAFETY: no other task has this row and head.
            let out = unsafe { out.part(to..to + dim) };
            let sums = &sums[row * padded..][..dim];
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum / totals[row]);
            if let Some(lse) = lse {
                // SAFETY: as above.
                let lse = unsafe { lse.part(to / dim..to / dim + 1) };
                lse[0] = maxima[row] + totals[row].ln();
            }
        }
    }

    /// `scores = queries · keysᵀ`, `[rows, 32]`.
    fn score(&self, queries: &[f32], keys: *const f32, scores: &mut [f32]) {
        let dim = self.heads.dim;
        let block = Block {
            rows: self.rows(),
            columns: BLOCK,
            product: Factors {
                a: queries.as_ptr(),
                a_row: dim,
                a_step: 1,
                b: keys,
                b_step: BLOCK,
                depth: dim,
            },
            second: None,
            c: scores.as_mut_ptr(),
            c_row: BLOCK,
            start: Start::Zero,
        };
        // SAFETY: a block holds 32 keys of width d for this head; the scores are our own.
        unsafe { block.compute() };
    }

    /// `sums += weights · values`, `[rows, d padded]`.
    ///
    /// In the block of the queries' own positions each position takes its own past only. The later
    /// keys have no weight, but no weight times an infinite value is not nothing.
    fn weigh(&self, weights: &[f32], values: *const f32, own_block: Option<usize>, sums: &mut [f32]) {
        let (group, padded) = (self.heads.group(), self.heads.padded());
        let (parts, rows) = match own_block {
            Some(_) => (self.positions.len(), group),
            None => (1, self.rows()),
        };
        for part in 0..parts {
            let keys = own_block.map_or(BLOCK, |first| first + part + 1);
            for column in (0..padded).step_by(2 * LANES) {
                let block = Block {
                    rows,
                    columns: (padded - column).min(2 * LANES),
                    product: Factors {
                        a: weights[part * rows * BLOCK..].as_ptr(),
                        a_row: BLOCK,
                        a_step: 1,
                        b: values.wrapping_add(column),
                        b_step: padded,
                        depth: keys,
                    },
                    second: None,
                    c: sums[part * rows * padded + column..].as_mut_ptr(),
                    c_row: padded,
                    start: Start::Stored,
                };
                // SAFETY: a block holds 32 padded values for this head; the sums are our own.
                unsafe { block.compute() };
            }
        }
    }
}

/// Turns a block's scores into weights relative to the largest score so far, and brings what was
/// summed before to the same measure.
struct OnlineSoftmax<'a> {
    /// `[rows, 32]`, scores in, weights out.
    scores: &'a mut [f32],
    maxima: &'a mut [f32],
    totals: &'a mut [f32],
    /// `[rows, d padded]`
    sums: &'a mut [f32],
    padded: usize,
    /// Where in this block the first row's own position is, if it is here: later keys don't count.
    own_block: Option<usize>,
    group: usize,
}

impl Kernel for OnlineSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.scores.chunks_exact_mut(BLOCK).zip(self.sums.chunks_exact_mut(self.padded));
        let states = self.maxima.iter_mut().zip(self.totals.iter_mut());
        for (row, ((scores, sums), (max, total))) in rows.zip(states).enumerate() {
            let keys = self.own_block.map_or(BLOCK, |first| first + row / self.group + 1);
            let [low, high] = visible(s, scores, keys);
            let new_max = max.max(s.largest(s.max(low, high)));
            if new_max > *max {
                let shrink = exp(s, s.splat(*max - new_max));
                *total *= s.lanes(shrink)[0];
                for sums in sums.chunks_exact_mut(LANES) {
                    let shrunk = s.mul(s.read(sums), shrink);
                    s.write(sums, shrunk);
                }
                *max = new_max;
            }
            let low = exp(s, s.sub(low, s.splat(new_max)));
            let high = exp(s, s.sub(high, s.splat(new_max)));
            *total += s.sum(s.add(low, high));
            s.write(&mut scores[..LANES], low);
            s.write(&mut scores[LANES..], high);
        }
    }
}

/// A row's scores; those of keys from `keys` on are -inf.
#[inline(always)]
pub(super) fn visible<S: Simd>(s: S, scores: &[f32], keys: usize) -> [S::V; 2] {
    let scores = [s.read(&scores[..LANES]), s.read(&scores[LANES..])];
    hide_later(s, scores, keys, f32::NEG_INFINITY)
}

/// A row's values of a block of keys, with `fill` for those of keys from `keys` on.
#[inline(always)]
pub(super) fn hide_later<S: Simd>(s: S, [low, high]: [S::V; 2], keys: usize, fill: f32) -> [S::V; 2] {
    if keys >= BLOCK {
        return [low, high];
    }
    let lane: [f32; BLOCK] = LANE;
    let (end, fill) = (s.splat(keys as f32), s.splat(fill));
    [
        s.select_less(s.read(&lane[..LANES]), end, low, fill),
        s.select_less(s.read(&lane[LANES..]), end, high, fill),
    ]
}

/// The number of each key in its block.
const LANE: [f32; BLOCK] = {
    let mut lane = [0.0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        lane[i] = i as f32;
        i += 1;
    }
    lane
};

use std::ops::Range;

use crate::kernels::{
    Team,
    buffer::{Shared, with_scratch},
    exp::exp,
    simd::{Kernel, LANES, Simd, run},
    tile::{Block, Factors, Start},
};

use super::{
    BLOCK, Heads, Span,
    forward::{hide_later, visible},
    locate,
};

/// What the backward reads, and where it writes.
pub(crate) struct AttentionGradients<'a> {
    /// `[rows, query heads · d]`, as the forward had them.
    pub q: &'a [f32],
    /// `[rows, key heads · d]`
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// The forward's result and its gradient, `[rows, query heads · d]`.
    pub out: &'a [f32],
    pub d_out: &'a [f32],
    /// `[rows, query heads]`
    pub lse: &'a [f32],
    /// `[rows, query heads · d]`
    pub dq: &'a mut [f32],
    /// `[rows, query heads · d]`: one share per query head, which [`sum_groups`] adds up, so
    /// that heads are separate tasks.
    pub dk_shares: &'a mut [f32],
    pub dv_shares: &'a mut [f32],
    /// `[rows, key heads · d]`
    pub dk: &'a mut [f32],
    pub dv: &'a mut [f32],
}

/// The gradients of q, k and v for whole sequences; scores are computed again.
///
/// With `P = exp(q kᵀ/√d − lse)` and `D = Σ out∘d_out` of a row: `dv = Pᵀ d_out`,
/// `dS = P ∘ (d_out vᵀ − D)`, `dq = dS k/√d`, `dk = dSᵀ q/√d` (Dao et al., FlashAttention,
/// appendix B).
pub(crate) fn attention_backward(heads: Heads, spans: &[Span], grads: AttentionGradients<'_>, team: &Team) {
    let AttentionGradients { q, k, v, out, d_out, lse, dq, dk_shares, dv_shares, dk, dv } = grads;
    let outputs = [&mut *dq, &mut *dk_shares, &mut *dv_shares].map(Shared::new);
    team.run(spans.len() * heads.queries, |task| {
        let (index, head) = locate(spans, task, |_| heads.queries);
        let sequence = Sequence { heads, span: spans[index], head, q, k, v, out, d_out, lse };
        with_scratch(sequence.scratch_len(), |scratch| sequence.backward(outputs, scratch));
    });
    sum_groups(heads, dk_shares, dk, team);
    sum_groups(heads, dv_shares, dv, team);
}

/// Adds up the shares of the query heads of each key head, in the order of the heads.
fn sum_groups(heads: Heads, shares: &[f32], sums: &mut [f32], team: &Team) {
    let (group_len, dim) = (heads.group() * heads.dim, heads.dim);
    let sums = Shared::new(sums);
    crate::kernels::rows::for_rows(team, shares.len() / group_len, group_len, |groups| {
        // SAFETY: tasks have distinct groups.
        let sums = unsafe { sums.part(groups.start * dim..groups.end * dim) };
        let shares = &shares[groups.start * group_len..groups.end * group_len];
        for (sum, shares) in sums.chunks_exact_mut(dim).zip(shares.chunks_exact(group_len)) {
            sum.copy_from_slice(&shares[..dim]);
            for share in shares[dim..].chunks_exact(dim) {
                sum.iter_mut().zip(share).for_each(|(sum, share)| *sum += share);
            }
        }
    });
}

/// One query head of one sequence.
struct Sequence<'a> {
    heads: Heads,
    span: Span,
    head: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    d_out: &'a [f32],
    lse: &'a [f32],
}

/// Key blocks that meet a query block while that is at hand: each reads all queries behind it, and one block of keys at a
/// time would wait for memory as soon as the sequence is longer than a cache.
const KEY_BLOCKS: usize = 4;

/// A task's own memory.
struct Scratch<'a> {
    keys: [KeyBlock<'a>; KEY_BLOCKS],
    queries: QueryBlock<'a>,
    /// `[rows]`: Σ out∘d_out.
    dots: &'a mut [f32],
}

/// Keys and values of 32 positions, and their gradients so far.
#[derive(Default)]
struct KeyBlock<'a> {
    /// `[d, 32]`
    k_transposed: &'a mut [f32],
    v_transposed: &'a mut [f32],
    /// `[32, d padded]`
    k: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

/// Queries of 32 positions, and what they and a key block are for each other.
struct QueryBlock<'a> {
    /// `[32, d padded]`
    q: &'a mut [f32],
    d_out: &'a mut [f32],
    /// `[32, 32]`, queries by keys.
    weights: &'a mut [f32],
    d_scores: &'a mut [f32],
}

impl Sequence<'_> {
    fn key_blocks(&self) -> usize {
        self.span.rows.div_ceil(BLOCK).min(KEY_BLOCKS)
    }

    fn scratch_len(&self) -> usize {
        let (narrow, padded) = (self.heads.dim, self.heads.padded());
        BLOCK * (self.key_blocks() * (2 * narrow + 3 * padded) + 2 * padded + 2 * BLOCK) + self.span.rows
    }

    fn scratch<'a>(&self, scratch: &'a mut [f32]) -> Scratch<'a> {
        let mut rest = scratch;
        let mut take = |len: usize| {
            let (taken, left) = std::mem::take(&mut rest).split_at_mut(len);
            rest = left;
            taken
        };
        let (narrow, padded) = (BLOCK * self.heads.dim, BLOCK * self.heads.padded());
        let mut keys = <[KeyBlock<'a>; KEY_BLOCKS]>::default();
        for block in &mut keys[..self.key_blocks()] {
            *block = KeyBlock {
                k_transposed: take(narrow),
                v_transposed: take(narrow),
                k: take(padded),
                dk: take(padded),
                dv: take(padded),
            };
        }
        let queries = QueryBlock {
            q: take(padded),
            d_out: take(padded),
            weights: take(BLOCK * BLOCK),
            d_scores: take(BLOCK * BLOCK),
        };
        Scratch { keys, queries, dots: take(self.span.rows) }
    }

    /// Start of a row of this head in q, out and their gradients.
    fn query(&self, row: usize) -> usize {
        ((self.span.first + row) * self.heads.queries + self.head) * self.heads.dim
    }

    /// Start of a row of its key head in k and v.
    fn key(&self, row: usize) -> usize {
        let head = self.head / self.heads.group();
        ((self.span.first + row) * self.heads.keys + head) * self.heads.dim
    }

    fn rows_of(&self, block: usize) -> Range<usize> {
        block * BLOCK..self.span.rows.min((block + 1) * BLOCK)
    }

    fn backward(&self, [dq, dk, dv]: [Shared<'_>; 3], scratch: &mut [f32]) {
        let (dim, padded) = (self.heads.dim, self.heads.padded());
        let Scratch { mut keys, mut queries, dots } = self.scratch(scratch);
        self.prepare_dots(dots);
        let blocks = self.span.rows.div_ceil(BLOCK);
        for first in (0..blocks).step_by(KEY_BLOCKS) {
            let keys = &mut keys[..KEY_BLOCKS.min(blocks - first)];
            for (block, keys) in (first..).zip(&mut *keys) {
                self.load_keys(self.rows_of(block), keys);
            }
            // Each query takes its key blocks in their order, each key block its queries in theirs.
            for query_block in first..blocks {
                self.load_queries(self.rows_of(query_block), &mut queries);
                for (key_block, keys) in (first..=query_block).zip(&mut *keys) {
                    self.pair(query_block, key_block, dq, keys, &mut queries, dots);
                }
            }
            for (block, keys) in (first..).zip(&*keys) {
                for (i, row) in self.rows_of(block).enumerate() {
                    let to = self.query(row)..self.query(row) + dim;
                    // SAFETY: no other task has this head of this sequence.
                    unsafe {
                        dk.part(to.clone()).copy_from_slice(&keys.dk[i * padded..][..dim]);
                        dv.part(to).copy_from_slice(&keys.dv[i * padded..][..dim]);
                    }
                }
            }
        }
        for row in 0..self.span.rows {
            // SAFETY: as above.
            let dq = unsafe { dq.part(self.query(row)..self.query(row) + dim) };
            dq.iter_mut().for_each(|value| *value *= self.heads.scale());
        }
    }

    fn prepare_dots(&self, dots: &mut [f32]) {
        for (row, dot) in dots.iter_mut().enumerate() {
            let values = self.query(row)..self.query(row) + self.heads.dim;
            *dot = run(Dot { a: &self.out[values.clone()], b: &self.d_out[values] });
        }
    }

    /// Keys and values of a block, as they are and transposed; missing rows are zero. They have no gradients yet.
    fn load_keys(&self, rows: Range<usize>, to: &mut KeyBlock<'_>) {
        let (dim, padded) = (self.heads.dim, self.heads.padded());
        for zeros in [&mut *to.k, &mut *to.k_transposed, &mut *to.v_transposed, &mut *to.dk, &mut *to.dv] {
            zeros.fill(0.0);
        }
        for (i, row) in rows.enumerate() {
            let k = &self.k[self.key(row)..][..dim];
            let v = &self.v[self.key(row)..][..dim];
            to.k[i * padded..][..dim].copy_from_slice(k);
            for (j, (k, v)) in k.iter().zip(v).enumerate() {
                to.k_transposed[j * BLOCK + i] = *k;
                to.v_transposed[j * BLOCK + i] = *v;
            }
        }
    }

    /// Scaled queries and output gradients of a block.
    fn load_queries(&self, rows: Range<usize>, to: &mut QueryBlock<'_>) {
        let (dim, padded) = (self.heads.dim, self.heads.padded());
        for (i, row) in rows.enumerate() {
            let q = &self.q[self.query(row)..][..dim];
            let scaled = &mut to.q[i * padded..][..padded];
            scaled[..dim].iter_mut().zip(q).for_each(|(to, q)| *to = q * self.heads.scale());
            scaled[dim..].fill(0.0);
            let d_out = &mut to.d_out[i * padded..][..padded];
            d_out[..dim].copy_from_slice(&self.d_out[self.query(row)..][..dim]);
            d_out[dim..].fill(0.0);
        }
    }

    /// What the queries of one block and the keys of another mean for each other.
    fn pair(
        &self,
        query_block: usize,
        key_block: usize,
        dq: Shared<'_>,
        keys: &mut KeyBlock<'_>,
        queries: &mut QueryBlock<'_>,
        dots: &[f32],
    ) {
        let (dim, padded) = (self.heads.dim, self.heads.padded());
        let (rows, key_rows) = (self.rows_of(query_block), self.rows_of(key_block).len());
        let QueryBlock { q, d_out, weights, d_scores } = queries;
        let scores = (&*q, &*keys.k_transposed, &mut *weights);
        for (a, b, c) in [scores, (&*d_out, &*keys.v_transposed, &mut *d_scores)] {
            let product =
                Factors { a: a.as_ptr(), a_row: padded, a_step: 1, b: b.as_ptr(), b_step: BLOCK, depth: dim };
            let c = (c.as_mut_ptr(), BLOCK);
            // SAFETY: all operands are this task's own memory, 32 rows or columns each.
            unsafe { product_of(rows.len(), BLOCK, product, c, Start::Zero) };
        }
        let lse_step = self.heads.queries;
        run(ScoreGradients {
            rows: rows.len(),
            weights,
            d_scores,
            lse: &self.lse[self.query(rows.start) / dim..],
            lse_step,
            dots: &dots[rows.clone()],
            diagonal: query_block == key_block,
        });
        let start = if key_block == 0 { Start::Zero } else { Start::Stored };
        if query_block != key_block {
            self.key_gradients(0..rows.len(), 0..key_rows, keys, queries);
            self.query_gradients(rows.start, 0..rows.len(), 0..key_rows, start, dq, keys, queries);
            return;
        }
        // Each position with its own past. What is later has no weight, but no weight times an
        // infinite value is not nothing.
        for i in 0..key_rows {
            self.key_gradients(i..key_rows, i..i + 1, keys, queries);
            self.query_gradients(rows.start, i..i + 1, 0..i + 1, start, dq, keys, queries);
        }
    }

    /// Adds what the `rows` of the query block mean for the keys `of` the key block.
    fn key_gradients(
        &self,
        rows: Range<usize>,
        of: Range<usize>,
        keys: &mut KeyBlock<'_>,
        queries: &QueryBlock<'_>,
    ) {
        let padded = self.heads.padded();
        let QueryBlock { q, d_out, weights, d_scores } = queries;
        for (a, b, c) in [(weights, d_out, &mut *keys.dv), (d_scores, q, &mut *keys.dk)] {
            let product = Factors {
                a: a[rows.start * BLOCK + of.start..].as_ptr(),
                a_row: 1,
                a_step: BLOCK,
                b: b[rows.start * padded..].as_ptr(),
                b_step: padded,
                depth: rows.len(),
            };
            let c = (c[of.start * padded..].as_mut_ptr(), padded);
            // SAFETY: all operands are this task's own memory, padded rows and 32 columns.
            unsafe { product_of(of.len(), padded, product, c, Start::Stored) };
        }
    }

    /// Adds what the keys `of` the key block mean for the `rows` of the query block, which begins
    /// at row `first`.
    #[allow(clippy::too_many_arguments)]
    fn query_gradients(
        &self,
        first: usize,
        rows: Range<usize>,
        of: Range<usize>,
        start: Start,
        dq: Shared<'_>,
        keys: &KeyBlock<'_>,
        queries: &QueryBlock<'_>,
    ) {
        let Heads { dim, queries: heads, .. } = self.heads;
        let padded = self.heads.padded();
        let product = Factors {
            a: queries.d_scores[rows.start * BLOCK + of.start..].as_ptr(),
            a_row: BLOCK,
            a_step: 1,
            b: keys.k[of.start * padded..].as_ptr(),
            b_step: padded,
            depth: of.len(),
        };
        let to = (dq.at(self.query(first + rows.start)), heads * dim);
        // SAFETY: as above, and no other task has this head of this sequence's dq.
        unsafe { product_of(rows.len(), dim, product, to, start) };
    }
}

/// A product of any width, 32 columns at a time.
///
/// # Safety
///
/// As for [`Block::compute`], for all columns.
unsafe fn product_of(
    rows: usize,
    columns: usize,
    product: Factors,
    (c, c_row): (*mut f32, usize),
    start: Start,
) {
    for column in (0..columns).step_by(2 * LANES) {
        let block = Block {
            rows,
            columns: (columns - column).min(2 * LANES),
            product: Factors { b: product.b.wrapping_add(column), ..product },
            second: None,
            c: c.wrapping_add(column),
            c_row,
            start,
        };
        // SAFETY: the caller's promise.
        unsafe { block.compute() };
    }
}

struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sum = s.splat(0.0);
        for (a, b) in self.a.chunks(LANES).zip(self.b.chunks(LANES)) {
            sum = s.fma(s.read_some(a, 0.0), s.read_some(b, 0.0), sum);
        }
        s.sum(sum)
    }
}

/// Scores become weights, and gradients of weights become gradients of scores.
struct ScoreGradients<'a> {
    rows: usize,
    weights: &'a mut [f32],
    d_scores: &'a mut [f32],
    /// Of the first row; that of the next is `lse_step` further.
    lse: &'a [f32],
    lse_step: usize,
    dots: &'a [f32],
    /// Whether queries and keys are the same block: later keys don't count.
    diagonal: bool,
}

impl Kernel for ScoreGradients<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let weights = self.weights.chunks_exact_mut(BLOCK);
        let rows = weights.zip(self.d_scores.chunks_exact_mut(BLOCK)).take(self.rows);
        for (row, (weights, d_scores)) in rows.enumerate() {
            let keys = if self.diagonal { row + 1 } else { BLOCK };
            let lse = s.splat(self.lse[row * self.lse_step]);
            let dot = s.splat(self.dots[row]);
            let scores = visible(s, weights, keys);
            let d_weights = [s.read(&d_scores[..LANES]), s.read(&d_scores[LANES..])];
            let d_weights = hide_later(s, d_weights, keys, 0.0);
            let parts = weights.chunks_exact_mut(LANES).zip(d_scores.chunks_exact_mut(LANES));
            for ((weights, d_scores), (score, d_weight)) in parts.zip(scores.into_iter().zip(d_weights)) {
                let weight = exp(s, s.sub(score, lse));
                s.write(weights, weight);
                let d_score = s.mul(weight, s.sub(d_weight, dot));
                s.write(d_scores, d_score);
            }
        }
    }
}

use std::{ops::Range, ptr, sync::OnceLock};

use crate::{
    kernels::{
        Adapted, Buffer, Gradients, Layer, LowRank, Matrix, Shared, Team, entropy, linear, linear_backward,
        log_sum_exp, softmax_gradient,
    },
    model::{AdapterRows, BaseModel},
};

use super::{Workspace, tape::HeadBuffers};

/// Values of a chunk of logits: 64 MiB. More rows would use each weight more often; beyond a few
/// hundred that gains nothing.
const CHUNK_VALUES: usize = 16 * 1024 * 1024;

/// Rows of a chunk, at least and at most.
const CHUNK_ROWS: Range<usize> = 16..256;

/// Logits of the chosen rows of `hidden`, `[rows.len(), vocab]` into `logits`; with each row the adapter that
/// computed it, whose part for the head is added if it has one.
pub fn head_logits(
    model: &BaseModel,
    hidden: &[f32],
    rows: &[(usize, Option<AdapterRows<'_>>)],
    logits: &mut Vec<f32>,
    workspace: &mut Workspace,
    team: &Team,
) {
    let head = &model.weights().head;
    let HeadBuffers { hidden_cd, low_cr, .. } = &mut workspace.head;
    let hidden_cd = hidden_cd.resize(rows.len() * head.in_features());
    gather(hidden, rows.iter().map(|(row, _)| *row), head.in_features(), hidden_cd);
    logits.resize(rows.len() * head.out_features(), 0.0);
    let low_ranks: Vec<_> = rows.iter().map(|(_, adapter)| adapter.and_then(|a| a.head_low_rank())).collect();
    project_adapted(head, hidden_cd, &low_ranks, low_cr, logits, team);
}

/// What the head is asked.
#[derive(Clone, Copy)]
pub struct HeadRequest<'a> {
    /// `(row of hidden, token id)`, sorted by row.
    pub targets: &'a [(usize, u32)],
    /// How many most likely tokens to name of each target's row.
    pub top_k: usize,
    /// Whether to measure the entropy of each target's row.
    pub entropy: bool,
}

/// What the head answers, one entry per target.
#[derive(Debug, Default)]
pub struct HeadScores {
    /// `ln softmax(logits)` of the target, in nats.
    pub logprobs: Vec<f32>,
    /// The row's most likely (token, logprob), descending, lowest id first on a tie; empty if
    /// none are asked for.
    pub alternatives: Vec<Vec<(u32, f32)>>,
    /// The row's entropy in nats; empty if not asked for.
    pub entropies: Vec<f32>,
}

/// How the gradient goes on from the head.
pub struct HeadGradient<'a> {
    /// Of the adapter's values, all of them: the gradient of the head's matrices is added to its place, if
    /// the head carries an adapter.
    pub adapter: &'a mut [f32],
    /// `factor(i, logprob_i)` is ∂S/∂logprob_i of target i. Where it is 0, nothing is computed.
    pub factor: &'a mut dyn FnMut(usize, f32) -> f32,
    /// `[rows, hidden]`, zeroed by the caller; ∂S/∂hidden is added to it:
    /// `Σ_i factor_i · (onehot(token_i) − softmax(row_i)) · (W_head + scale · B A)`.
    pub d_hidden: &'a mut [f32],
}

/// Log-probabilities of chosen targets, in chunks of rows so that the full logits never exist. All rows were
/// computed by `adapter`.
///
/// # Panics
///
/// If a target's row or token does not exist, or targets are not sorted by row.
pub fn head_logprobs(
    model: &BaseModel,
    adapter: Option<AdapterRows<'_>>,
    hidden: &[f32],
    request: HeadRequest<'_>,
    mut gradient: Option<HeadGradient<'_>>,
    workspace: &mut Workspace,
    team: &Team,
) -> HeadScores {
    let targets = request.targets;
    assert!(targets.is_sorted_by_key(|(row, _)| *row), "targets are sorted by row");
    let head =
        Head { weight: &model.weights().head, adapter: adapter.filter(|a| a.layout.head().is_some()), team };
    let rows_most = head_chunk_rows(head.weight.out_features());
    let mut scores = HeadScores::default();
    let mut first = 0;
    while first < targets.len() {
        let chunk = HeadChunk::new(targets, first, rows_most);
        let buffers = &mut workspace.head;
        chunk.forward(&head, hidden, buffers);
        let lse = chunk.read(request, &buffers.logits_cv, &mut scores, team);
        if let Some(HeadGradient { adapter, factor, d_hidden }) = &mut gradient {
            let factors: Vec<f32> = chunk.targets.clone().map(|i| factor(i, scores.logprobs[i])).collect();
            chunk.backward(&head, targets, &factors, &lse, Shared::new(adapter), d_hidden, buffers);
        }
        first = chunk.targets.end;
        workspace.layer_done();
    }
    scores
}

/// Most rows whose logits are in memory at a time.
pub fn head_chunk_rows(vocab: usize) -> usize {
    (CHUNK_VALUES / vocab).clamp(CHUNK_ROWS.start, CHUNK_ROWS.end)
}

/// Rows of `hidden` that are wanted, end to end.
fn gather(hidden: &[f32], rows: impl Iterator<Item = usize>, width: usize, gathered: &mut [f32]) {
    for (row, to) in rows.zip(gathered.chunks_exact_mut(width)) {
        to.copy_from_slice(&hidden[row * width..][..width]);
    }
}

/// `logits = hidden · Wᵀ`
pub(super) fn project(head: &Matrix, hidden_cd: &[f32], rows: usize, logits_cv: &mut [f32], team: &Team) {
    let layer = Layer {
        weight: head,
        low_rank: |_| None,
        low: Shared::new(&mut []),
        low_row: 0,
        y: Shared::new(logits_cv),
    };
    linear(hidden_cd, std::slice::from_ref(&(0..rows)), &[layer], team);
}

/// The same of rows that may have adapters on the head.
fn project_adapted(
    head: &Matrix,
    hidden_cd: &[f32],
    low_ranks: &[Option<LowRank<'_>>],
    low_cr: &mut Buffer,
    logits_cv: &mut [f32],
    team: &Team,
) {
    // Rows of one adapter, end to end.
    let mut segments: Vec<Range<usize>> = Vec::new();
    for (row, low_rank) in low_ranks.iter().enumerate() {
        match segments.last_mut() {
            Some(segment) if is_same(low_ranks[segment.start], *low_rank) => segment.end += 1,
            _ => segments.push(row..row + 1),
        }
    }
    let rank = low_ranks.iter().flatten().map(|low_rank| low_rank.rank).max().unwrap_or(0);
    let layer = Layer {
        weight: head,
        low_rank: |segment: usize| low_ranks[segments[segment].start],
        low: Shared::new(low_cr.resize(low_ranks.len() * rank)),
        low_row: rank,
        y: Shared::new(logits_cv),
    };
    linear(hidden_cd, &segments, &[layer], team);
}

/// Whether two parts are of one adapter.
fn is_same(a: Option<LowRank<'_>>, b: Option<LowRank<'_>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => ptr::eq(a.a, b.a) && ptr::eq(a.b, b.b),
        (None, None) => true,
        _ => false,
    }
}

/// The head with the adapter of all its rows, if that has a part for it.
struct Head<'a> {
    weight: &'a Matrix,
    adapter: Option<AdapterRows<'a>>,
    team: &'a Team,
}

impl Head<'_> {
    fn low_rank(&self) -> Option<LowRank<'_>> {
        self.adapter.as_ref()?.head_low_rank()
    }

    /// The adapter's part for the way back.
    fn adapted<'b>(
        &'b self,
        low_cr: &'b [f32],
        d_low_cr: &'b mut Buffer,
        gradient: Shared<'b>,
    ) -> Option<Adapted<'b>> {
        let entry = self.adapter.as_ref()?.layout.head()?;
        Some(Adapted {
            low_rank: self.low_rank()?,
            low: low_cr,
            d_low: Shared::new(d_low_cr.resize(low_cr.len())),
            d_a: gradient.range(entry.a.clone()),
            d_b: gradient.range(entry.b.clone()),
        })
    }
}

/// Consecutive targets and the distinct rows that they are of.
pub(in crate::model) struct HeadChunk {
    pub targets: Range<usize>,
    /// Rows of `hidden`, ascending.
    pub rows: Vec<usize>,
    /// For each target, which of `rows` is its own.
    pub row_of: Vec<usize>,
}

impl HeadChunk {
    /// Targets from `first` on, of at most `rows_most` rows.
    pub(in crate::model) fn new(targets: &[(usize, u32)], first: usize, rows_most: usize) -> Self {
        let mut chunk = Self { targets: first..first, rows: Vec::new(), row_of: Vec::new() };
        for (row, _) in &targets[first..] {
            if chunk.rows.last() != Some(row) {
                if chunk.rows.len() == rows_most {
                    break;
                }
                chunk.rows.push(*row);
            }
            chunk.row_of.push(chunk.rows.len() - 1);
            chunk.targets.end += 1;
        }
        chunk
    }

    fn forward(&self, head: &Head<'_>, hidden: &[f32], buffers: &mut HeadBuffers) {
        let HeadBuffers { hidden_cd, logits_cv, low_cr, .. } = buffers;
        let (inputs, rows) = (head.weight.in_features(), self.rows.len());
        let hidden_cd = hidden_cd.resize(rows * inputs);
        gather(hidden, self.rows.iter().copied(), inputs, hidden_cd);
        let logits_cv = logits_cv.resize(rows * head.weight.out_features());
        let low_ranks = vec![head.low_rank(); rows];
        project_adapted(head.weight, hidden_cd, &low_ranks, low_cr, logits_cv, head.team);
    }

    /// Appends what is asked of the targets; returns each row's log-sum-exp.
    fn read(
        &self,
        request: HeadRequest<'_>,
        logits_cv: &[f32],
        scores: &mut HeadScores,
        team: &Team,
    ) -> Vec<f32> {
        let HeadRequest { targets, top_k, entropy: wants_entropy } = request;
        let vocab = logits_cv.len() / self.rows.len();
        let (mut lse, mut entropies) = (vec![0.0; self.rows.len()], vec![0.0; self.rows.len()]);
        let likeliest: Vec<OnceLock<Vec<(u32, f32)>>> = vec![OnceLock::new(); self.rows.len()];
        let (shared_lse, shared_entropies) = (Shared::new(&mut lse), Shared::new(&mut entropies));
        team.run(self.rows.len(), |row| {
            let logits = &logits_cv[row * vocab..][..vocab];
            let row_lse = log_sum_exp(logits);
            // SAFETY: each task has a row of its own.
            unsafe { shared_lse.part(row..row + 1)[0] = row_lse };
            if wants_entropy {
                // SAFETY: as above.
                unsafe { shared_entropies.part(row..row + 1)[0] = entropy(logits, row_lse) };
            }
            if top_k > 0 {
                likeliest[row].get_or_init(|| likeliest_tokens(logits, row_lse, top_k));
            }
        });
        for (i, &row) in self.targets.clone().zip(&self.row_of) {
            scores.logprobs.push(logits_cv[row * vocab + targets[i].1 as usize] - lse[row]);
            if wants_entropy {
                scores.entropies.push(entropies[row]);
            }
            if top_k > 0 {
                scores.alternatives.push(likeliest[row].get().cloned().unwrap_or_default());
            }
        }
        lse
    }

    /// Adds the gradient of the rows whose targets have factors.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        head: &Head<'_>,
        targets: &[(usize, u32)],
        factors: &[f32],
        lse: &[f32],
        gradient: Shared<'_>,
        d_hidden: &mut [f32],
        buffers: &mut HeadBuffers,
    ) {
        let (vocab, hidden) = (head.weight.out_features(), head.weight.in_features());
        let mut totals = vec![0.0; self.rows.len()];
        let mut is_active = vec![false; self.rows.len()];
        for (row, factor) in self.row_of.iter().zip(factors) {
            totals[*row] += factor;
            is_active[*row] |= *factor != 0.0;
        }
        let active: Vec<usize> = (0..self.rows.len()).filter(|row| is_active[*row]).collect();
        if active.is_empty() {
            return;
        }
        let logits = Shared::new(&mut buffers.logits_cv);
        head.team.run(active.len(), |i| {
            let row = active[i];
            // SAFETY: each task has a row of its own.
            let logits = unsafe { logits.part(row * vocab..(row + 1) * vocab) };
            softmax_gradient(logits, lse[row], -totals[row]);
            for (target, _) in self.row_of.iter().enumerate().filter(|(_, of)| **of == row) {
                logits[targets[self.targets.start + target].1 as usize] += factors[target];
            }
        });
        // Rows without a gradient are left out of the products.
        let HeadBuffers { hidden_cd, logits_cv, low_cr, d_low_cr, d_hidden_cd } = buffers;
        let rank = low_cr.len() / self.rows.len();
        for (to, row) in active.iter().enumerate() {
            for (values, width) in [(&mut *logits_cv, vocab), (hidden_cd, hidden), (low_cr, rank)] {
                values.copy_within(row * width..(row + 1) * width, to * width);
            }
        }
        let d_hidden_cd = d_hidden_cd.resize(active.len() * hidden);
        let adapted = head.adapted(&low_cr[..active.len() * rank], d_low_cr, gradient);
        let layer = Gradients { weight: head.weight, dy: &logits_cv[..active.len() * vocab], adapted };
        linear_backward(hidden_cd, active.len(), &[layer], Some(Shared::new(d_hidden_cd)), head.team);
        for (row, d) in active.iter().zip(d_hidden_cd.chunks_exact(hidden)) {
            let to = &mut d_hidden[self.rows[*row] * hidden..][..hidden];
            to.iter_mut().zip(d).for_each(|(to, d)| *to += d);
        }
    }
}

/// The `top_k` most likely tokens, descending, lowest id first on a tie.
pub(in crate::model) fn likeliest_tokens(logits: &[f32], lse: f32, top_k: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top_k + 1);
    for (token, &logit) in logits.iter().enumerate() {
        if best.len() < top_k || best.last().is_some_and(|(_, least)| logit > *least) {
            let place = best.partition_point(|(_, other)| *other >= logit);
            best.insert(place, (token as u32, logit));
            best.truncate(top_k);
        }
    }
    best.iter_mut().for_each(|(_, logit)| *logit -= lse);
    best
}

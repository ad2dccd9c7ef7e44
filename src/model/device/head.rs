use std::sync::Arc;

use crate::{
    gpu::{Array, Element, Factor, GpuError, Product, RowStatistics, TargetRows},
    model::{
        HeadRequest, HeadScores,
        decoder::{HeadChunk, likeliest_tokens},
    },
};

use super::{DeviceAdapter, DeviceModel, linear::LowRankBackward, plan::is_same};

/// Values of a chunk of logits, 512 MiB, and its rows at most and at least: a product with a thousand
/// rows is as fast as any.
const CHUNK_VALUES: usize = 128 * 1024 * 1024;
const CHUNK_ROWS: [usize; 2] = [16, 1024];

/// How the gradient goes on from the head.
pub struct DeviceHeadGradient<'a> {
    /// Of the adapter's values, all of them, f32: that of the head's matrices is added to its place.
    pub adapter: &'a Array,
    /// `factor(i, logprob_i)` is ∂S/∂logprob_i of target i. Where it is 0, nothing is computed.
    pub factor: &'a mut dyn FnMut(usize, f32) -> f32,
    /// `[r, d]` in T, zeroed by the caller; the rows that have a gradient are written.
    pub d_hidden: &'a Array,
}

/// Logits of the chosen rows of `hidden`, `[rows.len(), vocab]`, f32; with each row the adapter that computed it.
pub(super) fn head_logits(
    model: &DeviceModel,
    hidden: &Array,
    rows: &[(usize, Option<Arc<DeviceAdapter>>)],
) -> Result<Array, GpuError> {
    let width = model.config.hidden_size;
    let indices: Vec<u32> = rows.iter().map(|(row, _)| *row as u32).collect();
    let hidden = model.gpu.gather(hidden, &model.gpu.upload_u32(&indices)?, width)?;
    let logits = model.project(&hidden, rows.len())?;
    let vocab = model.config.vocab_size;
    // Rows of one adapter, end to end.
    let mut first = 0;
    for segment in rows.chunk_by(|(_, a), (_, b)| is_same(a, b)) {
        let last = first + segment.len();
        if let Some(low_rank) = segment[0].1.as_ref().and_then(|adapter| adapter.head_low_rank()) {
            let x = hidden.range(first * width..last * width);
            let y = logits.range(first * vocab..last * vocab);
            model.add_low_rank(&low_rank, segment.len(), &x, width, &y)?;
        }
        first = last;
    }
    Ok(logits)
}

/// Log-probabilities of chosen targets, in chunks of rows so that the full logits never exist. All rows
/// were computed by `adapter`. The likeliest tokens of a row are found on the host.
///
/// # Panics
///
/// If a target's row or token does not exist, or targets are not sorted by row.
pub fn head_logprobs(
    model: &DeviceModel,
    adapter: Option<&DeviceAdapter>,
    hidden: &Array,
    request: HeadRequest<'_>,
    mut gradient: Option<DeviceHeadGradient<'_>>,
) -> Result<HeadScores, GpuError> {
    let HeadRequest { targets, .. } = request;
    assert!(targets.is_sorted_by_key(|(row, _)| *row), "targets are sorted by row");
    let [vocab, rows] = [model.config.vocab_size, hidden.len() / model.config.hidden_size];
    assert!(targets.iter().all(|(row, token)| *row < rows && (*token as usize) < vocab), "targets exist");
    let rows_most = rows_most(vocab);
    let mut scores = HeadScores::default();
    let mut first = 0;
    while first < targets.len() {
        let chunk = HeadChunk::new(targets, first, rows_most);
        first = chunk.targets.end;
        let chunk = DeviceChunk::forward(model, adapter, hidden, chunk)?;
        let lse = chunk.read(request, &mut scores)?;
        if let Some(DeviceHeadGradient { adapter, factor, d_hidden }) = &mut gradient {
            let of = chunk.chunk.targets.clone();
            let factors: Vec<f32> = of.map(|i| factor(i, scores.logprobs[i])).collect();
            chunk.backward(targets, &factors, &lse, adapter, d_hidden)?;
        }
    }
    Ok(scores)
}

/// Rows of a chunk of logits, at most.
pub(super) fn rows_most(vocab: usize) -> usize {
    let [fewest, most] = CHUNK_ROWS;
    (CHUNK_VALUES / vocab).clamp(fewest, most)
}

/// Some targets, and what has been computed of their rows.
struct DeviceChunk<'a> {
    model: &'a DeviceModel,
    adapter: Option<&'a DeviceAdapter>,
    chunk: HeadChunk,
    /// `[c, d]` in T.
    hidden: Array,
    /// `[c, v]`, f32.
    logits: Array,
    /// `A x` of an adapted head.
    low: Option<Array>,
}

impl<'a> DeviceChunk<'a> {
    fn forward(
        model: &'a DeviceModel,
        adapter: Option<&'a DeviceAdapter>,
        hidden: &Array,
        chunk: HeadChunk,
    ) -> Result<Self, GpuError> {
        let (rows, width) = (chunk.rows.len(), model.config.hidden_size);
        let indices: Vec<u32> = chunk.rows.iter().map(|row| *row as u32).collect();
        let hidden = model.gpu.gather(hidden, &model.gpu.upload_u32(&indices)?, width)?;
        let logits = model.project(&hidden, rows)?;
        let low_rank = adapter.and_then(|adapter| adapter.head_low_rank());
        let low = low_rank.map(|low_rank| model.add_low_rank(&low_rank, rows, &hidden, width, &logits));
        Ok(Self { model, adapter, chunk, hidden, logits, low: low.transpose()? })
    }

    /// Appends what is asked of the targets; returns each row's log-sum-exp.
    fn read(&self, request: HeadRequest<'_>, scores: &mut HeadScores) -> Result<Array, GpuError> {
        let HeadRequest { targets, top_k, entropy } = request;
        let (gpu, vocab) = (&self.model.gpu, self.model.config.vocab_size);
        let of_chunk = &targets[self.chunk.targets.clone()];
        let RowStatistics { lse, .. } = gpu.row_statistics(&self.logits, vocab)?;
        let row_of: Vec<u32> = self.chunk.row_of.iter().map(|row| *row as u32).collect();
        let tokens: Vec<u32> = of_chunk.iter().map(|(_, token)| *token).collect();
        let (row_of, tokens) = (gpu.upload_u32(&row_of)?, gpu.upload_u32(&tokens)?);
        let logprobs = gpu.target_logprobs(&self.logits, &lse, &row_of, &tokens, vocab)?;
        scores.logprobs.extend(gpu.download(&logprobs)?);
        if entropy {
            let entropies = gpu.download(&gpu.row_entropies(&self.logits, &lse, vocab)?)?;
            scores.entropies.extend(self.chunk.row_of.iter().map(|row| entropies[*row]));
        }
        if top_k > 0 {
            let (logits, lse) = (gpu.download(&self.logits)?, gpu.download(&lse)?);
            let rows: Vec<_> = logits
                .chunks_exact(vocab)
                .zip(&lse)
                .map(|(logits, lse)| likeliest_tokens(logits, *lse, top_k))
                .collect();
            scores.alternatives.extend(self.chunk.row_of.iter().map(|row| rows[*row].clone()));
        }
        Ok(lse)
    }

    /// Adds the gradient of the rows whose targets have factors.
    fn backward(
        &self,
        targets: &[(usize, u32)],
        factors: &[f32],
        lse: &Array,
        gradient: &Array,
        d_hidden: &Array,
    ) -> Result<(), GpuError> {
        let DeviceModel { gpu, config, element, .. } = self.model;
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let Some(active) = Active::new(&self.chunk, targets, factors) else { return Ok(()) };
        let rows = active.rows.len();
        let indices = gpu.upload_u32(&active.rows)?;
        let targets = TargetRows {
            rows: &indices,
            first_target: &gpu.upload_u32(&active.first_target)?,
            tokens: &gpu.upload_u32(&active.tokens)?,
            factors: &gpu.upload(Element::F32, &active.factors)?,
        };
        let d_logits = gpu.logits_gradient(&self.logits, lse, targets, vocab, *element)?;
        let dx = gpu.array(*element, rows * width)?;
        gpu.product(Product {
            left: Factor::Plain(&d_logits),
            right: Factor::Plain(&self.model.head),
            alpha: 1.0,
            beta: 0.0,
            result: &dx,
            m: rows,
            n: width,
            k: vocab,
        })?;
        let low_rank = self.adapter.and_then(|adapter| adapter.head_low_rank());
        if let Some((low_rank, low)) = low_rank.zip(self.low.as_ref()) {
            let x = gpu.gather(&self.hidden, &indices, width)?;
            let low = gpu.gather(low, &indices, low_rank.rank)?;
            let operands = LowRankBackward { rows, x: &x, low: &low, dy: &d_logits, dx: Some(&dx) };
            self.model.low_rank_backward(&low_rank, operands, gradient)?;
        }
        let to: Vec<u32> = active.rows.iter().map(|row| self.chunk.rows[*row as usize] as u32).collect();
        gpu.scatter(&dx, &gpu.upload_u32(&to)?, d_hidden, width)
    }
}

/// The rows of a chunk that have a gradient, with their targets.
struct Active {
    /// Counted in the chunk.
    rows: Vec<u32>,
    first_target: Vec<u32>,
    tokens: Vec<u32>,
    factors: Vec<f32>,
}

impl Active {
    fn new(chunk: &HeadChunk, targets: &[(usize, u32)], factors: &[f32]) -> Option<Self> {
        let mut active =
            Self { rows: Vec::new(), first_target: vec![0], tokens: Vec::new(), factors: Vec::new() };
        let of_chunk = chunk.row_of.iter().zip(&targets[chunk.targets.clone()]).zip(factors);
        let of_chunk: Vec<_> = of_chunk.map(|((row, (_, token)), factor)| (*row, *token, *factor)).collect();
        for row in of_chunk.chunk_by(|(a, ..), (b, ..)| a == b) {
            if row.iter().all(|(.., factor)| *factor == 0.0) {
                continue;
            }
            active.rows.push(row[0].0 as u32);
            active.tokens.extend(row.iter().map(|(_, token, _)| token));
            active.factors.extend(row.iter().map(|(.., factor)| factor));
            active.first_target.push(active.tokens.len() as u32);
        }
        (!active.rows.is_empty()).then_some(active)
    }
}

impl DeviceModel {
    /// `hidden · Wᵀ` of the head, f32.
    fn project(&self, hidden: &Array, rows: usize) -> Result<Array, GpuError> {
        let vocab = self.config.vocab_size;
        let logits = self.gpu.array(Element::F32, rows * vocab)?;
        self.gpu.product(Product {
            left: Factor::Plain(hidden),
            right: Factor::Transposed(&self.head),
            alpha: 1.0,
            beta: 0.0,
            result: &logits,
            m: rows,
            n: vocab,
            k: self.config.hidden_size,
        })?;
        Ok(logits)
    }
}

//! Draws tokens where the logits are: 8 bytes of a row come to the host, not its logits.
//!
//! ```text
//!   host   uniform number, temperature ──►  16 bytes a row
//!   GPU    logits ──► largest, log-sum-exp ──► weights of chunks ──► chunk, token
//!   host   token, log-probability      ◄──  8 bytes a row
//! ```
//!
//! The token is that of `model/draw/` for the same logits, unless the uniform number lies within the rounding of an
//! exponential of the border between two tokens. The log-probability is the logit less the log-sum-exp that
//! [`head_logprobs`](super::head_logprobs) takes, so equal logits give the trainer's bits.
//!
//! `top_k` and `top_p` look at a row in order of rank; rows with one of them are left to the host, logits and all.

use std::sync::Arc;

use crate::{
    gpu::{Array, GpuError, RowDraw},
    model::draw::{Decoding, Drawn, NotFinite, Wanted},
};

use super::{
    DeviceAdapter, DeviceModel,
    head::{head_logits, rows_most},
};

/// Rows that the host draws from.
#[derive(Default)]
pub(in crate::model) struct LeftRows {
    /// Which of those that were asked for; ascending.
    pub rows: Vec<usize>,
    /// Of each, its log-sum-exp.
    pub lse: Vec<f32>,
}

/// Draws from the chosen rows of `hidden`, in chunks of rows as in training; with each row the adapter that computed
/// it. Logits of the rows that are left, `[left, vocab]`, are written to `logits_sv`; what is said to be drawn from
/// them means nothing.
pub(in crate::model) fn draw_rows(
    model: &DeviceModel,
    hidden: &Array,
    rows: &[(usize, Option<Arc<DeviceAdapter>>)],
    wanted: &[Wanted],
    logits_sv: &mut Vec<f32>,
) -> Result<(Vec<Result<Drawn, NotFinite>>, LeftRows), GpuError> {
    assert_eq!(rows.len(), wanted.len());
    let (gpu, vocab) = (&model.gpu, model.config.vocab_size);
    let filtered = wanted.iter().filter(|wanted| wanted.decoding.is_filtered()).count();
    logits_sv.resize(filtered * vocab, 0.0);
    let (mut drawn, mut left) = (Vec::with_capacity(rows.len()), LeftRows::default());
    let rows_most = rows_most(vocab);
    for (rows, wanted) in rows.chunks(rows_most).zip(wanted.chunks(rows_most)) {
        let logits = head_logits(model, hidden, rows)?;
        let statistics = gpu.row_statistics(&logits, vocab)?;
        let draws: Vec<RowDraw> = wanted.iter().map(RowDraw::from).collect();
        let tokens = gpu.draw(&logits, &statistics, &draws, vocab)?;
        left.bring(model, drawn.len(), wanted, &logits, &statistics.lse, logits_sv)?;
        let known = |(token, logprob)| Drawn::new(token, logprob);
        drawn.extend(tokens.into_iter().map(|token| token.map(known).ok_or(NotFinite)));
    }
    Ok((drawn, left))
}

impl LeftRows {
    /// Brings the filtered ones among a chunk's rows, of which the first is `first`: their logits behind those that were
    /// brought before.
    fn bring(
        &mut self,
        model: &DeviceModel,
        first: usize,
        wanted: &[Wanted],
        logits_cv: &Array,
        lse: &Array,
        logits_sv: &mut [f32],
    ) -> Result<(), GpuError> {
        let (gpu, vocab) = (&model.gpu, model.config.vocab_size);
        let filtered = (0..wanted.len()).filter(|row| wanted[*row].decoding.is_filtered());
        let filtered: Vec<usize> = filtered.collect();
        if filtered.is_empty() {
            return Ok(());
        }
        let lse = gpu.download(lse)?;
        for run in filtered.chunk_by(|row, next| row + 1 == *next) {
            let rows = run[0]..run[0] + run.len();
            let to = &mut logits_sv[self.rows.len() * vocab..][..run.len() * vocab];
            gpu.download_to(&logits_cv.range(rows.start * vocab..rows.end * vocab), to)?;
            self.lse.extend_from_slice(&lse[rows]);
            self.rows.extend(run.iter().map(|row| first + row));
        }
        Ok(())
    }
}

impl From<&Wanted> for RowDraw {
    fn from(Wanted { decoding, uniform }: &Wanted) -> Self {
        match decoding {
            Decoding::Greedy => Self::Largest,
            Decoding::Random(_) if decoding.is_filtered() => Self::Left,
            Decoding::Random(filter) => Self::Random { temperature: filter.temperature, uniform: *uniform },
        }
    }
}

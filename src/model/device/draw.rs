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
    /// `[rows, vocab]`
    pub logits_sv: Vec<f32>,
    /// Of each, its log-sum-exp.
    pub lse: Vec<f32>,
}

/// Draws from the chosen rows of `hidden`, in chunks of rows as in training; with each row the adapter that computed
/// it. What is said of the rows that are left means nothing.
pub(in crate::model) fn draw_rows(
    model: &DeviceModel,
    hidden: &Array,
    rows: &[(usize, Option<Arc<DeviceAdapter>>)],
    wanted: &[Wanted],
) -> Result<(Vec<Result<Drawn, NotFinite>>, LeftRows), GpuError> {
    assert_eq!(rows.len(), wanted.len());
    let rows_most = rows_most(model.config.vocab_size);
    let (mut drawn, mut left) = (Vec::with_capacity(rows.len()), LeftRows::default());
    for (rows, wanted) in rows.chunks(rows_most).zip(wanted.chunks(rows_most)) {
        let logits = head_logits(model, hidden, rows)?;
        draw_chunk(model, &logits, wanted, &mut drawn, &mut left)?;
    }
    Ok((drawn, left))
}

/// Appends what the rows of `logits_cv` give.
pub(super) fn draw_chunk(
    model: &DeviceModel,
    logits_cv: &Array,
    wanted: &[Wanted],
    drawn: &mut Vec<Result<Drawn, NotFinite>>,
    left: &mut LeftRows,
) -> Result<(), GpuError> {
    let (gpu, vocab, first) = (&model.gpu, model.config.vocab_size, drawn.len());
    let statistics = gpu.row_statistics(logits_cv, vocab)?;
    let draws: Vec<RowDraw> = wanted.iter().map(RowDraw::from).collect();
    let tokens = gpu.draw(logits_cv, &statistics, &draws, vocab)?;
    let result = |token: Option<(u32, f32)>| token.map(|(token, logprob)| Drawn::new(token, logprob));
    drawn.extend(tokens.into_iter().map(|token| result(token).ok_or(NotFinite)));

    let filtered: Vec<usize> = (0..wanted.len()).filter(|row| wanted[*row].decoding.is_filtered()).collect();
    if filtered.is_empty() {
        return Ok(());
    }
    let lse = gpu.download(&statistics.lse)?;
    for run in filtered.chunk_by(|row, next| row + 1 == *next) {
        let (begin, end) = (run[0], run[0] + run.len());
        left.rows.extend(first + begin..first + end);
        left.lse.extend_from_slice(&lse[begin..end]);
        left.logits_sv.extend(gpu.download(&logits_cv.range(begin * vocab..end * vocab))?);
    }
    Ok(())
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

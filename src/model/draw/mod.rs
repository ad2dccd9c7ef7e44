//! Draws a token from one row of logits, and says how likely it was.
//!
//! A draw is a pure function of the row, the [`Decoding`] and the [`DrawKey`]: it knows no batch
//! and no clock, so the same request draws the same tokens in any company. The order of the
//! filters is the usual one: temperature, then `top_k`, then `top_p` among what is left. The
//! log-probability is always that of the unmodified distribution.
//!
//! The plain case (no `top_k`, no `top_p`) makes two passes over the row and sorts nothing. A GPU draws it by
//! kernels of its own (`device/draw.rs`), from the same uniform number.

mod filter;
mod numerics;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::{kernels::Team, types::SamplingParams};

use numerics::{BLOCK, RowSum, exp};

/// How the log-probability of an impossible token is written: JSON has no infinity.
pub const MIN_LOGPROB: f32 = -9999.0;

/// What decides one draw, beside the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    /// The request's seed.
    pub seed: u64,
    /// Which of the request's `num_samples` sequences.
    pub sequence: u32,
    /// Which of the sequence's new tokens, from 0.
    pub position: u64,
}

/// How tokens are drawn: what [`SamplingParams`] say about it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decoding {
    /// The largest logit; the lowest id on a tie.
    Greedy,
    /// By probability.
    Random(Filter),
}

/// Which tokens may be drawn, and how their probabilities are sharpened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filter {
    /// Divides the logits; positive.
    pub temperature: f32,
    /// Only the k largest; absent: all.
    pub top_k: Option<usize>,
    /// Then the fewest whose sum reaches this share of what `top_k` left; absent: all.
    pub top_p: Option<f64>,
}

/// A drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    pub token: u32,
    /// Under the log-softmax of the row as it is; at least [`MIN_LOGPROB`].
    pub logprob: f32,
}

/// What decides one draw, with the key's number drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Wanted {
    pub decoding: Decoding,
    /// In [0, 1).
    pub uniform: f64,
}

/// Memory of draws, used again from step to step.
#[derive(Default)]
pub struct DrawBuffers {
    /// `[rows, vocab]`: what is drawn from on the host.
    pub(super) logits_sv: Vec<f32>,
    /// Of each row, the tokens that its filter keeps.
    pub(super) kept: Vec<Vec<u32>>,
}

/// The row has NaN, `+inf`, or nothing but `-inf`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

impl Decoding {
    /// Of [valid](SamplingParams::validate) parameters.
    pub fn new(params: &SamplingParams) -> Self {
        let SamplingParams { temperature, top_p, top_k, .. } = *params;
        // A temperature that f32 can't tell from 0 has the same limit.
        let temperature = temperature as f32;
        if top_k == 1 || temperature == 0.0 {
            return Self::Greedy;
        }
        Self::Random(Filter {
            temperature,
            top_k: usize::try_from(top_k).ok(),
            top_p: (top_p < 1.0).then_some(top_p),
        })
    }

    /// Whether some tokens may not be drawn, and which they are takes looking at the row in order of rank.
    pub(super) fn is_filtered(self) -> bool {
        matches!(self, Self::Random(filter) if filter.top_k.is_some() || filter.top_p.is_some())
    }
}

impl DrawKey {
    /// A uniform number in [0, 1) with 53 random bits: ChaCha8 keyed by seed and sequence, its
    /// stream chosen by the position.
    pub(super) fn uniform(self) -> f64 {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..12].copy_from_slice(&self.sequence.to_le_bytes());
        // Apart from the streams of a fresh adapter, which a run's seed keys as well.
        key[16..].copy_from_slice(b"lockstep sampler");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(self.position);
        (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

impl Drawn {
    /// Of a token and its logit less the row's log-sum-exp.
    pub(super) fn new(token: u32, logprob: f32) -> Self {
        Self { token, logprob: logprob.max(MIN_LOGPROB) }
    }
}

/// Draws one token from each row of `[rows, vocab]` logits, the rows shared over the team. `lse_of` says a row's
/// log-sum-exp, given its number and its logits: whoever computes it as the trainer does gets the trainer's bits.
pub(super) fn draw_rows(
    logits_sv: &[f32],
    wanted: &[Wanted],
    lse_of: impl Fn(usize, &[f32]) -> f32 + Sync,
    kept: &mut Vec<Vec<u32>>,
    team: &Team,
) -> Vec<Result<Drawn, NotFinite>> {
    struct Row<'a> {
        kept: &'a mut Vec<u32>,
        drawn: Result<Drawn, NotFinite>,
    }
    let rows = wanted.len();
    let vocab = logits_sv.len() / rows.max(1);
    kept.resize_with(kept.len().max(rows), Vec::new);
    let slots = kept.iter_mut().take(rows).map(|kept| Mutex::new(Row { kept, drawn: Err(NotFinite) }));
    let slots: Vec<_> = slots.collect();
    team.run(rows, |row| {
        // Each row has its own lock, taken once: it is never waited for.
        let mut slot = slots[row].lock().unwrap_or_else(PoisonError::into_inner);
        let Row { kept, drawn } = &mut *slot;
        let logits_v = &logits_sv[row * vocab..][..vocab];
        *drawn = pick(logits_v, wanted[row], kept)
            .map(|token| Drawn::new(token, logits_v[token as usize] - lse_of(row, logits_v)));
    });
    slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner).drawn).collect()
}

/// Draws from a row of `[vocab]` logits. `kept` is overwritten; keep it from call to call.
pub(super) fn pick(logits_v: &[f32], wanted: Wanted, kept: &mut Vec<u32>) -> Result<u32, NotFinite> {
    let Wanted { decoding, uniform } = wanted;
    let plain = RowSum::of(logits_v, 1.0).ok_or(NotFinite)?;
    Ok(match decoding {
        Decoding::Greedy => arg_max(logits_v, plain.max),
        Decoding::Random(filter) if !decoding.is_filtered() => {
            if filter.temperature == 1.0 {
                pick_from_all(logits_v, &plain, uniform)
            } else {
                let scaled = RowSum::of(logits_v, filter.temperature).ok_or(NotFinite)?;
                pick_from_all(logits_v, &scaled, uniform)
            }
        }
        Decoding::Random(filter) => {
            let weight = |token: u32| weight(logits_v, plain.max, filter.temperature, token);
            filter.keep(logits_v, plain.max, &weight, kept).ok_or(NotFinite)?;
            // Picking walks in the order of ids, so that a filter that keeps everything draws
            // what no filter draws.
            kept.sort_unstable();
            pick_from(kept, &weight, uniform)
        }
    })
}

fn weight(logits_v: &[f32], max: f32, temperature: f32, token: u32) -> f64 {
    exp((logits_v[token as usize] - max) / temperature).into()
}

fn arg_max(logits_v: &[f32], max: f32) -> u32 {
    // The sum was finite, so the row's maximum is one of its values.
    logits_v.iter().position(|&logit| logit == max).map_or(0, |token| token as u32)
}

/// Finds the block first, then the token in it.
fn pick_from_all(logits_v: &[f32], sum: &RowSum, uniform: f64) -> u32 {
    let aim = uniform * sum.total;
    let (block, below) = first_above(sum.blocks.iter().copied(), aim);
    let first = block * BLOCK;
    let last = (first + BLOCK).min(logits_v.len());
    let weights = (first as u32..last as u32).map(|token| weight(logits_v, sum.max, sum.temperature, token));
    (first + first_above(weights, aim - below).0) as u32
}

fn pick_from(ids: &[u32], weight: &dyn Fn(u32) -> f64, uniform: f64) -> u32 {
    let total: f64 = ids.iter().map(|&token| weight(token)).sum();
    ids[first_above(ids.iter().map(|&token| weight(token)), uniform * total).0]
}

/// Which weight is the first at which their running sum exceeds `aim`, and the sum before it; where rounding keeps
/// the sum from it, the last one that is not 0.
fn first_above(weights: impl Iterator<Item = f64>, aim: f64) -> (usize, f64) {
    let (mut chosen, mut sum) = ((0, 0.0), 0.0);
    for (index, weight) in weights.enumerate().filter(|(_, weight)| *weight > 0.0) {
        chosen = (index, sum);
        sum += weight;
        if sum > aim {
            break;
        }
    }
    chosen
}

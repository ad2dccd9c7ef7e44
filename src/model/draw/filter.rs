//! `top_k` and `top_p`: which tokens may be drawn.

use super::{Filter, numerics::RowSum};

impl Filter {
    /// Writes the tokens that may be drawn to `kept`, in no particular order; at least one.
    /// Nothing if the row has no finite sum.
    pub(super) fn keep(
        &self,
        logits_v: &[f32],
        max: f32,
        weight: &dyn Fn(u32) -> f64,
        kept: &mut Vec<u32>,
    ) -> Option<()> {
        kept.clear();
        let total = match self.top_k {
            Some(k) if k < logits_v.len() => {
                keep_largest(logits_v, k, kept);
                kept.sort_unstable();
                kept.iter().map(|&token| weight(token)).sum()
            }
            _ => {
                let total = RowSum::of(logits_v, self.temperature)?.total;
                let floor = self.nucleus_floor(max, total, logits_v.len());
                let likely = logits_v.iter().zip(0..).filter(|&(&logit, _)| logit >= floor);
                kept.extend(likely.map(|(_, token): (_, u32)| token));
                total
            }
        };
        if let Some(p) = self.top_p {
            keep_nucleus(logits_v, weight, p * total, kept);
        }
        Some(())
    }

    /// Tokens of a smaller logit are in no nucleus: each holds less than `(1 - p) / vocab` of the
    /// whole, so less than `1 - p` together. Without them, ranking starts with hundreds of tokens,
    /// not tens of thousands. Half the bound leaves room for rounding.
    fn nucleus_floor(&self, max: f32, total: f64, vocab: usize) -> f32 {
        let Some(p) = self.top_p else { return f32::NEG_INFINITY };
        let too_light = 0.5 * (1.0 - p) * total / vocab as f64;
        (f64::from(max) + f64::from(self.temperature) * too_light.ln()) as f32
    }
}

/// More likely first; the lower id first on a tie.
fn by_rank(logits_v: &[f32]) -> impl Fn(&u32, &u32) -> std::cmp::Ordering {
    |a, b| logits_v[*b as usize].total_cmp(&logits_v[*a as usize]).then(a.cmp(b))
}

/// The `k` first by rank, in one pass that compares almost every token with one threshold.
fn keep_largest(logits_v: &[f32], k: usize, kept: &mut Vec<u32>) {
    // An equal logit further on has a higher id and loses the tie, so `>` is enough.
    let mut threshold = f32::NEG_INFINITY;
    for (token, &logit) in logits_v.iter().enumerate() {
        if logit > threshold || kept.len() < k {
            kept.push(token as u32);
            if kept.len() == 2 * k {
                kept.select_nth_unstable_by(k - 1, by_rank(logits_v));
                kept.truncate(k);
                threshold = logits_v[kept[k - 1] as usize];
            }
        }
    }
    if kept.len() > k {
        kept.select_nth_unstable_by(k - 1, by_rank(logits_v));
        kept.truncate(k);
    }
}

/// The fewest of `kept`, by rank, whose weights sum to `aim`.
fn keep_nucleus(logits_v: &[f32], weight: &dyn Fn(u32) -> f64, aim: f64, kept: &mut Vec<u32>) {
    let mut head = FIRST_NUCLEUS;
    while head < kept.len() {
        kept.select_nth_unstable_by(head - 1, by_rank(logits_v));
        // A margin, as the sum in another order may round to the other side of the aim.
        let mass: f64 = kept[..head].iter().map(|&token| weight(token)).sum();
        if mass > aim * (1.0 + 1e-9) {
            kept.truncate(head);
            break;
        }
        head *= 4;
    }
    kept.sort_unstable_by(by_rank(logits_v));
    let mut sum = 0.0;
    let reached = kept.iter().position(|&token| {
        sum += weight(token);
        sum >= aim
    });
    if let Some(last) = reached {
        kept.truncate(last + 1);
    }
}

/// How many of the most likely tokens are tried first as the nucleus: it seldom is larger.
const FIRST_NUCLEUS: usize = 256;

//! The choice of a mixture's experts: softmax over all of them, then the likeliest few.
//!
//! Legend: r rows, e experts, k experts of a row.

use super::{
    Team,
    buffer::Shared,
    rows::for_rows,
    softmax::{log_sum_exp, softmax_gradient},
};

/// How rows choose.
#[derive(Clone, Copy)]
pub(crate) struct Router {
    pub experts: usize,
    pub per_row: usize,
    /// Whether the weights of a row's experts are made to sum to one.
    pub normalises: bool,
}

impl Router {
    /// Turns `scores_re`, logits, into their softmax, and writes each row's experts, ascending, to
    /// `chosen_rk`, and their weights to `weights_rk`. Of equal experts the first is taken.
    pub(crate) fn choose(
        self,
        scores_re: &mut [f32],
        chosen_rk: &mut [u32],
        weights_rk: &mut [f32],
        team: &Team,
    ) {
        let rows = scores_re.len() / self.experts;
        let scores = Shared::new(scores_re);
        for_rows(team, rows, self.experts, |rows| {
            // SAFETY: tasks have distinct rows.
            let scores = unsafe { scores.part(rows.start * self.experts..rows.end * self.experts) };
            for scores in scores.chunks_exact_mut(self.experts) {
                softmax_gradient(scores, log_sum_exp(scores), 1.0);
            }
        });
        // A few comparisons a row, which no thread need be woken for.
        let choices = chosen_rk.chunks_exact_mut(self.per_row).zip(weights_rk.chunks_exact_mut(self.per_row));
        for (probabilities, (chosen, weights)) in scores_re.chunks_exact(self.experts).zip(choices) {
            likeliest(probabilities, chosen);
            for (weight, expert) in weights.iter_mut().zip(&*chosen) {
                *weight = probabilities[*expert as usize];
            }
            if self.normalises {
                let sum: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
        }
    }

    /// The gradient of the logits, `[r, e]`, given that of the weights.
    ///
    /// With p the softmax and w the weights: if they are normalised, w is the softmax over the
    /// chosen logits alone, and `dl_i = w_i (dw_i − Σ w dw)` for them; else w = p, and
    /// `dl_i = p_i (dw_i − Σ p dw)` for every expert, with dw = 0 for those not chosen.
    pub(crate) fn backward(
        self,
        probabilities_re: &[f32],
        chosen_rk: &[u32],
        weights_rk: &[f32],
        d_weights_rk: &[f32],
        d_logits_re: &mut [f32],
    ) {
        let rows =
            probabilities_re.chunks_exact(self.experts).zip(d_logits_re.chunks_exact_mut(self.experts));
        let choices = chosen_rk.chunks_exact(self.per_row);
        let weights = weights_rk.chunks_exact(self.per_row).zip(d_weights_rk.chunks_exact(self.per_row));
        for ((probabilities, d_logits), (chosen, (weights, d_weights))) in rows.zip(choices.zip(weights)) {
            let sum: f32 = weights.iter().zip(d_weights).map(|(w, dw)| w * dw).sum();
            match self.normalises {
                true => d_logits.fill(0.0),
                false => d_logits.iter_mut().zip(probabilities).for_each(|(dl, p)| *dl = -p * sum),
            }
            for ((expert, weight), d_weight) in chosen.iter().zip(weights).zip(d_weights) {
                d_logits[*expert as usize] = weight * (d_weight - sum);
            }
        }
    }
}

/// The likeliest experts, as many as there is room for, ascending by number.
fn likeliest(probabilities: &[f32], chosen: &mut [u32]) {
    let mut count = 0;
    for (expert, probability) in probabilities.iter().enumerate() {
        // Kept likeliest first; an equal one that came before stays before.
        let better = |other: &u32| probabilities[*other as usize].total_cmp(probability).is_ge();
        let place = chosen[..count].partition_point(better);
        if place < chosen.len() {
            count = (count + 1).min(chosen.len());
            chosen[place..count].rotate_right(1);
            chosen[place] = expert as u32;
        }
    }
    chosen.sort_unstable();
}

//! Figures beside the loss: sums over active positions (or pairs), which a call's result shows as
//! means.

use crate::model::loss::{PolicyGap, Side};

use super::{
    MicroBatchOutput,
    run::{Packed, Scores},
};

/// Sampled data: how far trainer and sampler are apart (`kl_k1`, `kl_k2`, `kl_k3`, `ratio`, and
/// `max_token_gap`), and the trainer's `entropy`.
pub(super) fn add_policy(packed: &Packed<'_>, scores: &Scores, output: &mut MicroBatchOutput) {
    let (mut sums, mut largest) = ([0.0; 6], 0.0f64);
    let scored = scores.head.logprobs.iter().zip(&scores.head.entropies);
    for ((_, target), (logprob, entropy)) in packed.targets.iter().zip(scored) {
        let Some(inputs) = target.loss else { continue };
        let at = PolicyGap::at(*logprob, inputs.logprob);
        let terms = [at.k1, at.k2, at.k3, at.ratio, at.ratio * at.ratio, f64::from(*entropy)];
        sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        largest = largest.max(at.gap);
    }
    let names = ["kl_k1", "kl_k2", "kl_k3", "ratio", "ratio_squared", "entropy"];
    add(output, names.into_iter().zip(sums));
    output.maxima.insert("max_token_gap".to_owned(), largest);
}

/// How often a bound on the ratio took effect: `clip_low_fraction`, `clip_high_fraction`.
pub(super) fn add_clipping(scores: &Scores, output: &mut MicroBatchOutput) {
    for (name, side) in [("clip_low_fraction", Side::Low), ("clip_high_fraction", Side::High)] {
        let clipped = scores.losses.iter().flatten().filter(|at| at.clipped == Some(side));
        add(output, [(name, clipped.count() as f64)]);
    }
}

/// How much the trainer prefers either sequence of a pair, relative to the reference:
/// `reward_chosen`, `reward_rejected`, their `reward_margin`, and `reward_accuracy`, 1 where the
/// chosen one is preferred.
pub(super) fn add_rewards(scores: &Scores, output: &mut MicroBatchOutput) {
    for [chosen, rejected] in &scores.rewards {
        let margin = chosen - rejected;
        let terms = [
            ("reward_chosen", *chosen),
            ("reward_rejected", *rejected),
            ("reward_margin", margin),
            ("reward_accuracy", f64::from(u8::from(margin > 0.0))),
        ];
        add(output, terms);
    }
}

fn add(output: &mut MicroBatchOutput, terms: impl IntoIterator<Item = (&'static str, f64)>) {
    for (name, term) in terms {
        *output.sums.entry(name.to_owned()).or_default() += term;
    }
}

//! From the data of a call to losses, log-probabilities and gradients, micro-batch by
//! micro-batch.
//!
//! ```text
//!   data ─prepare─► examples ─cut_micro_batches─► ranges ─run_micro_batch─► outputs, gradients
//!                                                                     outputs ─merge, finish─► result
//! ```
//!
//! Everything that can be wrong with the data is found in [`prepare`], for the whole call
//! and before anything is computed; what is left to fail afterwards is numbers that leave the
//! finite range. Which micro-batches there are, and what each yields, depends on the call and
//! the budget alone: not on who computes them.

mod prepare;

mod metrics;
mod output;
mod run;

use std::ops::Range;

use crate::types::LossInputs;

pub use output::MicroBatchOutput;
pub use prepare::prepare;
pub use run::run_micro_batch;

/// A datum checked against the loss and the model, ready to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Which datum of the call it is: errors name it.
    datum: usize,
    /// Whether it has its loss together with the example before it, as the second of a pair.
    continues: bool,
    /// The sequence of N positions.
    tokens: Vec<u32>,
    /// What to score, by row. Empty: nothing of this example need be computed.
    targets: Vec<Target>,
    /// The `logprobs` output before the computed ones are put in: NaN where there is no
    /// target, 0.0 where a target is not scored or the sequence ends.
    logprobs: Vec<f32>,
    /// `[N]` or `[N, K]`.
    logprobs_shape: Vec<usize>,
    /// Positions that count for the token mean; at the first of a pair, pairs.
    active: u64,
}

/// One (position, token) whose log-probability is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Target {
    /// Position in the sequence.
    row: usize,
    token: u32,
    /// Where its log-probability goes in [`Example::logprobs`]. Absent where only the most
    /// likely tokens of the row are wanted.
    slot: Option<usize>,
    /// Absent: inactive, it adds nothing to loss and gradient.
    loss: Option<LossInputs>,
    /// The sampler's log-probability, where the position counts in its sequence's ratio.
    ratio_logprob: Option<f32>,
}

impl Example {
    /// Positions to compute: what the budget of a micro-batch counts, and ranks weigh. 1 for an
    /// example of which nothing is to be computed, so that no micro-batch weighs nothing.
    pub fn tokens(&self) -> usize {
        if self.targets.is_empty() { 1 } else { self.tokens.len() }
    }
}

/// Cuts examples into micro-batches: consecutive, at most `budget` tokens each; one over the
/// budget is alone. A pair counts as one example. A pure function of its arguments.
pub fn cut_micro_batches(examples: &[Example], budget: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut start, mut end, mut tokens) = (0, 0, 0);
    for group in groups(examples) {
        let more: usize = group.iter().map(Example::tokens).sum();
        if end > start && tokens + more > budget {
            ranges.push(start..end);
            (start, tokens) = (end, 0);
        }
        end += group.len();
        tokens += more;
    }
    if start < end {
        ranges.push(start..end);
    }
    ranges
}

/// Examples that have a loss between them: pairs, or each by itself.
fn groups(examples: &[Example]) -> impl Iterator<Item = &[Example]> {
    examples.chunk_by(|_, next| next.continues)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(lengths: &[usize]) -> Vec<Example> {
        let example = |(datum, &n): (usize, &usize)| Example {
            datum,
            continues: false,
            tokens: vec![0; n],
            targets: vec![Target { row: 0, token: 0, slot: Some(0), loss: None, ratio_logprob: None }],
            logprobs: vec![0.0; n],
            logprobs_shape: vec![n],
            active: 0,
        };
        lengths.iter().enumerate().map(example).collect()
    }

    #[test]
    fn cuts_fill_the_budget_in_order() {
        assert_eq!(cut_micro_batches(&examples(&[4, 4, 2, 5, 5, 1]), 10), [0..3, 3..5, 5..6]);
    }

    #[test]
    fn an_example_over_the_budget_is_alone() {
        assert_eq!(cut_micro_batches(&examples(&[2, 30, 2, 2]), 10), [0..1, 1..2, 2..4]);
        assert_eq!(cut_micro_batches(&examples(&[30, 2]), 10), [0..1, 1..2]);
    }

    #[test]
    fn a_budget_of_zero_cuts_everywhere() {
        assert_eq!(cut_micro_batches(&examples(&[1, 1]), 0), [0..1, 1..2]);
    }

    #[test]
    fn no_examples_make_no_micro_batches() {
        assert!(cut_micro_batches(&[], 10).is_empty());
    }

    #[test]
    fn a_pair_is_never_cut() {
        let mut examples = examples(&[4, 4, 1, 1, 9, 9, 1, 1]);
        examples.iter_mut().skip(1).step_by(2).for_each(|rejected| rejected.continues = true);
        assert_eq!(cut_micro_batches(&examples, 10), [0..4, 4..6, 6..8]);
        assert_eq!(cut_micro_batches(&examples, 0), [0..2, 2..4, 4..6, 6..8]);
    }

    proptest::proptest! {
        #[test]
        fn cuts_cover_everything_once_within_the_budget(
            lengths in proptest::collection::vec(1usize..40, 0..50),
            budget in 0usize..100,
        ) {
            let examples = examples(&lengths);
            let ranges = cut_micro_batches(&examples, budget);
            let tokens = |range: &Range<usize>| lengths[range.clone()].iter().sum::<usize>();
            let covered: Vec<usize> = ranges.iter().cloned().flatten().collect();
            assert_eq!(covered, (0..lengths.len()).collect::<Vec<_>>());
            assert!(ranges.iter().all(|range| range.len() == 1 || tokens(range) <= budget));
            // Greedy: the next example would not have fitted.
            for pair in ranges.windows(2) {
                assert!(tokens(&pair[0]) + lengths[pair[1].start] > budget);
            }
        }
    }

    #[test]
    fn an_example_without_targets_weighs_one() {
        let mut examples = examples(&[8, 8, 8]);
        examples[1].targets.clear();
        assert_eq!(examples[1].tokens(), 1);
        assert_eq!(cut_micro_batches(&examples, 9), [0..2, 2..3]);
    }
}

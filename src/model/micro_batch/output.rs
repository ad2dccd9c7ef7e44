use std::collections::BTreeMap;

use crate::types::{DatumOutput, ForwardBackwardOutput, LossFn, LossSpec};

/// What one micro-batch contributes, or several consecutive ones together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MicroBatchOutput {
    /// Σ over active positions, in f64, in a fixed order.
    pub loss_sum: f64,
    /// Active positions; pairs of `dpo`.
    pub active: u64,
    /// One per example, in order.
    pub outputs: Vec<DatumOutput>,
    /// Further sums over active positions by name (`kl_k1`, …), added over micro-batches.
    pub sums: BTreeMap<String, f64>,
    /// Largest values over active positions by name (`max_token_gap`).
    pub maxima: BTreeMap<String, f64>,
}

impl MicroBatchOutput {
    /// Appends the next micro-batch. Sums in f64 are no sets: a call's result is that of
    /// merging its micro-batches in order, one by one, whoever computed them.
    pub fn merge(&mut self, next: Self) {
        self.loss_sum += next.loss_sum;
        self.active += next.active;
        self.outputs.extend(next.outputs);
        for (name, sum) in next.sums {
            *self.sums.entry(name).or_default() += sum;
        }
        for (name, value) in next.maxima {
            let largest = self.maxima.entry(name).or_insert(value);
            *largest = largest.max(value);
        }
    }

    /// The result of the call whose micro-batches were merged.
    ///
    /// `loss` is the mean over active positions, or the plain sum under
    /// `skip_token_normalization`; 0 if nothing is active. Metrics: `loss`, `tokens` (active
    /// positions; `pairs` for `dpo`), each of `sums` as a mean, `maxima` as they are; for sampled data also
    /// `ess_fraction`, the effective sample size `(Σr)² / Σr²` over the number of tokens
    /// (Kong, 1992). Only finite figures are reported.
    pub fn finish(self, loss: &LossSpec) -> ForwardBackwardOutput {
        let count = self.active.max(1) as f64;
        let value = if loss.skip_token_normalization { self.loss_sum } else { self.loss_sum / count };
        let mut metrics = self.maxima;
        if let (Some(ratio), Some(square)) = (self.sums.get("ratio"), self.sums.get("ratio_squared")) {
            metrics.insert("ess_fraction".to_owned(), ratio * ratio / (square * count));
        }
        metrics.extend(self.sums.into_iter().map(|(name, sum)| (name, sum / count)));
        metrics.insert("loss".to_owned(), value);
        let counted = if loss.loss_fn == LossFn::Dpo { "pairs" } else { "tokens" };
        metrics.insert(counted.to_owned(), self.active as f64);
        if loss.skip_token_normalization {
            metrics.insert("skip_token_normalization".to_owned(), 1.0);
        }
        metrics.retain(|_, value| value.is_finite());
        ForwardBackwardOutput {
            loss: value,
            loss_fn_output_type: loss.loss_fn.name().to_owned(),
            loss_fn_outputs: self.outputs,
            metrics,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(loss_sum: f64, active: u64, ratio: f64, gap: f64) -> MicroBatchOutput {
        MicroBatchOutput {
            loss_sum,
            active,
            outputs: vec![DatumOutput::new(); 2],
            sums: BTreeMap::from([("ratio".into(), ratio), ("ratio_squared".into(), ratio * ratio)]),
            maxima: BTreeMap::from([("max_token_gap".into(), gap)]),
        }
    }

    #[test]
    fn merging_adds_sums_and_keeps_the_largest() {
        let mut whole = MicroBatchOutput::default();
        whole.merge(part(1.0, 2, 3.0, 0.5));
        whole.merge(part(2.0, 4, 1.0, 0.25));
        assert_eq!((whole.loss_sum, whole.active, whole.outputs.len()), (3.0, 6, 4));
        assert_eq!(whole.sums["ratio"], 4.0);
        assert_eq!(whole.maxima["max_token_gap"], 0.5);
    }

    #[test]
    fn the_loss_is_a_token_mean() {
        let output = part(3.0, 4, 2.0, 0.5).finish(&LossSpec::new(LossFn::ImportanceSampling));
        assert_eq!(output.loss, 0.75);
        assert_eq!(output.loss_fn_output_type, "importance_sampling");
        assert_eq!(output.metrics["loss"], 0.75);
        assert_eq!(output.metrics["tokens"], 4.0);
        assert_eq!(output.metrics["ratio"], 0.5);
        assert_eq!(output.metrics["ess_fraction"], 0.25);
        assert_eq!(output.metrics["max_token_gap"], 0.5);
        assert!(!output.metrics.contains_key("skip_token_normalization"));
    }

    #[test]
    fn without_token_normalization_the_loss_is_the_sum() {
        let mut loss = LossSpec::new(LossFn::CrossEntropy);
        loss.skip_token_normalization = true;
        let output = part(3.0, 4, 2.0, 0.5).finish(&loss);
        assert_eq!(output.loss, 3.0);
        assert_eq!(output.metrics["skip_token_normalization"], 1.0);
    }

    #[test]
    fn preferences_are_counted_in_pairs() {
        let output = part(3.0, 4, 2.0, 0.5).finish(&LossSpec::new(LossFn::Dpo));
        assert_eq!((output.loss, output.metrics["pairs"]), (0.75, 4.0));
        assert!(!output.metrics.contains_key("tokens"));
    }

    #[test]
    fn nothing_active_is_a_loss_of_zero() {
        let output = MicroBatchOutput::default().finish(&LossSpec::new(LossFn::CrossEntropy));
        assert_eq!(output.loss, 0.0);
    }

    #[test]
    fn figures_that_are_not_finite_are_left_out() {
        let output = part(0.0, 0, 0.0, f64::INFINITY).finish(&LossSpec::new(LossFn::ImportanceSampling));
        assert!(output.metrics.values().all(|value| value.is_finite()));
        assert!(!output.metrics.contains_key("ess_fraction"));
    }
}

//! A run's training state: weights, moments, accumulated gradient and counts, and the steps
//! from one state to the next. A step never changes a state: it makes the next one beside it,
//! sharing what stays, so that an outcome can be dropped until it is durable.

mod adam;
mod bytes;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::types::{Digest, ErrorKind, LossFn, LossSpec, OperationError};

use super::{Adapter, LoraLayout, ParamVector};

/// What accumulated gradients are divided by at `optim_step`; two kinds never meet in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientKind {
    /// Divided by the number of active tokens.
    TokenMean,
    /// Divided by the number of active pairs: of `dpo`, whose losses are those of pairs.
    PairMean,
    /// Taken as the sum (`skip_token_normalization`).
    Sum,
}

impl GradientKind {
    /// How the gradient of a call with this loss is counted.
    pub fn of(loss: &LossSpec) -> Self {
        match loss.loss_fn {
            _ if loss.skip_token_normalization => Self::Sum,
            LossFn::Dpo => Self::PairMean,
            _ => Self::TokenMean,
        }
    }

    /// For messages.
    fn counted(self) -> &'static str {
        match self {
            Self::TokenMean => "divided by tokens",
            Self::PairMean => "divided by pairs (`dpo`)",
            Self::Sum => "summed (`skip_token_normalization`)",
        }
    }
}

/// A run's state: everything that replay must bring back. All vectors have `layout.len()`
/// values.
///
/// Invariant: weights and moments are finite, and `kind` is present exactly if `gradient` is.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    pub layout: Arc<LoraLayout>,
    pub weights: ParamVector,
    /// First and second moments.
    pub m: ParamVector,
    pub v: ParamVector,
    /// Steps of the current moments, for the bias correction.
    pub moment_steps: u64,
    /// Sum of gradients since the last `optim_step`; absent: zero.
    pub gradient: Option<ParamVector>,
    /// Active tokens, or pairs, counted since the last `optim_step`.
    pub tokens: u64,
    pub kind: Option<GradientKind>,
    pub step: u64,
}

impl TrainState {
    /// A fresh adapter, step 0.
    pub fn fresh(layout: Arc<LoraLayout>) -> Self {
        Self::of_adapter(Adapter::init(layout))
    }

    /// The weights of an adapter, moments zero, step 0.
    pub fn of_adapter(adapter: Adapter) -> Self {
        let zeros = ParamVector::from(vec![0.0; adapter.layout.len()]);
        Self {
            layout: adapter.layout,
            weights: adapter.values,
            m: zeros.clone(),
            v: zeros,
            moment_steps: 0,
            gradient: None,
            tokens: 0,
            kind: None,
            step: 0,
        }
    }

    /// Refuses a gradient that must not join those accumulated so far.
    pub fn refuse_other_kind(&self, kind: GradientKind) -> Result<(), OperationError> {
        match self.kind {
            Some(accumulated) if accumulated != kind => Err(OperationError::new(
                ErrorKind::InvalidInput,
                format!(
                    "a gradient that is to be {} can't meet one that is to be {} in one optimiser step; call \
                     optim_step between them",
                    kind.counted(),
                    accumulated.counted()
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The state after adding one operation's gradient sum. Refuses mixing kinds. Tokens count
    /// only for the token mean.
    ///
    /// # Panics
    /// If `gradient` has not `layout.len()` values.
    pub fn accumulate(
        &self,
        gradient: &[f32],
        tokens: u64,
        kind: GradientKind,
    ) -> Result<Self, OperationError> {
        assert_eq!(gradient.len(), self.layout.len(), "a gradient has the layout of the weights");
        self.refuse_other_kind(kind)?;
        let sum: Vec<f32> = match &self.gradient {
            None => gradient.to_vec(),
            Some(before) => before.iter().zip(gradient).map(|(sum, more)| sum + more).collect(),
        };
        if !sum.iter().all(|value| value.is_finite()) {
            return Err(OperationError::new(
                ErrorKind::NotFinite,
                "the gradient of this batch is not finite, so none of it was added; what had accumulated \
                 before it is kept",
            ));
        }
        let counted = match kind {
            GradientKind::TokenMean | GradientKind::PairMean => tokens,
            GradientKind::Sum => 0,
        };
        Ok(Self {
            gradient: Some(sum.into()),
            tokens: self.tokens + counted,
            kind: Some(kind),
            ..self.clone()
        })
    }

    /// The same state with nothing accumulated: what remains when `optim_step` refused.
    pub fn without_gradient(&self) -> Self {
        Self { gradient: None, tokens: 0, kind: None, ..self.clone() }
    }

    /// The same weights with moments and gradient dropped and step 0.
    pub fn without_optimizer(&self) -> Self {
        Self::of_adapter(self.adapter())
    }

    /// The adapter of the present weights.
    pub fn adapter(&self) -> Adapter {
        Adapter { layout: self.layout.clone(), values: self.weights.clone() }
    }

    /// SHA-256 over all of it. Vectors that an operation did not change are not hashed again.
    pub fn digest(&self) -> Digest {
        bytes::digest(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::lora::layout::tests::tiny_model, types::LoraConfig};

    pub(super) fn fresh() -> TrainState {
        TrainState::fresh(Arc::new(LoraLayout::new(&tiny_model(), &LoraConfig::new(2, 3)).unwrap()))
    }

    pub(super) fn gradient(state: &TrainState, salt: usize) -> Vec<f32> {
        (0..state.layout.len()).map(|i| ((i * 31 + salt * 17) % 101) as f32 * 0.02 - 1.0).collect()
    }

    #[test]
    fn a_fresh_state_is_its_seeds_adapter_at_step_zero() {
        let state = fresh();
        assert_eq!(state.weights, Adapter::init(state.layout.clone()).values);
        assert_eq!((state.step, state.moment_steps, state.tokens), (0, 0, 0));
        assert!(state.m.iter().chain(state.v.iter()).all(|value| *value == 0.0));
    }

    #[test]
    fn accumulate_adds_gradients_and_tokens() {
        let state = fresh();
        let (first, second) = (gradient(&state, 1), gradient(&state, 2));
        let after = state.accumulate(&first, 3, GradientKind::TokenMean).unwrap();
        let after = after.accumulate(&second, 4, GradientKind::TokenMean).unwrap();
        let sum: Vec<f32> = first.iter().zip(&second).map(|(a, b)| a + b).collect();
        assert_eq!(after.gradient, Some(sum.into()));
        assert_eq!(after.tokens, 7);
        assert_eq!(after.weights, state.weights);
    }

    #[test]
    fn a_call_is_counted_as_its_loss_says() {
        let mut loss = LossSpec::new(LossFn::Dpo);
        assert_eq!(GradientKind::of(&loss), GradientKind::PairMean);
        loss.skip_token_normalization = true;
        assert_eq!(GradientKind::of(&loss), GradientKind::Sum);
        for loss_fn in LossFn::ALL.into_iter().filter(|loss_fn| *loss_fn != LossFn::Dpo) {
            assert_eq!(GradientKind::of(&LossSpec::new(loss_fn)), GradientKind::TokenMean);
        }
    }

    #[test]
    fn accumulate_does_not_count_the_tokens_of_sums() {
        let state = fresh();
        let after = state.accumulate(&gradient(&state, 1), 3, GradientKind::Sum).unwrap();
        assert_eq!(after.tokens, 0);
    }

    #[test]
    fn accumulate_refuses_to_mix_kinds() {
        let state = fresh();
        let values = gradient(&state, 1);
        use GradientKind::*;
        let pairs =
            [TokenMean, PairMean, Sum].map(|first| [TokenMean, PairMean, Sum].map(|second| (first, second)));
        for (first, second) in pairs.into_iter().flatten().filter(|(first, second)| first != second) {
            let after = state.accumulate(&values, 1, first).unwrap();
            let error = after.accumulate(&values, 1, second).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidInput);
            assert!(error.message.contains(first.counted()) && error.message.contains(second.counted()));
            after.accumulate(&values, 1, first).unwrap();
        }
    }

    #[test]
    fn accumulate_refuses_what_is_not_finite_and_what_would_become_so() {
        let state = fresh();
        let mut values = gradient(&state, 1);
        values[1] = f32::MAX;
        let before = state.accumulate(&values, 3, GradientKind::TokenMean).unwrap();
        let error = before.accumulate(&values, 3, GradientKind::TokenMean).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFinite, "the sum of two is over the range");
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[1] = value;
            assert_eq!(
                state.accumulate(&values, 3, GradientKind::TokenMean).unwrap_err().kind,
                ErrorKind::NotFinite
            );
        }
    }

    #[test]
    fn without_optimizer_keeps_the_weights_alone() {
        let state = fresh();
        let after = state.accumulate(&gradient(&state, 1), 3, GradientKind::TokenMean).unwrap();
        let (after, _) = after.optim_step(&Default::default()).unwrap();
        let bare = after.without_optimizer();
        assert_eq!(bare.weights, after.weights);
        assert_eq!(bare, TrainState::of_adapter(after.adapter()));
        assert_eq!(bare.step, 0);
    }
}

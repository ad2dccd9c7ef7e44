use std::collections::BTreeMap;

use crate::types::{AdamParams, ErrorKind, OperationError, OptimStepResponse};

use super::{GradientKind, TrainState};

impl TrainState {
    /// The state after one optimiser step, and its metrics: `step`, `learning_rate`, `lr`,
    /// `grad_norm` (before clipping), `tokens`.
    ///
    /// With `g` the accumulated gradient, divided by `max(tokens, 1)` unless it is a sum, and
    /// `t` the steps of the present moments including this one (Loshchilov & Hutter, 2019):
    ///
    /// ```text
    /// g ← g · min(1, grad_clip_norm / ‖g‖₂)
    /// m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
    /// θ ← θ − lr · ( (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + eps) + weight_decay · θ )
    /// ```
    ///
    /// The state is f32, the norm is summed in f64 in the vector's order. Without a gradient
    /// g = 0, and the step counts. Refused, besides parameters out of range: a gradient norm
    /// that is not finite, or a step that would leave a weight or moment that is not
    /// (`NotFinite`); the caller then keeps this state [without the gradient](Self::without_gradient).
    pub fn optim_step(&self, adam: &AdamParams) -> Result<(Self, OptimStepResponse), OperationError> {
        adam.validate().map_err(|error| error.within("adam_params"))?;
        let divisor = match self.kind {
            Some(GradientKind::TokenMean | GradientKind::PairMean) => self.tokens.max(1) as f64,
            Some(GradientKind::Sum) | None => 1.0,
        };
        let norm = self.gradient.as_deref().map_or(0.0, euclidean_norm) / divisor;
        if !norm.is_finite() {
            return Err(not_finite(format!("the gradient's norm is {norm}")));
        }
        let clip = if adam.grad_clip_norm > 0.0 && norm > adam.grad_clip_norm {
            adam.grad_clip_norm / norm
        } else {
            1.0
        };
        let next = self.step_with(adam, (clip / divisor) as f32)?;
        let metrics = BTreeMap::from([
            ("step".to_owned(), next.step as f64),
            ("learning_rate".to_owned(), adam.learning_rate),
            ("lr".to_owned(), adam.learning_rate),
            ("grad_norm".to_owned(), norm),
            ("tokens".to_owned(), self.tokens as f64),
        ]);
        Ok((next, OptimStepResponse { metrics }))
    }

    /// One step with the accumulated gradient times `scale`.
    fn step_with(&self, adam: &AdamParams, scale: f32) -> Result<Self, OperationError> {
        let moment_steps = self.moment_steps + 1;
        let constants = Constants::new(adam, moment_steps);
        let n = self.layout.len();
        let zeros;
        let gradient = match &self.gradient {
            Some(gradient) => &gradient[..n],
            None => {
                zeros = vec![0.0; n];
                &zeros[..]
            }
        };
        // Slices of one known length: no bounds checks, so the loop becomes vector code.
        let (before, m_before, v_before) = (&self.weights[..n], &self.m[..n], &self.v[..n]);
        let (mut weights, mut m, mut v) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        let mut finite = true;
        for i in 0..n {
            let next = constants.step(before[i], m_before[i], v_before[i], gradient[i] * scale);
            finite &= next[0].is_finite() & next[1].is_finite() & next[2].is_finite();
            [weights[i], m[i], v[i]] = next;
        }
        if !finite {
            return Err(not_finite("the step would leave the range of f32".to_owned()));
        }
        // With a learning rate of 0 the weights keep their very bits, −0 included.
        let weights = if adam.learning_rate == 0.0 { self.weights.clone() } else { weights.into() };
        Ok(Self {
            layout: self.layout.clone(),
            weights,
            m: m.into(),
            v: v.into(),
            moment_steps,
            gradient: None,
            tokens: 0,
            kind: None,
            step: self.step + 1,
        })
    }
}

/// What a step multiplies by, computed once in f64.
struct Constants {
    learning_rate: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// `1 / (1 − β₁ᵗ)`.
    correction1: f32,
    /// `1 / √(1 − β₂ᵗ)`.
    root_correction2: f32,
    eps: f32,
    weight_decay: f32,
}

impl Constants {
    fn new(adam: &AdamParams, t: u64) -> Self {
        // Past i32::MAX steps every β below 1 has long vanished.
        let t = i32::try_from(t).unwrap_or(i32::MAX);
        Self {
            learning_rate: adam.learning_rate as f32,
            beta1: adam.beta1 as f32,
            one_minus_beta1: (1.0 - adam.beta1) as f32,
            beta2: adam.beta2 as f32,
            one_minus_beta2: (1.0 - adam.beta2) as f32,
            correction1: (1.0 / (1.0 - adam.beta1.powi(t))) as f32,
            root_correction2: (1.0 / (1.0 - adam.beta2.powi(t)).sqrt()) as f32,
            eps: adam.eps as f32,
            weight_decay: adam.weight_decay as f32,
        }
    }

    /// The next `[weight, m, v]`.
    #[inline]
    fn step(&self, weight: f32, m: f32, v: f32, g: f32) -> [f32; 3] {
        let m = self.beta1 * m + self.one_minus_beta1 * g;
        let v = self.beta2 * v + self.one_minus_beta2 * g * g;
        let update = (m * self.correction1) / (v.sqrt() * self.root_correction2 + self.eps);
        [weight - self.learning_rate * (update + self.weight_decay * weight), m, v]
    }
}

/// ‖values‖₂, summed in order in f64.
fn euclidean_norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt()
}

fn not_finite(problem: String) -> OperationError {
    OperationError::new(
        ErrorKind::NotFinite,
        format!(
            "{problem}: no step was taken and the accumulated gradient is dropped; lower the learning rate or check the loss inputs"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{fresh, gradient},
        *,
    };
    use crate::{model::ParamVector, types::Digest};

    /// The formulas once more, in f64 throughout.
    fn reference(state: &TrainState, adam: &AdamParams, divisor: f64) -> [Vec<f64>; 3] {
        let mut g: Vec<f64> = match &state.gradient {
            Some(gradient) => gradient.iter().map(|g| f64::from(*g) / divisor).collect(),
            None => vec![0.0; state.layout.len()],
        };
        let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
        if adam.grad_clip_norm > 0.0 && norm > adam.grad_clip_norm {
            g.iter_mut().for_each(|g| *g *= adam.grad_clip_norm / norm);
        }
        let t = (state.moment_steps + 1) as f64;
        let mut next = [Vec::new(), Vec::new(), Vec::new()];
        for (i, g) in g.iter().enumerate() {
            let m = adam.beta1 * f64::from(state.m[i]) + (1.0 - adam.beta1) * g;
            let v = adam.beta2 * f64::from(state.v[i]) + (1.0 - adam.beta2) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - adam.beta1.powf(t)), v / (1.0 - adam.beta2.powf(t)));
            let theta = f64::from(state.weights[i]);
            let update = m_hat / (v_hat.sqrt() + adam.eps) + adam.weight_decay * theta;
            next[0].push(theta - adam.learning_rate * update);
            next[1].push(m);
            next[2].push(v);
        }
        next
    }

    /// `‖a − b‖ / ‖b‖` is within a few roundings of f32 (2⁻²⁴ = 6e-8 each).
    fn assert_close(what: &str, found: &[f32], expected: &[f64]) {
        let distance: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
        let size: f64 = expected.iter().map(|b| b * b).sum();
        assert!(distance.sqrt() <= 5e-7 * size.sqrt(), "{what}: {} of {}", distance.sqrt(), size.sqrt());
    }

    #[test]
    fn steps_follow_the_formulas() {
        let adam = AdamParams { learning_rate: 0.01, weight_decay: 0.1, ..AdamParams::default() };
        let mut state = fresh();
        for step in 1..=5 {
            state = state.accumulate(&gradient(&state, step), 7, GradientKind::TokenMean).unwrap();
            let [weights, m, v] = reference(&state, &adam, 7.0);
            state = state.optim_step(&adam).unwrap().0;
            assert_close("weights", &state.weights, &weights);
            assert_close("m", &state.m, &m);
            assert_close("v", &state.v, &v);
            assert_eq!((state.step, state.moment_steps), (step as u64, step as u64));
            assert_eq!((state.gradient.clone(), state.tokens, state.kind), (None, 0, None));
        }
    }

    #[test]
    fn sums_are_not_divided() {
        let adam = AdamParams { grad_clip_norm: 0.0, ..AdamParams::default() };
        let state = fresh();
        let state = state.accumulate(&gradient(&state, 1), 7, GradientKind::Sum).unwrap();
        let [weights, m, _] = reference(&state, &adam, 1.0);
        let (state, _) = state.optim_step(&adam).unwrap();
        assert_close("weights", &state.weights, &weights);
        assert_close("m", &state.m, &m);
    }

    #[test]
    fn a_mean_over_no_tokens_is_divided_by_one() {
        let state = fresh();
        let state = state.accumulate(&vec![0.0; state.layout.len()], 0, GradientKind::TokenMean).unwrap();
        let (next, response) = state.optim_step(&AdamParams::default()).unwrap();
        assert_eq!(response.metrics["grad_norm"], 0.0);
        assert_eq!(next.weights, state.weights);
    }

    #[test]
    fn the_norm_is_reported_before_clipping_and_the_clip_bounds_the_step() {
        let state = fresh();
        let mut values = vec![0.0; state.layout.len()];
        (values[0], values[1]) = (30.0, 40.0);
        let state = state.accumulate(&values, 10, GradientKind::TokenMean).unwrap();
        let adam = AdamParams { grad_clip_norm: 0.5, ..AdamParams::default() };
        let (next, response) = state.optim_step(&adam).unwrap();
        assert_eq!(response.metrics["grad_norm"], 5.0);
        assert_eq!(response.metrics["tokens"], 10.0);
        // m = (1 − β₁)·g with g of norm 0.5.
        let norm = euclidean_norm(&next.m);
        assert!((norm - 0.05).abs() < 1e-8, "{norm}");
    }

    #[test]
    fn metrics_name_step_rate_and_norm() {
        let (state, response) = fresh().optim_step(&AdamParams::default()).unwrap();
        assert_eq!(state.step, 1);
        let names: Vec<&str> = response.metrics.keys().map(String::as_str).collect();
        assert_eq!(names, ["grad_norm", "learning_rate", "lr", "step", "tokens"]);
        assert_eq!(response.metrics["step"], 1.0);
        assert_eq!(response.metrics["lr"], 1e-4);
    }

    #[test]
    fn without_a_gradient_the_moments_decay_and_the_step_counts() {
        let state = fresh();
        let state = state.accumulate(&gradient(&state, 1), 1, GradientKind::TokenMean).unwrap();
        let (state, _) = state.optim_step(&AdamParams::default()).unwrap();
        let [weights, m, v] = reference(&state, &AdamParams::default(), 1.0);
        let (next, _) = state.optim_step(&AdamParams::default()).unwrap();
        assert_close("weights", &next.weights, &weights);
        assert_close("m", &next.m, &m);
        assert_close("v", &next.v, &v);
        assert_eq!(next.step, 2);
        assert_ne!(next.weights, state.weights);
    }

    #[test]
    fn a_learning_rate_of_zero_counts_and_keeps_every_bit() {
        let mut state = fresh();
        let mut weights = state.weights.to_vec();
        weights[0] = -0.0;
        state.weights = weights.into();
        let state = state.accumulate(&gradient(&state, 1), 1, GradientKind::TokenMean).unwrap();
        let adam = AdamParams { learning_rate: 0.0, weight_decay: 0.5, ..AdamParams::default() };
        let (next, _) = state.optim_step(&adam).unwrap();
        assert_eq!(next.weights, state.weights);
        assert_eq!((next.step, next.moment_steps), (1, 1));
        assert_ne!(next.m, state.m);
    }

    #[test]
    fn refuses_a_gradient_that_is_not_finite() {
        let state = fresh();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = gradient(&state, 1);
            values[5] = bad;
            // `accumulate` adds no such gradient; a file may hold one.
            let (gradient, kind) = (Some(values.into()), Some(GradientKind::TokenMean));
            let poisoned = TrainState { gradient, tokens: 1, kind, ..state.clone() };
            let error = poisoned.optim_step(&AdamParams::default()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::NotFinite);
            assert_eq!(poisoned.without_gradient(), state);
        }
    }

    #[test]
    fn refuses_a_step_out_of_the_range_of_f32() {
        let state = fresh();
        let state = state.accumulate(&gradient(&state, 1), 1, GradientKind::TokenMean).unwrap();
        let adam = AdamParams { learning_rate: 3e38, weight_decay: 100.0, ..AdamParams::default() };
        assert_eq!(state.optim_step(&adam).unwrap_err().kind, ErrorKind::NotFinite);
    }

    #[test]
    fn refuses_parameters_out_of_range() {
        let adam = AdamParams { beta1: 1.0, ..AdamParams::default() };
        let error = fresh().optim_step(&adam).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidInput);
        assert_eq!(error.message, "`adam_params.beta1`: must be in [0, 1), got 1");
    }

    #[test]
    fn the_same_steps_give_the_same_bits() {
        let run = || -> (ParamVector, Digest) {
            let mut state = fresh();
            for step in 0..3 {
                state = state.accumulate(&gradient(&state, step), 5, GradientKind::TokenMean).unwrap();
                state = state.optim_step(&AdamParams::default()).unwrap().0;
            }
            (state.weights.clone(), state.digest())
        };
        assert_eq!(run(), run());
    }
}

use serde::{Deserialize, Serialize};

use super::InvalidInput;

/// Parameters of one Adam step with decoupled weight decay and bias correction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdamParams {
    /// Step size; at least 0. 0 leaves the weights as they are and still counts as a step.
    pub learning_rate: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment; above 0.
    pub eps: f64,
    /// Decoupled decay, multiplied by the learning rate; at least 0.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub grad_clip_norm: f64,
}

impl Default for AdamParams {
    /// The Loops client's defaults.
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-12,
            weight_decay: 0.0,
            grad_clip_norm: 1.0,
        }
    }
}

impl AdamParams {
    /// Refuses values outside the ranges that the fields state. The step is computed in f32,
    /// so values must also be finite there, and `eps` must not vanish.
    pub fn validate(&self) -> Result<(), InvalidInput> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(InvalidInput::new(name, format!("must be in [0, 1), got {beta}")));
            }
        }
        if !((f32::MIN_POSITIVE as f64)..=(f32::MAX as f64)).contains(&self.eps) {
            return Err(InvalidInput::new(
                "eps",
                format!(
                    "must be above 0, and at least {:e} to count in f32, got {}",
                    f32::MIN_POSITIVE,
                    self.eps
                ),
            ));
        }
        let at_least_zero = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("grad_clip_norm", self.grad_clip_norm),
        ];
        for (name, value) in at_least_zero {
            if !(0.0..=(f32::MAX as f64)).contains(&value) {
                return Err(InvalidInput::new(
                    name,
                    format!("must be a finite number of at least 0, got {value}"),
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut AdamParams)) -> String {
        let mut adam = AdamParams::default();
        change(&mut adam);
        adam.validate().unwrap_err().field
    }

    #[test]
    fn accepts_the_defaults_and_the_bounds() {
        AdamParams::default().validate().unwrap();
        let zeros = AdamParams {
            learning_rate: 0.0,
            beta1: 0.0,
            beta2: 0.0,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
            ..AdamParams::default()
        };
        zeros.validate().unwrap();
    }

    #[test]
    fn refuses_betas_outside_zero_to_one() {
        for beta in [1.0, -0.1, f64::NAN] {
            assert_eq!(refused(|adam| adam.beta1 = beta), "beta1");
            assert_eq!(refused(|adam| adam.beta2 = beta), "beta2");
        }
    }

    #[test]
    fn refuses_an_eps_that_is_or_becomes_zero() {
        for eps in [0.0, -1e-8, 1e-50, f64::NAN, f64::INFINITY] {
            assert_eq!(refused(|adam| adam.eps = eps), "eps", "{eps}");
        }
    }

    #[test]
    fn refuses_negative_and_non_finite_rates() {
        for value in [-1e-9, f64::NAN, f64::INFINITY, 1e39] {
            assert_eq!(refused(|adam| adam.learning_rate = value), "learning_rate");
            assert_eq!(refused(|adam| adam.weight_decay = value), "weight_decay");
            assert_eq!(refused(|adam| adam.grad_clip_norm = value), "grad_clip_norm");
        }
    }

    #[test]
    fn absent_fields_take_the_defaults() {
        let adam: AdamParams = serde_json::from_str(r#"{"learning_rate": 0.01}"#).unwrap();
        assert_eq!(adam, AdamParams { learning_rate: 0.01, ..AdamParams::default() });
    }
}

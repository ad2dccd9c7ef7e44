//! How fast each pair of a head turns: the rotary embedding's frequencies, plain or stretched
//! for contexts longer than those of pre-training.

use std::f64::consts::TAU;

use super::ModelConfig;

/// What changes the frequencies `theta^(-2i/d)` of the rotary embedding.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum RopeScaling {
    /// Nothing.
    #[default]
    None,
    /// Every frequency is divided by `factor`.
    Linear { factor: f32 },
    /// Llama 3.1's: long waves are divided by `factor`, short ones stay, those between are
    /// blended (`_compute_llama3_parameters` of transformers' modeling_rope_utils.py).
    Llama3 {
        factor: f32,
        /// Waves longer than `original_positions / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Waves shorter than `original_positions / high_freq_factor` are short.
        high_freq_factor: f32,
        original_positions: u32,
    },
    /// A divisor for each frequency, `[head_dim / 2]`: how GGUF holds Llama 3.1's.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// What frequency number `i`, before scaling `frequency` radians a position, is divided by.
    fn divisor(&self, i: usize, frequency: f64) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Linear { factor } => f64::from(*factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let [factor, low, high] = [factor, low_freq_factor, high_freq_factor].map(|f| f64::from(*f));
                let waves = f64::from(*original_positions) * frequency / TAU;
                if waves < low {
                    factor
                } else if waves > high {
                    1.0
                } else {
                    let smooth = (waves - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
            Self::Divisors(divisors) => f64::from(divisors[i]),
        }
    }

    /// The number that can't be, by the name of its field, and why.
    pub(super) fn problem(&self) -> Option<(&'static str, String)> {
        let not_positive = |field, value: f32| {
            let problem = format!("is {value}; it must be above 0");
            (!(value.is_finite() && value > 0.0)).then_some((field, problem))
        };
        match self {
            Self::None => None,
            Self::Linear { factor } => not_positive("factor", *factor),
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_positions } => {
                let numbers = [("factor", factor), ("low_freq_factor", low), ("high_freq_factor", high)];
                let number = numbers.iter().find_map(|(field, value)| not_positive(field, **value));
                number.or_else(|| match (high > low, original_positions) {
                    (false, _) => {
                        let problem = format!("is {high}; it must be above low_freq_factor, {low}");
                        Some(("high_freq_factor", problem))
                    }
                    (_, 0) => {
                        Some(("original_max_position_embeddings", "is 0; it must be above 0".to_owned()))
                    }
                    _ => None,
                })
            }
            Self::Divisors(divisors) => {
                divisors.iter().find_map(|value| not_positive("rope_freqs.weight", *value))
            }
        }
    }
}

impl ModelConfig {
    /// Radians by which each pair of a head turns from one position to the next,
    /// `[head_dim / 2]`: `theta^(-2i/d)`, scaled.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let frequency = |i: usize| {
            let exponent = (2 * i) as f64 / self.head_dim as f64;
            let plain = 1.0 / f64::from(self.rope_theta).powf(exponent);
            // Without scaling the bits stay those of the plain frequency: x / 1.0 = x.
            (plain / self.rope_scaling.divisor(i, plain)) as f32
        };
        (0..self.head_dim / 2).map(frequency).collect()
    }
}

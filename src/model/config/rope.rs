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
            let plain = self.plain_frequency(i);
            // Without scaling the bits stay those of the plain frequency: x / 1.0 = x.
            (plain / self.rope_scaling.divisor(i, plain)) as f32
        };
        (0..self.head_dim / 2).map(frequency).collect()
    }

    /// Of pair `i`, before any scaling.
    fn plain_frequency(&self, i: usize) -> f64 {
        let exponent = (2 * i) as f64 / self.head_dim as f64;
        1.0 / f64::from(self.rope_theta).powf(exponent)
    }

    /// The scaling, with divisors brought to the factors that make them where these are known: llama.cpp's
    /// converter computes the former from the latter, which the Llama 3 models have in common but one.
    pub(in crate::model) fn rope_scaling_by_factors(&self) -> RopeScaling {
        let RopeScaling::Divisors(divisors) = &self.rope_scaling else { return self.rope_scaling.clone() };
        let llama_3 = RopeScaling::Llama3 {
            // 8 for 3.1, 32 for 3.2; the longest waves are divided by nothing else.
            factor: divisors.iter().copied().fold(1.0, f32::max),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192,
        };
        let agrees = |(i, divisor): (usize, &f32)| {
            // The converter rounds to f32.
            (llama_3.divisor(i, self.plain_frequency(i)) / f64::from(*divisor) - 1.0).abs() < 1e-5
        };
        if divisors.iter().enumerate().all(agrees) { llama_3 } else { self.rope_scaling.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tiny;

    /// Llama 3.1's and 3.2's numbers, through the divisors that stand in a GGUF.
    #[test]
    fn divisors_are_brought_to_the_factors_of_llama_3() {
        for (factor, head_dim) in [(8.0, 128), (32.0, 64)] {
            let scaling = RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_positions: 8192,
            };
            let config = ModelConfig { head_dim, rope_theta: 500_000.0, ..tiny::config() };
            let plain = config.rope_frequencies();
            let divisors =
                plain.iter().enumerate().map(|(i, plain)| scaling.divisor(i, f64::from(*plain)) as f32);
            let mut divisors: Vec<f32> = divisors.collect();
            let of = |divisors: &[f32]| {
                let rope_scaling = RopeScaling::Divisors(divisors.to_vec());
                ModelConfig { rope_scaling, ..config.clone() }.rope_scaling_by_factors()
            };
            assert_eq!(of(&divisors), scaling);
            let last = divisors.len() - 1;
            divisors[last] *= 1.01;
            assert_eq!(of(&divisors), RopeScaling::Divisors(divisors.clone()), "some other model's");
        }
    }
}

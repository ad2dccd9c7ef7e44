use std::{fmt, path::Path, str::FromStr};

use crate::{
    bench::BenchError,
    model::{Family, ModelConfig, RopeScaling, tiny},
};

/// A model's shape, which decides its speed; the weights are random where no checkpoint is at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// For trying the benchmark out.
    Tiny,
    Qwen3_1_7b,
    Qwen3_8b,
}

impl Shape {
    const ALL: [Self; 3] = [Self::Tiny, Self::Qwen3_1_7b, Self::Qwen3_8b];

    /// As in the model's own config.json.
    pub(super) fn config(self) -> ModelConfig {
        let qwen3 = ModelConfig {
            family: Family::Qwen3,
            vocab_size: 151_936,
            num_kv_heads: 8,
            head_dim: 128,
            rope_theta: 1e6,
            rope_scaling: RopeScaling::None,
            rms_norm_eps: 1e-6,
            max_position_embeddings: 40_960,
            ..tiny::config()
        };
        match self {
            Self::Tiny => tiny::config(),
            Self::Qwen3_1_7b => ModelConfig {
                hidden_size: 2048,
                intermediate_size: 6144,
                num_layers: 28,
                num_heads: 16,
                ..qwen3
            },
            Self::Qwen3_8b => ModelConfig {
                hidden_size: 4096,
                intermediate_size: 12_288,
                num_layers: 36,
                num_heads: 32,
                tie_word_embeddings: false,
                ..qwen3
            },
        }
    }

    /// Writes a model of this shape, in bf16: 3.4 GB of Qwen3-1.7B, 16.4 of Qwen3-8B.
    pub(super) fn write(self, directory: &Path) -> Result<(), BenchError> {
        let what = format!("writing random weights into {}", directory.display());
        tiny::write_bf16(directory, &self.config(), 0).map_err(|source| BenchError::File { what, source })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tiny => "tiny",
            Self::Qwen3_1_7b => "qwen3-1.7b",
            Self::Qwen3_8b => "qwen3-8b",
        })
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|shape| shape.to_string() == text);
        found.ok_or_else(|| {
            format!("a shape is one of {}", Self::ALL.map(|shape| shape.to_string()).join(", "))
        })
    }
}

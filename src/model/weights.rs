use std::path::Path;

use crate::{kernels::Matrix, types::Digest};

use super::{ModelConfig, TextCodec};

/// Why a model can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{0}")]
    Placeholder(String),
}

/// A base model in memory: frozen, shared by every rank and replica of a process.
pub struct BaseModel {
    pub name: String,
    pub config: ModelConfig,
    pub weights: BaseWeights,
    pub text: TextCodec,
    /// SHA-256 over the files it was loaded from.
    pub digest: Digest,
}

/// Weights of a decoder, f32.
pub struct BaseWeights {
    /// `[vocab, hidden]`.
    pub embed: Matrix,
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocab, hidden]`; the same allocation as `embed` when tied.
    pub head: Matrix,
}

/// Weights of one decoder block.
pub struct LayerWeights {
    pub attn_norm: Vec<f32>,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub o: Matrix,
    pub mlp_norm: Vec<f32>,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

impl BaseModel {
    /// Loads a Hugging Face directory or a GGUF file.
    pub fn load(name: &str, path: &Path) -> Result<Self, ModelError> {
        let _ = (name, path);
        todo!()
    }
}

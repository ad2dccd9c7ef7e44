use std::sync::Arc;

use crate::{
    model::{ModelConfig, ParamVector},
    types::Digest,
};

use super::{AdapterError, LoraLayout};

/// An adapter's weights, immutable once made.
pub struct Adapter {
    pub layout: Arc<LoraLayout>,
    /// `layout.len()` values.
    pub values: ParamVector,
}

impl Adapter {
    /// The fresh adapter of a seed: A uniform in ±1/sqrt(in) from ChaCha8 keyed by (seed,
    /// tensor name), B zero.
    pub fn init(layout: Arc<LoraLayout>) -> Self {
        let _ = layout;
        todo!()
    }

    /// SHA-256 over the tensors, rank, alpha and targets: the digest of a `PolicyId`.
    pub fn digest(&self) -> Digest {
        todo!()
    }

    /// Canonical bytes: a safetensors file with PEFT's tensor names and the configuration in
    /// its metadata.
    pub fn to_bytes(&self) -> Vec<u8> {
        todo!()
    }

    /// Reads [`Adapter::to_bytes`], checking every shape against the model.
    pub fn from_bytes(model: &ModelConfig, bytes: &[u8]) -> Result<Self, AdapterError> {
        let _ = (model, bytes);
        todo!()
    }

    /// The two files of a PEFT adapter directory: (`adapter_model.safetensors`,
    /// `adapter_config.json`).
    pub fn to_peft(&self, base_model: &str) -> [(String, Vec<u8>); 2] {
        let _ = base_model;
        todo!()
    }
}

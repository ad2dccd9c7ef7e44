use std::{ops::Range, sync::Arc};

use crate::types::{Digest, InvalidInput, LoraConfig, LoraTarget};

use super::ModelConfig;

/// Where each LoRA matrix stands in one flat vector of f32.
///
/// Order: layer by layer, within a layer by [`LoraTarget`], A (`[rank, in]`) before B
/// (`[out, rank]`), row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayout {
    pub config: LoraConfig,
    pub entries: Vec<LoraEntry>,
    len: usize,
}

/// One adapted linear layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraEntry {
    pub layer: usize,
    pub target: LoraTarget,
    pub in_features: usize,
    pub out_features: usize,
    pub a: Range<usize>,
    pub b: Range<usize>,
}

/// An adapter's weights, immutable once made.
pub struct Adapter {
    pub layout: Arc<LoraLayout>,
    pub values: Vec<f32>,
}

/// Bytes that are no adapter for this model.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("{0}")]
    Placeholder(String),
}

impl LoraLayout {
    /// The layout of `config` on a model; refuses rank 0, ranks above the smallest dimension,
    /// empty targets.
    pub fn new(model: &ModelConfig, config: &LoraConfig) -> Result<Self, InvalidInput> {
        let _ = (model, config);
        todo!()
    }

    /// Number of f32 values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The entry of a layer's target, if it carries an adapter.
    pub fn entry(&self, layer: usize, target: LoraTarget) -> Option<&LoraEntry> {
        let _ = (layer, target);
        todo!()
    }

    /// `alpha / rank`.
    pub fn scale(&self) -> f32 {
        todo!()
    }
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

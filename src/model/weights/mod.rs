//! The frozen weights of a decoder, and how they come from a file into memory.
//!
//! [`Weight`] names each one; a [`TensorSource`] is a file format. [`check`] compares a
//! source's names and shapes with the configuration, [`FromSource`] reads the values, [`assemble`] makes a
//! decoder of them.

mod gguf;
mod load;
mod safetensors;

use std::{collections::HashSet, path::Path, sync::Arc};

use super::{ExpertsConfig, ModelConfig, ModelError, TextCodec, device::DeviceModel, files::ModelFiles};
use crate::{
    kernels::{BlockRows, CodeBits, Matrix, WeightDtype},
    types::{Digest, Hasher},
};

pub(super) use self::gguf::{Gguf, Header, ROPE_DIVISORS, Value};
pub(super) use self::load::{FromSource, Read, assemble, loaded_bytes, loaded_forms};
pub(crate) use self::safetensors::shards_of_index;
pub(super) use self::safetensors::{Shards, hugging_face_name};

/// A base model in memory: frozen, shared by every rank and replica of a process.
pub struct BaseModel {
    pub name: String,
    pub config: ModelConfig,
    pub place: Place,
    pub text: Arc<TextCodec>,
    /// SHA-256 over the files it was loaded from, and [what the weights are held as](base_digest).
    pub digest: Digest,
}

/// The identity of a base model whose files have the digest `files`: its own for each dtype, because
/// another dtype is other weights. That of f32 is the files' own.
pub fn base_digest(files: Digest, dtype: WeightDtype) -> Digest {
    if dtype == WeightDtype::F32 {
        return files;
    }
    let mut hasher = Hasher::default();
    hasher.update(b"lockstep base weights 1\0");
    hasher.update(dtype.name().as_bytes());
    hasher.update(b"\0");
    hasher.update(&files.0);
    hasher.finish()
}

/// Where a model's weights are; its passes are computed there.
pub enum Place {
    Cpu(BaseWeights),
    Gpu(Box<DeviceModel>),
}

/// Weights of a decoder: matrices in the dtype that they were loaded as, vectors in f32.
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
    /// Of families with [`has_qkv_bias`](super::Family::has_qkv_bias).
    pub qkv_bias: Option<QkvBias>,
    /// Of families with [`has_qk_norm`](super::Family::has_qk_norm).
    pub qk_norm: Option<QkNorm>,
    pub mlp_norm: Vec<f32>,
    pub mlp: Mlp,
}

/// What stands behind a block's second norm.
pub enum Mlp {
    Dense(MlpWeights),
    Experts(ExpertsWeights),
}

/// A mixture of experts, and how its rows choose theirs.
pub struct ExpertsWeights {
    /// `[experts, hidden]`.
    pub router: Matrix,
    pub experts: Vec<MlpWeights>,
    /// How many experts a row goes to.
    pub per_row: usize,
    /// Whether the weights of a row's experts are made to sum to one.
    pub normalises: bool,
}

/// `down (silu(gate x) ∘ up x)`
pub struct MlpWeights {
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

/// What queries, keys and values add to their products, one value an output.
pub struct QkvBias {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// Weights of the norms of queries and keys, `[head_dim]`, shared by all heads.
pub struct QkNorm {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
}

impl BaseModel {
    /// Loads a Hugging Face directory or a GGUF file, its weights as f32.
    ///
    /// Blocks for seconds: reads and hashes every byte. A [`Library`](super::Library) does it
    /// once for a process.
    pub fn load(name: &str, path: &Path) -> Result<Self, ModelError> {
        Self::load_as(WeightDtype::F32, name, path)
    }

    /// The same with the weights held as `dtype`, whatever the file has them as.
    pub fn load_as(dtype: WeightDtype, name: &str, path: &Path) -> Result<Self, ModelError> {
        let files = ModelFiles::open(path)?;
        let place = Place::Cpu(files.load_weights(dtype)?);
        let digest = base_digest(files.digest()?, dtype);
        Ok(Self { name: name.to_owned(), config: files.config, place, text: files.text, digest })
    }

    /// The weights of a model on the CPU.
    ///
    /// # Panics
    ///
    /// If it is on a GPU: whoever computes chooses by its [place](Place) first.
    pub fn weights(&self) -> &BaseWeights {
        match &self.place {
            Place::Cpu(weights) => weights,
            Place::Gpu(_) => panic!("{} is on a GPU, and the CPU's pass was asked of it", self.name),
        }
    }
}

/// One weight of a decoder, whatever a file format calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Weight {
    Embed,
    FinalNorm,
    Head,
    Layer(usize, LayerWeight),
}

/// One weight of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum LayerWeight {
    AttnNorm,
    Q,
    K,
    V,
    O,
    MlpNorm,
    Gate,
    Up,
    Down,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    Router,
    /// Of the expert with this number.
    ExpertGate(usize),
    ExpertUp(usize),
    ExpertDown(usize),
}

impl LayerWeight {
    /// Those of one decoder block.
    fn all(config: &ModelConfig, layer: usize) -> impl Iterator<Item = Self> {
        use LayerWeight::*;
        let bias: &[_] = if config.family.has_qkv_bias() { &[QBias, KBias, VBias] } else { &[] };
        let norm: &[_] = if config.family.has_qk_norm() { &[QNorm, KNorm] } else { &[] };
        let (mlp, experts): (&[_], _) = match config.layer_experts(layer) {
            None => (&[Gate, Up, Down], 0),
            Some(experts) => (&[Router], experts.count),
        };
        let experts = (0..experts).flat_map(|i| [ExpertGate(i), ExpertUp(i), ExpertDown(i)]);
        let attention = [AttnNorm, Q, K, V, O, MlpNorm].into_iter();
        attention.chain([mlp, bias, norm].into_iter().flatten().copied()).chain(experts)
    }
}

impl Weight {
    /// Its shape: `[out, in]` of a linear layer, `[width]` of a bias or norm.
    pub fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let hidden = config.hidden_size;
        let queries = config.num_heads * config.head_dim;
        let keys = config.num_kv_heads * config.head_dim;
        let experts = |size: fn(&ExpertsConfig) -> usize| config.experts.as_ref().map_or(0, size);
        match self {
            Self::Embed | Self::Head => vec![config.vocab_size, hidden],
            Self::FinalNorm => vec![hidden],
            Self::Layer(_, weight) => match weight {
                LayerWeight::AttnNorm | LayerWeight::MlpNorm => vec![hidden],
                LayerWeight::Q => vec![queries, hidden],
                LayerWeight::K | LayerWeight::V => vec![keys, hidden],
                LayerWeight::O => vec![hidden, queries],
                LayerWeight::Gate | LayerWeight::Up => vec![config.intermediate_size, hidden],
                LayerWeight::Down => vec![hidden, config.intermediate_size],
                LayerWeight::QBias => vec![queries],
                LayerWeight::KBias | LayerWeight::VBias => vec![keys],
                LayerWeight::QNorm | LayerWeight::KNorm => vec![config.head_dim],
                LayerWeight::Router => vec![experts(|experts| experts.count), hidden],
                LayerWeight::ExpertGate(_) | LayerWeight::ExpertUp(_) => {
                    vec![experts(|experts| experts.intermediate_size), hidden]
                }
                LayerWeight::ExpertDown(_) => vec![hidden, experts(|experts| experts.intermediate_size)],
            },
        }
    }

    /// Every weight that `config` calls for.
    pub fn all(config: &ModelConfig) -> impl Iterator<Item = Self> {
        let of_layer = |layer| move |weight| Self::Layer(layer, weight);
        let layers = (0..config.num_layers)
            .flat_map(move |layer| LayerWeight::all(config, layer).map(of_layer(layer)));
        let head = (!config.tie_word_embeddings).then_some(Self::Head);
        [Self::Embed, Self::FinalNorm].into_iter().chain(head).chain(layers)
    }
}

/// The smallest form in which a matrix in a file can be held without loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    F32,
    Bf16,
    Blocks(CodeBits),
}

/// A file format that holds weights: safetensors or GGUF.
pub(super) trait TensorSource {
    /// What the format calls a weight.
    fn name(&self, weight: Weight) -> String;

    /// Names of all tensors in the file.
    fn names(&self) -> impl Iterator<Item = &str>;

    /// The shape of the tensor that holds a weight, which may hold others beside it.
    fn stored_shape(&self, weight: Weight, config: &ModelConfig) -> Vec<usize> {
        weight.shape(config)
    }

    /// The tensor's shape, outermost dimension first, if the file holds it in a number format
    /// that can be read.
    fn shape(&self, name: &str) -> Result<Vec<usize>, ModelError>;

    /// The weight's values in f32, row-major, in the order of the Hugging Face layout.
    fn values(&self, weight: Weight, config: &ModelConfig) -> Result<Vec<f32>, ModelError>;

    /// How a weight can be held without loss.
    fn stored(&self, weight: Weight) -> Stored;

    /// The weight's blocks, if it is [made of them](Stored::Blocks).
    fn blocks(&self, _: Weight, _: &ModelConfig) -> Result<Option<BlockRows>, ModelError> {
        Ok(None)
    }

    /// The file that holds the tensor, for messages.
    fn path_of(&self, name: &str) -> &Path;

    /// Tensors that decoders of this family carry and nobody reads.
    fn is_ignored(&self, name: &str) -> bool;
}

/// Refuses a source whose tensors aren't exactly those that `config` calls for.
pub(super) fn check(config: &ModelConfig, source: &impl TensorSource) -> Result<(), ModelError> {
    let mut expected = HashSet::new();
    for weight in Weight::all(config) {
        let tensor = source.name(weight);
        let (shape, found) = (source.stored_shape(weight, config), source.shape(&tensor)?);
        if shape != found {
            let path = source.path_of(&tensor).to_owned();
            return Err(ModelError::TensorShape { path, tensor, expected: shape, found });
        }
        expected.insert(tensor);
    }
    // A tied head may be stored all the same; whether it equals the embedding shows when it is read.
    let head = source.name(Weight::Head);
    let extra =
        source.names().find(|&name| !expected.contains(name) && name != head && !source.is_ignored(name));
    match extra {
        Some(tensor) => {
            let path = source.path_of(tensor).to_owned();
            Err(ModelError::UnexpectedTensor { path, tensor: tensor.to_owned() })
        }
        None => Ok(()),
    }
}

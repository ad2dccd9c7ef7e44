//! Weights in GGUF, llama.cpp's format: quantised ones as they are, or dequantised as they are loaded.

mod blocks;
mod header;

use std::path::{Path, PathBuf};

use candle_core::{
    Device,
    quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
};
use memmap2::Mmap;

use super::{LayerWeight, Stored, TensorSource, Weight};
use crate::{
    kernels::BlockRows,
    model::{Family, ModelConfig, ModelError, files::map_file},
};

pub(in crate::model) use header::{Header, Value};

/// Tensor of the rotary frequencies' divisors, by which llama.cpp's converter writes Llama 3.1's
/// scaling (`LlamaModel.generate_extra_tensors`).
pub(in crate::model) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// A mapped GGUF file.
pub(in crate::model) struct Gguf {
    path: PathBuf,
    map: Mmap,
    pub header: Header,
}

impl Gguf {
    /// Maps the file and reads its header.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let map = map_file(path)?;
        let header = Header::parse(path, &map)?;
        Ok(Self { path: path.to_owned(), map, header })
    }

    /// [`ROPE_DIVISORS`], if the file holds them: part of the configuration, not a weight.
    pub fn rope_divisors(&self) -> Result<Option<Vec<f32>>, ModelError> {
        self.header
            .tensors
            .contains_key(ROPE_DIVISORS)
            .then(|| self.dequantise(ROPE_DIVISORS, None))
            .transpose()
    }

    /// The format, bytes and shape of a tensor, or of one expert's equal part of it.
    fn part(&self, name: &str, part: Option<usize>) -> Result<(GgmlDType, &[u8], Vec<usize>), ModelError> {
        let tensor = self.header.tensors.get(name).ok_or_else(|| self.missing(name))?;
        // The header has checked that the bytes lie in the file, have the length of the shape and
        // are aligned, as the map is. Rows are made of whole blocks, so parts are, too.
        let bytes = &self.map[tensor.bytes.clone()];
        let (bytes, shape) = match (part, tensor.shape.split_first()) {
            (Some(part), Some((parts, shape))) => {
                let len = bytes.len() / parts;
                (&bytes[part * len..][..len], shape.to_vec())
            }
            _ => (bytes, tensor.shape.clone()),
        };
        Ok((tensor.format, bytes, shape))
    }

    /// The values of a tensor, or of one expert's equal part of it.
    fn dequantise(&self, name: &str, part: Option<usize>) -> Result<Vec<f32>, ModelError> {
        let (format, bytes, shape) = self.part(name, part)?;
        let values = || -> candle_core::Result<Vec<f32>> {
            qtensor_from_ggml(format, bytes, shape, &Device::Cpu)?
                .dequantize(&Device::Cpu)?
                .flatten_all()?
                .to_vec1()
        };
        values().map_err(|error| ModelError::malformed(&self.path, format!("tensor `{name}`: {error}")))
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() }
    }
}

impl TensorSource for Gguf {
    fn name(&self, weight: Weight) -> String {
        match weight {
            Weight::Embed => "token_embd.weight".to_owned(),
            Weight::FinalNorm => "output_norm.weight".to_owned(),
            Weight::Head => "output.weight".to_owned(),
            Weight::Layer(layer, weight) => {
                let part = match weight {
                    LayerWeight::AttnNorm => "attn_norm.weight",
                    LayerWeight::Q => "attn_q.weight",
                    LayerWeight::K => "attn_k.weight",
                    LayerWeight::V => "attn_v.weight",
                    LayerWeight::O => "attn_output.weight",
                    LayerWeight::MlpNorm => "ffn_norm.weight",
                    LayerWeight::Gate => "ffn_gate.weight",
                    LayerWeight::Up => "ffn_up.weight",
                    LayerWeight::Down => "ffn_down.weight",
                    LayerWeight::QBias => "attn_q.bias",
                    LayerWeight::KBias => "attn_k.bias",
                    LayerWeight::VBias => "attn_v.bias",
                    LayerWeight::QNorm => "attn_q_norm.weight",
                    LayerWeight::KNorm => "attn_k_norm.weight",
                    LayerWeight::Router => "ffn_gate_inp.weight",
                    LayerWeight::ExpertGate(_) => "ffn_gate_exps.weight",
                    LayerWeight::ExpertUp(_) => "ffn_up_exps.weight",
                    LayerWeight::ExpertDown(_) => "ffn_down_exps.weight",
                };
                format!("blk.{layer}.{part}")
            }
        }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// The experts of a layer lie in one tensor, one behind the other.
    fn stored_shape(&self, weight: Weight, config: &ModelConfig) -> Vec<usize> {
        let mut shape = weight.shape(config);
        if let (Some(_), Some(experts)) = (expert_of(weight), &config.experts) {
            shape.insert(0, experts.count);
        }
        shape
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>, ModelError> {
        let tensor = self.header.tensors.get(name).ok_or_else(|| self.missing(name))?;
        Ok(tensor.shape.clone())
    }

    fn values(&self, weight: Weight, config: &ModelConfig) -> Result<Vec<f32>, ModelError> {
        let values = self.dequantise(&self.name(weight), expert_of(weight))?;
        Ok(match weight {
            _ if is_permuted(weight, config) => unpermute(&values, config.head_dim, config.hidden_size),
            _ => values,
        })
    }

    fn stored(&self, weight: Weight) -> Stored {
        match self.header.tensors.get(&self.name(weight)).map(|tensor| tensor.format) {
            Some(GgmlDType::BF16) => Stored::Bf16,
            Some(format) => blocks::code_bits(format).map_or(Stored::F32, Stored::Blocks),
            None => Stored::F32,
        }
    }

    fn blocks(&self, weight: Weight, config: &ModelConfig) -> Result<Option<BlockRows>, ModelError> {
        let (format, bytes, _) = self.part(&self.name(weight), expert_of(weight))?;
        Ok(blocks::read(format, bytes).map(|rows| match is_permuted(weight, config) {
            false => rows,
            true => {
                let (width, runs) = (config.hidden_size, config.hidden_size / rows.bits.run());
                BlockRows {
                    bits: rows.bits,
                    codes: unpermute(&rows.codes, config.head_dim, width),
                    scales: unpermute(&rows.scales, config.head_dim, runs),
                    offsets: unpermute(&rows.offsets, config.head_dim, runs),
                }
            }
        }))
    }

    fn path_of(&self, _: &str) -> &Path {
        &self.path
    }

    fn is_ignored(&self, name: &str) -> bool {
        name == ROPE_DIVISORS
    }
}

/// The number of the expert that a weight belongs to, if it does.
fn expert_of(weight: Weight) -> Option<usize> {
    use LayerWeight::*;
    match weight {
        Weight::Layer(_, ExpertGate(expert) | ExpertUp(expert) | ExpertDown(expert)) => Some(expert),
        _ => None,
    }
}

/// Whether llama.cpp's converter turns the rows of this weight.
fn is_permuted(weight: Weight, config: &ModelConfig) -> bool {
    matches!(weight, Weight::Layer(_, LayerWeight::Q | LayerWeight::K)) && config.family == Family::Llama
}

/// Undoes what llama.cpp's converter does to the rows of q and k of Llama, and of no other family.
///
/// Its rotary embedding turns neighbours, rows 2i and 2i + 1 of a head; ours, as transformers',
/// turns row i with row i + head_dim / 2. (`LlamaModel.permute` in convert_hf_to_gguf.py.)
fn unpermute<T: Copy>(rows: &[T], head_dim: usize, row_len: usize) -> Vec<T> {
    let mut ours = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * row_len) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                ours.extend_from_slice(&head[(2 * pair + half) * row_len..][..row_len]);
            }
        }
    }
    ours
}

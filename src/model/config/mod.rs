//! What a decoder is made of, read from either form a model comes in.
//!
//! Nothing here approximates: a field that changes the mathematics and that the decoder
//! doesn't compute is refused by its name ([`ModelError::Unsupported`]).

mod experts;
mod family;
mod rope;

mod gguf;
mod hugging_face;

use std::{borrow::Cow, path::Path};

use super::ModelError;

pub use experts::ExpertsConfig;
pub use family::Family;
pub use rope::RopeScaling;

/// Most elements one weight may have, and most a whole model (2^40, a trillion): products of
/// two dimensions then stay far inside u64 whatever a hostile file says.
const MAX_PARAMETERS: u64 = 1 << 40;

/// Largest width of anything: hidden, heads, vocabulary.
const MAX_DIMENSION: usize = 1 << 24;

/// Largest number of decoder blocks.
const MAX_LAYERS: usize = 4096;

/// Shape and constants of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Width of a layer's MLP, where it has one.
    pub intermediate_size: usize,
    /// Of families with [`has_experts`](Family::has_experts).
    pub experts: Option<ExpertsConfig>,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f32,
    pub rope_scaling: RopeScaling,
    pub rms_norm_eps: f32,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Refuses sizes that no decoder can have; `path` and `names` say where they were read.
    pub(super) fn check(&self, path: &Path, names: &FieldNames) -> Result<(), ModelError> {
        let invalid = |field: &str, problem: String| Err(ModelError::invalid_field(path, field, problem));
        let sizes = [
            (&names.vocab_size, self.vocab_size, MAX_DIMENSION),
            (&names.hidden_size, self.hidden_size, MAX_DIMENSION),
            (&names.intermediate_size, self.intermediate_size, MAX_DIMENSION),
            (&names.num_layers, self.num_layers, MAX_LAYERS),
            (&names.num_heads, self.num_heads, MAX_DIMENSION),
            (&names.num_kv_heads, self.num_kv_heads, MAX_DIMENSION),
            (&names.head_dim, self.head_dim, MAX_DIMENSION),
            (&names.max_position_embeddings, self.max_position_embeddings, u32::MAX as usize),
        ];
        for (field, size, limit) in sizes {
            if size == 0 || size > limit {
                return invalid(field, format!("is {size}; it must lie between 1 and {limit}"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (heads, kv_heads) = (self.num_heads, self.num_kv_heads);
            return invalid(
                &names.num_kv_heads,
                format!("is {kv_heads}, which doesn't divide {heads} heads"),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            let problem = format!("is {}; rotary embedding needs an even number", self.head_dim);
            return invalid(&names.head_dim, problem);
        }
        let parameters = self.parameters();
        if parameters.is_none_or(|parameters| parameters > MAX_PARAMETERS) {
            return invalid(
                &names.hidden_size,
                format!("makes a model of more than {MAX_PARAMETERS} weights"),
            );
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return invalid(&names.rope_theta, format!("is {}; it must be above 0", self.rope_theta));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            let problem = format!("is {}; it must lie between 0 and 1", self.rms_norm_eps);
            return invalid(&names.rms_norm_eps, problem);
        }
        if let Some(token) = self.eos_token_ids.iter().find(|&&token| token as usize >= self.vocab_size) {
            let problem = format!("is {token}, outside the vocabulary of {}", self.vocab_size);
            return invalid(&names.eos_token_id, problem);
        }
        Ok(())
    }

    /// Most weights that there may be, norms and biases aside; `None` if they exceed u64.
    fn parameters(&self) -> Option<u64> {
        let product = |a: usize, b: usize| (a as u64).checked_mul(b as u64);
        let queries = product(self.num_heads, self.head_dim)?;
        let keys = product(self.num_kv_heads, self.head_dim)?;
        let attention = queries.checked_add(keys)?.checked_mul(2)?;
        let dense = (self.intermediate_size as u64).checked_mul(3)?;
        let mlp = match &self.experts {
            None => dense,
            Some(experts) => {
                let router_and_expert = (experts.intermediate_size as u64).checked_mul(3)?.checked_add(1)?;
                router_and_expert.checked_mul(experts.count as u64)?.max(dense)
            }
        };
        let width = attention.checked_add(mlp)?;
        let layers = width.checked_mul(self.hidden_size as u64)?.checked_mul(self.num_layers as u64)?;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        product(self.vocab_size, self.hidden_size)?.checked_mul(tables)?.checked_add(layers)
    }
}

/// What a file format calls the fields, for error messages.
pub(super) struct FieldNames {
    pub vocab_size: Cow<'static, str>,
    pub hidden_size: Cow<'static, str>,
    pub intermediate_size: Cow<'static, str>,
    pub num_layers: Cow<'static, str>,
    pub num_heads: Cow<'static, str>,
    pub num_kv_heads: Cow<'static, str>,
    pub head_dim: Cow<'static, str>,
    pub max_position_embeddings: Cow<'static, str>,
    pub rope_theta: Cow<'static, str>,
    pub rms_norm_eps: Cow<'static, str>,
    pub eos_token_id: Cow<'static, str>,
}

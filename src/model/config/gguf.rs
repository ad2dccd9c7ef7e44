//! The configuration of a GGUF file, from its `llama.*` metadata.

use std::{collections::BTreeMap, path::Path};

use super::{FieldNames, ModelConfig};
use crate::model::{
    ModelError,
    weights::{Header, Value},
};

const NAMES: FieldNames = FieldNames {
    vocab_size: "llama.vocab_size",
    hidden_size: "llama.embedding_length",
    intermediate_size: "llama.feed_forward_length",
    num_layers: "llama.block_count",
    num_heads: "llama.attention.head_count",
    num_kv_heads: "llama.attention.head_count_kv",
    head_dim: "llama.attention.key_length",
    max_position_embeddings: "llama.context_length",
    rope_theta: "llama.rope.freq_base",
    rms_norm_eps: "llama.attention.layer_norm_rms_epsilon",
    eos_token_id: "tokenizer.ggml.eos_token_id",
};

const VALUE_LENGTH: &str = "llama.attention.value_length";
const ROPE_DIMENSIONS: &str = "llama.rope.dimension_count";
const ROPE_SCALING: &str = "llama.rope.scaling.type";
const TOKENS: &str = "tokenizer.ggml.tokens";

/// Keys of tokens that end a sequence: end of text, and end of a turn.
const END_TOKENS: [&str; 2] = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];

impl ModelConfig {
    /// From a GGUF's header. A `llama.*` key that isn't known here is refused: who knows what it
    /// changes.
    pub(in crate::model) fn from_gguf(path: &Path, header: &Header) -> Result<Self, ModelError> {
        let fields = Fields { path, metadata: &header.metadata };
        fields.check_keys()?;
        let hidden_size = fields.size(NAMES.hidden_size)?;
        let num_heads = fields.size(NAMES.num_heads)?;
        let head_dim = match fields.optional_size(NAMES.head_dim)? {
            Some(head_dim) => head_dim,
            None if num_heads != 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let problem = format!("is {num_heads}, which doesn't divide {hidden_size}");
                return Err(ModelError::invalid_field(path, NAMES.num_heads, problem));
            }
        };
        for key in [VALUE_LENGTH, ROPE_DIMENSIONS] {
            let other = fields.optional_size(key)?.filter(|&size| size != head_dim);
            if let Some(size) = other {
                let problem = format!("is {size}; Lockstep computes the head's own size {head_dim} only");
                return Err(ModelError::unsupported(path, key, problem));
            }
        }
        let tokens = match fields.metadata.get(TOKENS) {
            Some(Value::Texts(tokens)) => Some(tokens.len()),
            _ => None,
        };
        let vocab_size = match (fields.optional_size(NAMES.vocab_size)?, tokens) {
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => return Err(ModelError::invalid_field(path, NAMES.vocab_size, "is missing")),
        };
        let mut eos_token_ids = Vec::new();
        for key in END_TOKENS {
            eos_token_ids.extend(fields.token(key)?);
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let config = Self {
            vocab_size,
            hidden_size,
            intermediate_size: fields.size(NAMES.intermediate_size)?,
            num_layers: fields.size(NAMES.num_layers)?,
            num_heads,
            num_kv_heads: fields.optional_size(NAMES.num_kv_heads)?.unwrap_or(num_heads),
            head_dim,
            rope_theta: fields.optional_number(NAMES.rope_theta)?.unwrap_or(10_000.0) as f32,
            rms_norm_eps: fields.number(NAMES.rms_norm_eps)? as f32,
            max_position_embeddings: fields.size(NAMES.max_position_embeddings)?,
            tie_word_embeddings: !header.tensors.contains_key("output.weight"),
            eos_token_ids,
        };
        config.check(path, &NAMES)?;
        Ok(config)
    }
}

/// The metadata and where it was read.
struct Fields<'a> {
    path: &'a Path,
    metadata: &'a BTreeMap<String, Value>,
}

impl Fields<'_> {
    fn check_keys(&self) -> Result<(), ModelError> {
        match self.metadata.get("general.architecture") {
            Some(Value::Text(architecture)) if architecture == "llama" => {}
            Some(other) => {
                let problem = format!("is {other}; Lockstep computes \"llama\" only");
                return Err(ModelError::unsupported(self.path, "general.architecture", problem));
            }
            None => return Err(ModelError::invalid_field(self.path, "general.architecture", "is missing")),
        }
        let known = [
            NAMES.vocab_size,
            NAMES.hidden_size,
            NAMES.intermediate_size,
            NAMES.num_layers,
            NAMES.num_heads,
            NAMES.num_kv_heads,
            NAMES.head_dim,
            NAMES.max_position_embeddings,
            NAMES.rope_theta,
            NAMES.rms_norm_eps,
            VALUE_LENGTH,
            ROPE_DIMENSIONS,
        ];
        for (key, value) in
            self.metadata.range("llama.".to_owned()..).take_while(|(key, _)| key.starts_with("llama."))
        {
            let unscaled = key == ROPE_SCALING && *value == Value::Text("none".to_owned());
            if !known.contains(&key.as_str()) && !unscaled {
                let problem = format!("is {value}, which Lockstep doesn't compute");
                return Err(ModelError::unsupported(self.path, key, problem));
            }
        }
        Ok(())
    }

    fn token(&self, key: &str) -> Result<Option<u32>, ModelError> {
        self.typed(key, "a token id", |value| value.integer().and_then(|id| id.try_into().ok()))
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?.ok_or_else(|| ModelError::invalid_field(self.path, key, "is missing"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.typed(key, "one whole number", |value| value.integer().and_then(|size| size.try_into().ok()))
    }

    fn number(&self, key: &str) -> Result<f64, ModelError> {
        self.optional_number(key)?.ok_or_else(|| ModelError::invalid_field(self.path, key, "is missing"))
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.typed(key, "a number", |value| match value {
            Value::Float(number) => Some(*number),
            Value::Integer(number) => Some(*number as f64),
            _ => None,
        })
    }

    fn typed<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let wrong = || ModelError::invalid_field(self.path, key, format!("is {value}, not {kind}"));
        read(value).map(Some).ok_or_else(wrong)
    }
}

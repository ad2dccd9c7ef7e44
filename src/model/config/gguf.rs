//! The configuration of a GGUF file, from the metadata under its architecture's name
//! (`llama.*`, `qwen2.*`, …), as llama.cpp's llama-model.cpp reads it.

use std::{collections::BTreeMap, path::Path};

use super::{ExpertsConfig, Family, FieldNames, ModelConfig, RopeScaling};
use crate::model::{
    ModelError,
    weights::{Header, ROPE_DIVISORS, Value},
};

const ARCHITECTURE: &str = "general.architecture";
const VALUE_LENGTH: &str = "attention.value_length";
const ROPE_DIMENSIONS: &str = "rope.dimension_count";
const ROPE_SCALING_TYPE: &str = "rope.scaling.type";

/// Both names that the factor has had.
const ROPE_SCALING_FACTORS: [&str; 2] = ["rope.scaling.factor", "rope.scale_linear"];

/// Keys that are read beside those of [`FieldNames`].
const OTHER_KEYS: [&str; 5] =
    [VALUE_LENGTH, ROPE_DIMENSIONS, ROPE_SCALING_TYPE, ROPE_SCALING_FACTORS[0], ROPE_SCALING_FACTORS[1]];

/// Of families with experts: how many, how many a row goes to, and how wide each is.
const EXPERTS: [&str; 3] = ["expert_count", "expert_used_count", "expert_feed_forward_length"];

const TOKENS: &str = "tokenizer.ggml.tokens";

/// Keys of tokens that end a sequence: end of text, and end of a turn.
const END_TOKENS: [&str; 2] = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];

impl ModelConfig {
    /// From a GGUF's header, and the divisors of the rotary frequencies if the file holds some.
    ///
    /// A key under the architecture's name that isn't known here is refused: who knows what it
    /// changes.
    pub(in crate::model) fn from_gguf(
        path: &Path,
        header: &Header,
        divisors: Option<Vec<f32>>,
    ) -> Result<Self, ModelError> {
        let fields = Fields::of(path, &header.metadata)?;
        let names = fields.names();
        fields.check_keys(&names)?;
        let hidden_size = fields.size(&names.hidden_size)?;
        let num_heads = fields.size(&names.num_heads)?;
        let head_dim = match fields.optional_size(&names.head_dim)? {
            Some(head_dim) => head_dim,
            None if num_heads != 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let problem = format!("is {num_heads}, which doesn't divide {hidden_size}");
                return Err(ModelError::invalid_field(path, names.num_heads, problem));
            }
        };
        for key in [VALUE_LENGTH, ROPE_DIMENSIONS].map(|key| fields.key(key)) {
            let other = fields.optional_size(&key)?.filter(|&size| size != head_dim);
            if let Some(size) = other {
                let problem = format!("is {size}; Lockstep computes the head's own size {head_dim} only");
                return Err(ModelError::unsupported(path, key, problem));
            }
        }
        let tokens = match fields.metadata.get(TOKENS) {
            Some(Value::Texts(tokens)) => Some(tokens.len()),
            _ => None,
        };
        let vocab_size = match (fields.optional_size(&names.vocab_size)?, tokens) {
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => return Err(ModelError::invalid_field(path, names.vocab_size, "is missing")),
        };
        let mut eos_token_ids = Vec::new();
        for key in END_TOKENS {
            eos_token_ids.extend(fields.token(key)?);
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let config = Self {
            family: fields.family,
            vocab_size,
            hidden_size,
            intermediate_size: fields.size(&names.intermediate_size)?,
            experts: fields.family.has_experts().then(|| fields.experts()).transpose()?,
            num_layers: fields.size(&names.num_layers)?,
            num_heads,
            num_kv_heads: fields.optional_size(&names.num_kv_heads)?.unwrap_or(num_heads),
            head_dim,
            rope_theta: fields.optional_number(&names.rope_theta)?.unwrap_or(10_000.0) as f32,
            rope_scaling: fields.rope_scaling(divisors, head_dim)?,
            rms_norm_eps: fields.number(&names.rms_norm_eps)? as f32,
            max_position_embeddings: fields.size(&names.max_position_embeddings)?,
            tie_word_embeddings: !header.tensors.contains_key("output.weight"),
            eos_token_ids,
        };
        config.check(path, &names)?;
        Ok(config)
    }
}

/// The metadata and where it was read.
struct Fields<'a> {
    path: &'a Path,
    family: Family,
    metadata: &'a BTreeMap<String, Value>,
}

impl<'a> Fields<'a> {
    fn of(path: &'a Path, metadata: &'a BTreeMap<String, Value>) -> Result<Self, ModelError> {
        let Some(architecture) = metadata.get(ARCHITECTURE) else {
            return Err(ModelError::invalid_field(path, ARCHITECTURE, "is missing"));
        };
        let family = match architecture {
            Value::Text(name) => Family::of(name, Family::gguf_architecture),
            _ => None,
        };
        let family = family.ok_or_else(|| {
            let known = Family::names(Family::gguf_architecture);
            let problem = format!("is {architecture}; Lockstep computes {known} only");
            ModelError::unsupported(path, ARCHITECTURE, problem)
        })?;
        Ok(Self { path, family, metadata })
    }

    /// The full name of an architecture's key.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.family.gguf_architecture())
    }

    fn names(&self) -> FieldNames {
        let key = |name| self.key(name).into();
        FieldNames {
            vocab_size: key("vocab_size"),
            hidden_size: key("embedding_length"),
            intermediate_size: key("feed_forward_length"),
            num_layers: key("block_count"),
            num_heads: key("attention.head_count"),
            num_kv_heads: key("attention.head_count_kv"),
            head_dim: key("attention.key_length"),
            max_position_embeddings: key("context_length"),
            rope_theta: key("rope.freq_base"),
            rms_norm_eps: key("attention.layer_norm_rms_epsilon"),
            eos_token_id: END_TOKENS[0].into(),
        }
    }

    fn check_keys(&self, names: &FieldNames) -> Result<(), ModelError> {
        let known = [
            &names.vocab_size,
            &names.hidden_size,
            &names.intermediate_size,
            &names.num_layers,
            &names.num_heads,
            &names.num_kv_heads,
            &names.head_dim,
            &names.max_position_embeddings,
            &names.rope_theta,
            &names.rms_norm_eps,
        ];
        let prefix = self.key("");
        let keys = self.metadata.range(prefix.clone()..);
        for (key, value) in keys.take_while(|(key, _)| key.starts_with(&prefix)) {
            let name = &key[prefix.len()..];
            let is_of_experts = self.family.has_experts() && EXPERTS.contains(&name);
            let is_other = OTHER_KEYS.contains(&name) || is_of_experts;
            if !is_other && !known.iter().any(|known| *known == key) {
                let problem = format!("is {value}, which Lockstep doesn't compute");
                return Err(ModelError::unsupported(self.path, key, problem));
            }
        }
        Ok(())
    }

    /// llama.cpp computes experts in every layer, with weights that sum to one (`build_moe_ffn` in
    /// its models/qwen3moe.cpp).
    fn experts(&self) -> Result<ExpertsConfig, ModelError> {
        let [count, per_row, width] = EXPERTS.map(|key| self.key(key));
        let experts = ExpertsConfig {
            count: self.size(&count)?,
            per_row: self.size(&per_row)?,
            intermediate_size: self.size(&width)?,
            normalises: true,
            dense_layers: Vec::new(),
        };
        match experts.problem([&count, &per_row, &width]) {
            None => Ok(experts),
            Some((field, problem)) => Err(ModelError::invalid_field(self.path, field, problem)),
        }
    }

    /// Linear scaling from the metadata, or the divisors that stand for Llama 3.1's.
    fn rope_scaling(&self, divisors: Option<Vec<f32>>, head_dim: usize) -> Result<RopeScaling, ModelError> {
        let kind = self.key(ROPE_SCALING_TYPE);
        let mut factor = None;
        for key in ROPE_SCALING_FACTORS {
            // Zero is how llama.cpp writes that there is none.
            factor = factor.or(self.optional_number(&self.key(key))?.filter(|factor| *factor != 0.0));
        }
        let scaling = match (self.metadata.get(&kind), factor) {
            (None, None) => RopeScaling::None,
            (Some(Value::Text(name)), _) if name == "none" => RopeScaling::None,
            (None, Some(factor)) => RopeScaling::Linear { factor: factor as f32 },
            (Some(Value::Text(name)), factor) if name == "linear" => {
                RopeScaling::Linear { factor: factor.unwrap_or(1.0) as f32 }
            }
            (Some(other), _) => {
                let problem = format!("is {other}; Lockstep computes \"none\" and \"linear\" only");
                return Err(ModelError::unsupported(self.path, kind, problem));
            }
        };
        let scaling = match (divisors, scaling) {
            (None, scaling) => scaling,
            (Some(_), _) if self.family != Family::Llama => {
                let problem = "scales the frequencies of a family that has no such tensor";
                return Err(ModelError::unsupported(self.path, ROPE_DIVISORS, problem));
            }
            (Some(divisors), _) if divisors.len() != head_dim / 2 => {
                let problem = format!("has {} values; heads of {head_dim} need half as many", divisors.len());
                return Err(ModelError::invalid_field(self.path, ROPE_DIVISORS, problem));
            }
            (Some(divisors), RopeScaling::None) => RopeScaling::Divisors(divisors),
            (Some(_), _) => {
                let problem =
                    format!("scales beside the tensor {ROPE_DIVISORS}; Lockstep computes one of them");
                return Err(ModelError::unsupported(self.path, kind, problem));
            }
        };
        match scaling.problem() {
            None => Ok(scaling),
            Some((ROPE_DIVISORS, problem)) => {
                Err(ModelError::invalid_field(self.path, ROPE_DIVISORS, problem))
            }
            Some((_, problem)) => {
                Err(ModelError::invalid_field(self.path, self.key(ROPE_SCALING_FACTORS[0]), problem))
            }
        }
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

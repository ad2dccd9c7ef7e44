//! config.json and generation_config.json, in the form hubs hold (`rope_theta`,
//! `torch_dtype`) and in the one transformers 5 writes (`rope_parameters`, `dtype`).
//!
//! The reference for what a field means is transformers' `LlamaConfig`: what it ignores is
//! ignored here, and its defaults hold for what is absent.

use std::path::Path;

use serde_json::{Map, Value};

use super::{FieldNames, ModelConfig};
use crate::model::{ModelError, files::read_json};

const NAMES: FieldNames = FieldNames {
    vocab_size: "vocab_size",
    hidden_size: "hidden_size",
    intermediate_size: "intermediate_size",
    num_layers: "num_hidden_layers",
    num_heads: "num_attention_heads",
    num_kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    max_position_embeddings: "max_position_embeddings",
    rope_theta: "rope_theta",
    rms_norm_eps: "rms_norm_eps",
    eos_token_id: "eos_token_id",
};

/// The one value that each of these fields may have; absent or null is the same.
///
/// The first rows are `LlamaConfig`'s own; the rest belong to relatives of Llama that are
/// sometimes published under its name.
const FIXED: &[(&str, Fixed)] = &[
    ("hidden_act", Fixed::Text("silu")),
    ("attention_bias", Fixed::False),
    ("mlp_bias", Fixed::False),
    ("attention_dropout", Fixed::Number(0.0)),
    ("partial_rotary_factor", Fixed::Number(1.0)),
    ("quantization_config", Fixed::Absent),
    ("compression_config", Fixed::Absent),
    ("sliding_window", Fixed::Absent),
    ("no_rope_layers", Fixed::Absent),
    ("rope_interleaved", Fixed::False),
    ("use_qk_norm", Fixed::False),
    ("qk_norm", Fixed::False),
    ("qkv_bias", Fixed::False),
    ("num_experts", Fixed::Absent),
    ("num_local_experts", Fixed::Absent),
    ("attn_logit_softcapping", Fixed::Absent),
    ("final_logit_softcapping", Fixed::Absent),
    ("embedding_multiplier", Fixed::Number(1.0)),
    ("attention_multiplier", Fixed::Absent),
    ("residual_multiplier", Fixed::Number(1.0)),
    ("logits_scaling", Fixed::Number(1.0)),
];

enum Fixed {
    Absent,
    False,
    Number(f64),
    Text(&'static str),
}

impl ModelConfig {
    /// Reads a config.json alone: whether the model can be computed, before its weights are there.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        Self::from_hugging_face(path, &read_json(path)?, None, None)
    }

    /// From config.json, generation_config.json if there is one, and the tokenizer's own
    /// end-of-sequence token. `path` is config.json's, for messages.
    pub(in crate::model) fn from_hugging_face(
        path: &Path,
        config: &Map<String, Value>,
        generation: Option<&Map<String, Value>>,
        tokenizer_eos: Option<u32>,
    ) -> Result<Self, ModelError> {
        let fields = Fields { path, map: config };
        check_architecture(&fields)?;
        check_fixed(&fields)?;
        let rope_theta = read_rope(&fields)?;

        let hidden_size = fields.size("hidden_size")?;
        let num_heads = fields.size("num_attention_heads")?;
        let head_dim = match fields.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if num_heads != 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let problem = format!("is {num_heads}, which doesn't divide hidden_size {hidden_size}");
                return Err(ModelError::invalid_field(path, "num_attention_heads", problem));
            }
        };
        let mut eos_token_ids = token_ids(&fields)?;
        if let Some(generation) = generation {
            let path = &path.with_file_name("generation_config.json");
            eos_token_ids.extend(token_ids(&Fields { path, map: generation })?);
        }
        eos_token_ids.extend(tokenizer_eos);
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();

        let config = Self {
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_layers: fields.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads: fields.optional_size("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            rope_theta,
            rms_norm_eps: fields.optional_number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_position_embeddings: fields.optional_size("max_position_embeddings")?.unwrap_or(2048),
            tie_word_embeddings: fields.optional_bool("tie_word_embeddings")?.unwrap_or(false),
            eos_token_ids,
        };
        config.check(path, &NAMES)?;
        Ok(config)
    }
}

fn check_architecture(fields: &Fields) -> Result<(), ModelError> {
    match fields.get("model_type") {
        Some(Value::String(kind)) if kind == "llama" => {}
        Some(kind) => return Err(fields.unsupported("model_type", kind, "\"llama\"")),
        None => return Err(ModelError::invalid_field(fields.path, "model_type", "is missing")),
    }
    if let Some(architectures) = fields.get("architectures") {
        let llama = |list: &Vec<Value>| list.iter().all(|name| name == "LlamaForCausalLM");
        if !architectures.as_array().is_some_and(llama) {
            return Err(fields.unsupported("architectures", architectures, "[\"LlamaForCausalLM\"]"));
        }
    }
    for field in ["dtype", "torch_dtype"] {
        if let Some(dtype) = fields.get(field) {
            let name = dtype.as_str().map(|name| name.trim_start_matches("torch."));
            if !matches!(name, Some("float32" | "float16" | "bfloat16")) {
                return Err(fields.unsupported(field, dtype, "float32, float16 and bfloat16"));
            }
        }
    }
    Ok(())
}

fn check_fixed(fields: &Fields) -> Result<(), ModelError> {
    for (field, fixed) in FIXED {
        let Some(value) = fields.get(field) else { continue };
        let (holds, supported) = match fixed {
            Fixed::Absent => (false, "null".to_owned()),
            Fixed::False => (value == &Value::Bool(false), "false".to_owned()),
            Fixed::Number(number) => (value.as_f64() == Some(*number), number.to_string()),
            Fixed::Text(text) => (value == text, format!("{text:?}")),
        };
        // Qwen-style configurations name a window and switch it off beside it.
        let switched_off =
            *field == "sliding_window" && fields.get("use_sliding_window") == Some(&false.into());
        if !holds && !switched_off {
            return Err(fields.unsupported(field, value, &supported));
        }
    }
    if let Some(layers) = fields.get("layer_types") {
        let full = |list: &Vec<Value>| list.iter().all(|kind| kind == "full_attention");
        if !layers.as_array().is_some_and(full) {
            return Err(fields.unsupported("layer_types", layers, "full_attention in every layer"));
        }
    }
    Ok(())
}

/// The base of the rotary embedding, from `rope_parameters` or from `rope_theta`; any scaling
/// of it is refused.
fn read_rope(fields: &Fields) -> Result<f32, ModelError> {
    let mut theta = fields.optional_number("rope_theta")?;
    for table in ["rope_parameters", "rope_scaling"] {
        let Some(value) = fields.get(table) else { continue };
        let Some(map) = value.as_object() else {
            return Err(ModelError::invalid_field(fields.path, table, format!("is {value}, no table")));
        };
        let inner = Fields { path: fields.path, map };
        for (key, value) in map {
            let name = || format!("{table}.{key}");
            match key.as_str() {
                "rope_type" | "type" if value == "default" => {}
                "rope_type" | "type" => return Err(fields.unsupported(&name(), value, "\"default\"")),
                "rope_theta" => theta = inner.optional_number("rope_theta")?.or(theta),
                "partial_rotary_factor" if value.as_f64() == Some(1.0) => {}
                _ if value.is_null() => {}
                _ => return Err(fields.unsupported(&name(), value, "unscaled rotary embedding")),
            }
        }
    }
    Ok(theta.unwrap_or(10_000.0) as f32)
}

/// `eos_token_id`: absent, one id, or a list of them.
fn token_ids(fields: &Fields) -> Result<Vec<u32>, ModelError> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match fields.get("eos_token_id") {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(one).collect::<Option<Vec<_>>>(),
        Some(value) => one(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| {
        ModelError::invalid_field(fields.path, "eos_token_id", "must be a token id or a list of them")
    })
}

/// A JSON object and where it was read; null counts as absent.
struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &str) -> Result<usize, ModelError> {
        let missing = || ModelError::invalid_field(self.path, field, "is missing");
        self.optional_size(field)?.ok_or_else(missing)
    }

    fn optional_size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        self.typed(field, "a whole number", |value| value.as_u64().and_then(|size| size.try_into().ok()))
    }

    fn optional_number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        self.typed(field, "a number", Value::as_f64)
    }

    fn optional_bool(&self, field: &str) -> Result<Option<bool>, ModelError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    fn typed<T>(
        &self,
        field: &str,
        kind: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let wrong =
            || ModelError::invalid_field(self.path, field, format!("is {}, not {kind}", brief(value)));
        read(value).map(Some).ok_or_else(wrong)
    }

    fn unsupported(&self, field: &str, value: &Value, supported: &str) -> ModelError {
        let problem = format!("is {}; Lockstep computes {supported} only", brief(value));
        ModelError::unsupported(self.path, field, problem)
    }
}

/// The value as JSON, cut to what fits a message.
fn brief(value: &Value) -> String {
    const SHOWN_CHARS: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

//! config.json and generation_config.json, in the form hubs hold (`rope_theta`,
//! `torch_dtype`) and in the one transformers 5 writes (`rope_parameters`, `dtype`).
//!
//! The reference for what a field means is transformers' configuration class of the family: what
//! it ignores is ignored here, and its defaults hold for what is absent.

mod experts;
mod fixed;
mod rope;
#[cfg(test)]
mod tests;
mod write;

use std::{borrow::Cow, path::Path};

use serde_json::{Map, Value};

use super::{Family, FieldNames, ModelConfig};
use crate::model::{ModelError, files::read_json};

const NAMES: FieldNames = FieldNames {
    vocab_size: Cow::Borrowed("vocab_size"),
    hidden_size: Cow::Borrowed("hidden_size"),
    intermediate_size: Cow::Borrowed("intermediate_size"),
    num_layers: Cow::Borrowed("num_hidden_layers"),
    num_heads: Cow::Borrowed("num_attention_heads"),
    num_kv_heads: Cow::Borrowed("num_key_value_heads"),
    head_dim: Cow::Borrowed("head_dim"),
    max_position_embeddings: Cow::Borrowed("max_position_embeddings"),
    rope_theta: Cow::Borrowed("rope_theta"),
    rms_norm_eps: Cow::Borrowed("rms_norm_eps"),
    eos_token_id: Cow::Borrowed("eos_token_id"),
};

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
        let family = read_family(&fields)?;
        fixed::check(&fields, family)?;
        let max_position_embeddings = fields.optional_size("max_position_embeddings")?;
        let max_position_embeddings =
            max_position_embeddings.unwrap_or(if family == Family::Llama { 2048 } else { 32_768 });
        let (rope_theta, rope_scaling) = rope::read(&fields, max_position_embeddings)?;

        let hidden_size = fields.size("hidden_size")?;
        let num_heads = fields.size("num_attention_heads")?;
        let num_kv_heads = match family {
            Family::Llama => fields.optional_size("num_key_value_heads")?.unwrap_or(num_heads),
            // Its default is a number of its own, which fits no model.
            _ => fields.size("num_key_value_heads")?,
        };
        let head_dim = match fields.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if family == Family::Qwen3 => 128,
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
            family,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            experts: family.has_experts().then(|| experts::read(&fields)).transpose()?,
            num_layers: fields.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads,
            head_dim,
            rope_theta,
            rope_scaling,
            rms_norm_eps: fields.optional_number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_position_embeddings,
            tie_word_embeddings: fields.optional_bool("tie_word_embeddings")?.unwrap_or(false),
            eos_token_ids,
        };
        config.check(path, &NAMES)?;
        Ok(config)
    }
}

fn read_family(fields: &Fields) -> Result<Family, ModelError> {
    let Some(model_type) = fields.get("model_type") else {
        return Err(ModelError::invalid_field(fields.path, "model_type", "is missing"));
    };
    let family = model_type.as_str().and_then(|name| Family::of(name, Family::model_type));
    let unknown = || fields.unsupported("model_type", model_type, &Family::names(Family::model_type));
    let family = family.ok_or_else(unknown)?;
    if let Some(architectures) = fields.get("architectures") {
        let architecture = family.architecture();
        let is_it = |list: &Vec<Value>| list.iter().all(|name| name == architecture);
        if !architectures.as_array().is_some_and(is_it) {
            let supported = format!("[{architecture:?}]");
            return Err(fields.unsupported("architectures", architectures, &supported));
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
    Ok(family)
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

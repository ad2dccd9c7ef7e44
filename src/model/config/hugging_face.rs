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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Map<String, Value> {
        let config = json!({
            "model_type": "llama", "vocab_size": 100, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "eos_token_id": 2,
        });
        config.as_object().unwrap().clone()
    }

    fn read(config: &Map<String, Value>) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_hugging_face(Path::new("config.json"), config, None, None)
    }

    fn read_with(field: &str, value: Value) -> Result<ModelConfig, ModelError> {
        let mut config = llama();
        config.insert(field.to_owned(), value);
        read(&config)
    }

    #[test]
    fn fills_in_what_transformers_would() {
        let config = read(&llama()).unwrap();
        assert_eq!((config.head_dim, config.rope_theta, config.rms_norm_eps), (6, 1e4, 1e-6));
        assert!(!config.tie_word_embeddings);
        assert_eq!(read_with("num_key_value_heads", json!(null)).unwrap().num_kv_heads, 4);
        assert_eq!(read_with("head_dim", json!(16)).unwrap().head_dim, 16, "it needn't be hidden / heads");
    }

    #[test]
    fn reads_both_forms_of_the_rotary_base() {
        let old = read_with("rope_theta", json!(500_000.0)).unwrap();
        let new = json!({ "rope_theta": 500_000, "rope_type": "default", "partial_rotary_factor": 1.0 });
        assert_eq!(old, read_with("rope_parameters", new).unwrap());
        assert_eq!(old.rope_theta, 5e5);
        let unscaled = json!({ "type": "default", "factor": null });
        assert_eq!(read_with("rope_scaling", unscaled).unwrap().rope_theta, 1e4);
        for (field, dtype) in
            [("dtype", "bfloat16"), ("torch_dtype", "torch.float16"), ("torch_dtype", "float32")]
        {
            read_with(field, json!(dtype)).unwrap();
        }
    }

    #[test]
    fn gathers_end_tokens_from_everywhere() {
        let mut config = llama();
        config.insert("eos_token_id".to_owned(), json!([7, 3]));
        let generation = json!({ "eos_token_id": [9, 3] });
        let path = Path::new("config.json");
        let all = ModelConfig::from_hugging_face(path, &config, generation.as_object(), Some(5)).unwrap();
        assert_eq!(all.eos_token_ids, [3, 5, 7, 9]);
        config.remove("eos_token_id");
        assert_eq!(read(&config).unwrap().eos_token_ids, [0; 0]);
    }

    #[test]
    fn refuses_by_name_what_it_does_not_compute() {
        let unsupported = [
            ("model_type", json!("qwen2"), "model_type"),
            ("architectures", json!(["LlamaForSequenceClassification"]), "architectures"),
            ("dtype", json!("float8_e4m3fn"), "dtype"),
            ("torch_dtype", json!("float64"), "torch_dtype"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("attention_bias", json!(true), "attention_bias"),
            ("mlp_bias", json!(true), "mlp_bias"),
            ("attention_dropout", json!(0.1), "attention_dropout"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            ("quantization_config", json!({ "bits": 4 }), "quantization_config"),
            ("sliding_window", json!(4096), "sliding_window"),
            ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types"),
            ("num_local_experts", json!(8), "num_local_experts"),
            ("logits_scaling", json!(8.0), "logits_scaling"),
            ("rope_interleaved", json!(true), "rope_interleaved"),
            ("rope_scaling", json!({ "rope_type": "llama3", "factor": 8.0 }), "rope_scaling."),
            ("rope_scaling", json!({ "type": "linear", "factor": 2.0 }), "rope_scaling."),
            ("rope_scaling", json!({ "type": "default", "factor": 2.0 }), "rope_scaling.factor"),
            ("rope_parameters", json!({ "rope_type": "yarn" }), "rope_parameters.rope_type"),
            (
                "rope_parameters",
                json!({ "partial_rotary_factor": 0.25 }),
                "rope_parameters.partial_rotary_factor",
            ),
        ];
        for (field, value, named) in unsupported {
            let error = read_with(field, value.clone()).unwrap_err();
            assert!(
                matches!(&error, ModelError::Unsupported { field, .. } if field.starts_with(named)),
                "{field} = {value}: {error}"
            );
        }
        read_with("sliding_window", json!(null)).unwrap();
        read_with("hidden_act", json!("silu")).unwrap();
        read_with("transformers.js_config", json!({ "dtype": "q4" })).unwrap();
    }

    #[test]
    fn refuses_values_that_no_model_has() {
        let invalid = [
            ("vocab_size", json!(0)),
            ("vocab_size", json!(-1)),
            ("hidden_size", json!("24")),
            ("hidden_size", json!(1u64 << 40)),
            ("num_hidden_layers", json!(null)),
            ("num_hidden_layers", json!(1_000_000)),
            ("intermediate_size", json!(u64::MAX)),
            ("num_attention_heads", json!(0)),
            ("num_attention_heads", json!(5)),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(7)),
            ("rope_theta", json!(0.0)),
            ("rope_theta", json!(1e300)),
            ("rope_scaling", json!("linear")),
            ("rms_norm_eps", json!(-1e-6)),
            ("max_position_embeddings", json!(0)),
            ("eos_token_id", json!(100)),
            ("eos_token_id", json!([1, "2"])),
            ("tie_word_embeddings", json!("yes")),
        ];
        for (field, value) in invalid {
            let error = read_with(field, value.clone()).unwrap_err();
            assert!(
                matches!(&error, ModelError::InvalidField { field: named, .. } if named == field),
                "{field} = {value}: {error}"
            );
        }
        let mut huge = llama();
        for field in ["vocab_size", "hidden_size", "intermediate_size"] {
            huge.insert(field.to_owned(), json!(1 << 24));
        }
        assert!(read(&huge).unwrap_err().to_string().contains("weights"));
        assert!(read(&Map::new()).unwrap_err().to_string().contains("`model_type` is missing"));
    }
}

//! Fields that may have one value only, because the decoder computes that one.

use serde_json::Value;

use super::{Family, Fields};
use crate::model::ModelError;

/// The one value that each of these fields may have; absent or null is the same.
///
/// The first rows are transformers' own; the rest belong to relatives of these families that
/// are sometimes published under their names.
const FIXED: &[(&str, Fixed)] = &[
    ("hidden_act", Fixed::Text("silu")),
    ("attention_bias", Fixed::False),
    ("mlp_bias", Fixed::False),
    ("partial_rotary_factor", Fixed::Number(1.0)),
    ("quantization_config", Fixed::Absent),
    ("compression_config", Fixed::Absent),
    ("no_rope_layers", Fixed::Absent),
    ("rope_interleaved", Fixed::False),
    ("use_mrope", Fixed::False),
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

/// Refuses by its name what the decoder doesn't compute.
pub(super) fn check(fields: &Fields, family: Family) -> Result<(), ModelError> {
    for (field, fixed) in FIXED.iter().filter(|(field, _)| !is_always(family, field)) {
        let Some(value) = fields.get(field) else { continue };
        let (holds, supported) = match fixed {
            Fixed::Absent => (false, "null".to_owned()),
            Fixed::False => (value == &Value::Bool(false), "false".to_owned()),
            Fixed::Number(number) => (value.as_f64() == Some(*number), number.to_string()),
            Fixed::Text(text) => (value == text, format!("{text:?}")),
        };
        if !holds {
            return Err(fields.unsupported(field, value, &supported));
        }
    }
    check_windows(fields, family)
}

/// Whether the field names what this family does whatever the field says.
fn is_always(family: Family, field: &str) -> bool {
    match field {
        "attention_bias" | "qkv_bias" => family.has_qkv_bias(),
        "use_qk_norm" | "qk_norm" => family.has_qk_norm(),
        "num_experts" | "num_local_experts" => family.has_experts(),
        _ => false,
    }
}

/// Every layer must attend to its whole past.
///
/// Qwen's configurations name a window and switch it on beside it, for the layers from
/// `max_window_layers` on; `layer_types`, where given, has the last word.
fn check_windows(fields: &Fields, family: Family) -> Result<(), ModelError> {
    if let Some(layers) = fields.get("layer_types") {
        let full = |list: &Vec<Value>| list.iter().all(|kind| kind == "full_attention");
        return match layers.as_array().is_some_and(full) {
            true => Ok(()),
            false => Err(fields.unsupported("layer_types", layers, "full_attention in every layer")),
        };
    }
    if family == Family::Llama {
        // A Llama with a window is no Llama.
        return match fields.get("sliding_window") {
            Some(window) => Err(fields.unsupported("sliding_window", window, "null")),
            None => Ok(()),
        };
    }
    let is_null = fields.map.get("sliding_window").is_some_and(Value::is_null);
    if is_null || !fields.optional_bool("use_sliding_window")?.unwrap_or(false) {
        return Ok(());
    }
    // A mixture of experts has its window in every layer.
    let windowless = match family.has_experts() {
        true => None,
        false => fields.optional_size("max_window_layers")?,
    };
    if windowless >= Some(fields.size("num_hidden_layers")?) {
        return Ok(());
    }
    Err(fields.unsupported("use_sliding_window", &Value::Bool(true), "attention to the whole past"))
}

//! A config.json, written.

use serde_json::{Map, Value, json};

use crate::model::{ModelConfig, RopeScaling};

impl ModelConfig {
    /// The config.json from which this configuration is read again; `dtype` is the one that the weights
    /// beside it are stored in (`float32`, `bfloat16`).
    ///
    /// `None` if it has [divisors of its own](RopeScaling::Divisors), for which a config.json has no place.
    pub(in crate::model) fn to_hugging_face(&self, dtype: &str) -> Option<Map<String, Value>> {
        let mut json = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.model_type(),
            "dtype": dtype,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": self.eos_token_ids,
        });
        if let Some(experts) = &self.experts {
            json["num_experts"] = experts.count.into();
            json["num_experts_per_tok"] = experts.per_row.into();
            json["moe_intermediate_size"] = experts.intermediate_size.into();
            json["norm_topk_prob"] = experts.normalises.into();
            json["mlp_only_layers"] = experts.dense_layers.clone().into();
        }
        match &self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                json["rope_scaling"] = json!({ "rope_type": "linear", "factor": factor });
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                json["rope_scaling"] = json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_positions,
                });
            }
            RopeScaling::Divisors(_) => return None,
        }
        match json {
            Value::Object(fields) => Some(fields),
            _ => None,
        }
    }
}

use serde_json::json;

use super::*;
use crate::model::{ExpertsConfig, RopeScaling};

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
fn reads_scaled_rotary_frequencies() {
    let linear = RopeScaling::Linear { factor: 2.5 };
    assert_eq!(
        read_with("rope_scaling", json!({ "type": "linear", "factor": 2.5 })).unwrap().rope_scaling,
        linear
    );
    let table = json!({ "rope_type": "linear", "factor": 2.5, "rope_theta": 700 });
    let config = read_with("rope_parameters", table).unwrap();
    assert_eq!((config.rope_scaling, config.rope_theta), (linear, 700.0));

    let llama3 = |original_positions| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_positions,
    };
    let mut table = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(read_with("rope_scaling", table.clone()).unwrap().rope_scaling, llama3(8192));
    table["original_max_position_embeddings"] = json!(null);
    assert_eq!(
        read_with("rope_scaling", table.clone()).unwrap().rope_scaling,
        llama3(64),
        "the context's length"
    );
    let mut outside = llama();
    outside.insert("original_max_position_embeddings".to_owned(), json!(32));
    outside.insert("rope_parameters".to_owned(), table);
    assert_eq!(read(&outside).unwrap().rope_scaling, llama3(32));
}

#[test]
fn the_older_table_of_rotary_scaling_has_the_last_word() {
    let mut both = llama();
    both.insert("rope_parameters".to_owned(), json!({ "rope_type": "yarn", "rope_theta": 9.0 }));
    both.insert("rope_scaling".to_owned(), json!({ "type": "linear", "factor": 2.0 }));
    let config = read(&both).unwrap();
    assert_eq!((config.rope_scaling, config.rope_theta), (RopeScaling::Linear { factor: 2.0 }, 1e4));
    both.insert("rope_scaling".to_owned(), json!({}));
    assert!(read(&both).unwrap_err().to_string().contains("rope_parameters.rope_type"));
}

#[test]
fn refuses_rotary_scaling_by_impossible_numbers() {
    let llama3 = |changed: &str, value: Value| {
        let mut table = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        table[changed] = value;
        table
    };
    let invalid = [
        (json!({ "type": "linear" }), "rope_scaling.factor"),
        (json!({ "type": "linear", "factor": 0 }), "rope_scaling.factor"),
        (json!({ "type": "linear", "factor": "2" }), "rope_scaling.factor"),
        (llama3("factor", json!(-1)), "rope_scaling.factor"),
        (llama3("low_freq_factor", json!(null)), "rope_scaling.low_freq_factor"),
        (llama3("high_freq_factor", json!(1.0)), "rope_scaling.high_freq_factor"),
        (
            llama3("original_max_position_embeddings", json!(0)),
            "rope_scaling.original_max_position_embeddings",
        ),
        (
            llama3("original_max_position_embeddings", json!(1.5)),
            "rope_scaling.original_max_position_embeddings",
        ),
    ];
    for (table, named) in invalid {
        let error = read_with("rope_scaling", table.clone()).unwrap_err();
        assert!(
            matches!(&error, ModelError::InvalidField { field, .. } if field == named),
            "{table}: {error}"
        );
    }
}

fn of_family(family: Family) -> Map<String, Value> {
    let mut config = llama();
    config.insert("model_type".to_owned(), json!(family.model_type()));
    config.insert("architectures".to_owned(), json!([family.architecture()]));
    if family.has_experts() {
        let experts = json!({ "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10 });
        config.extend(experts.as_object().unwrap().clone());
    }
    config
}

#[test]
fn reads_experts_under_both_names() {
    let mut config = of_family(Family::Qwen3Moe);
    let plain = ExpertsConfig {
        count: 6,
        per_row: 2,
        intermediate_size: 10,
        normalises: false,
        dense_layers: vec![],
    };
    assert_eq!(read(&config).unwrap().experts.as_ref(), Some(&plain));
    config.remove("num_experts");
    config.extend(
        json!({
            "num_local_experts": 6, "norm_topk_prob": true, "decoder_sparse_step": 2,
            "mlp_only_layers": [3, 9], "num_hidden_layers": 5,
        })
        .as_object()
        .unwrap()
        .clone(),
    );
    let read = read(&config).unwrap();
    assert_eq!(
        read.experts,
        Some(ExpertsConfig { normalises: true, dense_layers: vec![0, 2, 3, 4], ..plain })
    );
    assert!(read.layer_experts(1).is_some() && read.layer_experts(3).is_none());
}

#[test]
fn refuses_experts_that_cannot_be() {
    let invalid = [
        ("num_experts", json!(0)),
        ("num_experts", json!(1 << 20)),
        ("num_experts_per_tok", json!(7)),
        ("num_experts_per_tok", json!(null)),
        ("moe_intermediate_size", json!(0)),
        ("norm_topk_prob", json!("yes")),
        ("mlp_only_layers", json!(1)),
        ("mlp_only_layers", json!([-1])),
        ("decoder_sparse_step", json!(0)),
    ];
    for (field, value) in invalid {
        let mut config = of_family(Family::Qwen3Moe);
        config.insert(field.to_owned(), value.clone());
        let error = read(&config).unwrap_err();
        assert!(
            matches!(&error, ModelError::InvalidField { field: named, .. } if named == field),
            "{field} = {value}: {error}"
        );
    }
}

#[test]
fn reads_each_family() {
    for family in Family::ALL {
        let config = read(&of_family(family)).unwrap();
        assert_eq!(config.family, family);
        assert_eq!(config.head_dim, if family == Family::Qwen3 { 128 } else { 6 });
    }
    let mut qwen = of_family(Family::Qwen2);
    qwen.remove("max_position_embeddings");
    // Fields of Qwen2.5's published configurations, which say what it does anyway.
    for (field, value) in
        [("attention_bias", json!(true)), ("use_mrope", json!(false)), ("qkv_bias", json!(true))]
    {
        qwen.insert(field.to_owned(), value);
    }
    assert_eq!(read(&qwen).unwrap().max_position_embeddings, 32_768);
    qwen.remove("num_key_value_heads");
    let error = read(&qwen).unwrap_err();
    assert!(
        matches!(&error, ModelError::InvalidField { field, .. } if field == "num_key_value_heads"),
        "{error}"
    );

    let mut qwen3 = of_family(Family::Qwen3);
    qwen3.insert("attention_bias".to_owned(), json!(true));
    let error = read(&qwen3).unwrap_err();
    assert!(matches!(&error, ModelError::Unsupported { field, .. } if field == "attention_bias"), "{error}");
}

#[test]
fn refuses_a_window_only_where_it_is_used() {
    let with = |fields: Value| {
        let mut config = of_family(Family::Qwen2);
        config.extend(fields.as_object().unwrap().clone());
        read(&config)
    };
    let unused = [
        json!({ "sliding_window": 32_768, "use_sliding_window": false, "max_window_layers": 0 }),
        json!({ "sliding_window": 32_768, "max_window_layers": 0 }),
        // The first two of two layers attend to everything.
        json!({ "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 2 }),
        json!({ "sliding_window": null, "use_sliding_window": true, "max_window_layers": 0 }),
        json!({
            "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 0,
            "layer_types": ["full_attention", "full_attention"],
        }),
    ];
    for fields in unused {
        with(fields.clone()).unwrap_or_else(|error| panic!("{fields}: {error}"));
    }
    let used = [
        (
            json!({ "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1 }),
            "use_sliding_window",
        ),
        (json!({ "sliding_window": 16, "use_sliding_window": true }), "use_sliding_window"),
        // transformers has a window of its own where the field is absent.
        (json!({ "use_sliding_window": true, "max_window_layers": 0 }), "use_sliding_window"),
        (json!({ "layer_types": ["full_attention", "sliding_attention"] }), "layer_types"),
    ];
    for (fields, named) in used {
        let error = with(fields.clone()).unwrap_err();
        assert!(
            matches!(&error, ModelError::Unsupported { field, .. } if field == named),
            "{fields}: {error}"
        );
    }
    let error = read_with("sliding_window", json!(16)).unwrap_err();
    assert!(matches!(&error, ModelError::Unsupported { field, .. } if field == "sliding_window"), "{error}");
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
        ("model_type", json!("mistral"), "model_type"),
        // The family is right, and the list names another's.
        ("architectures", json!(["Qwen2ForCausalLM"]), "architectures"),
        ("architectures", json!(["LlamaForSequenceClassification"]), "architectures"),
        ("dtype", json!("float8_e4m3fn"), "dtype"),
        ("torch_dtype", json!("float64"), "torch_dtype"),
        ("hidden_act", json!("gelu"), "hidden_act"),
        ("attention_bias", json!(true), "attention_bias"),
        ("mlp_bias", json!(true), "mlp_bias"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        ("quantization_config", json!({ "bits": 4 }), "quantization_config"),
        ("sliding_window", json!(4096), "sliding_window"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "layer_types"),
        ("num_local_experts", json!(8), "num_local_experts"),
        ("logits_scaling", json!(8.0), "logits_scaling"),
        ("rope_interleaved", json!(true), "rope_interleaved"),
        ("rope_scaling", json!({ "type": "dynamic", "factor": 2.0 }), "rope_scaling.type"),
        (
            "rope_scaling",
            json!({ "type": "linear", "factor": 2.0, "beta_fast": 32 }),
            "rope_scaling.beta_fast",
        ),
        (
            "rope_scaling",
            json!({ "rope_type": "linear", "mrope_section": [1, 2] }),
            "rope_scaling.mrope_section",
        ),
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
    read_with("attention_dropout", json!(0.1)).unwrap();
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

//! Adapters that others made: a directory as PEFT saves it.
//!
//! The configuration's fields that ask for another computation than `W x + scale · B (A x)` are
//! refused by name; so is every tensor that has no place in a dense grid of layers and targets.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::types::{LoraConfig, LoraTarget};

use super::{
    Adapter, AdapterError, LoraLayout,
    bytes::{Reader, refuse_infinite},
    layout::Module,
};

/// What is read of the configuration, and checked.
const READ: [&str; 6] = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"];

/// What does not change the mathematics of a trained adapter. Its targets are those that its
/// file holds.
const NOT_READ: [&str; 10] = [
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
];

/// Initialisations that leave the base model's weights as they are.
const PLAIN_INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl Adapter {
    /// Reads the two files of a PEFT adapter directory, `adapter_config.json` and
    /// `adapter_model.safetensors` (float32, float16 or bfloat16).
    ///
    /// With `use_rslora`, whose scale is `alpha / √rank`, alpha is multiplied by `√rank`.
    pub fn from_peft(config: &[u8], tensors: &[u8]) -> Result<Self, AdapterError> {
        let json: Map<String, Value> =
            serde_json::from_slice(config).map_err(|error| refused("", format!("can't be read: {error}")))?;
        let reader = Reader::new(tensors)?;
        refuse_embeddings(&reader)?;
        let config = lora_config(&json, targets(&reader)?)?;
        let layout = LoraLayout::of_tensors(&config, |name| reader.shape(name))?;
        let rank = config.rank as usize;
        let mut values = Vec::with_capacity(layout.len());
        let mut names = std::collections::HashSet::new();
        for entry in &layout.entries {
            let [name_a, name_b] = entry.tensor_names();
            for (name, shape) in [(name_a, [rank, entry.in_features]), (name_b, [entry.out_features, rank])] {
                let start = values.len();
                reader.read_widened(&name, &shape, &mut values)?;
                refuse_infinite(&name, &values[start..])?;
                names.insert(name);
            }
        }
        reader.refuse_unknown(|name| names.contains(name))?;
        Ok(Self { layout: Arc::new(layout), values: values.into() })
    }
}

/// Weights of the base model, which PEFT saves beside an adapter on the head unless it is told not to. They
/// may have been changed; an adapter is on a model as it is.
fn refuse_embeddings(reader: &Reader<'_>) -> Result<(), AdapterError> {
    let embeddings = ["lm_head.base_layer", "lm_head", "model.embed_tokens.base_layer", "model.embed_tokens"];
    let names = embeddings.map(|module| format!("base_model.model.{module}.weight"));
    match names.into_iter().find(|name| reader.has(name)) {
        None => Ok(()),
        Some(name) => {
            let problem = format!(
                "is not false: the file holds `{name}`, a weight of the base model; save it again with \
                 save_pretrained(…, save_embedding_layers=False)"
            );
            Err(refused("save_embedding_layers", problem))
        }
    }
}

/// The targets that the file's first layer has.
fn targets(reader: &Reader<'_>) -> Result<Vec<LoraTarget>, AdapterError> {
    let is_held = |module: Module| reader.has(&module.tensor_names()[0]);
    let targets: Vec<LoraTarget> =
        LoraTarget::ALL.into_iter().filter(|target| !Module::held(0, *target, is_held).is_empty()).collect();
    if targets.is_empty() {
        // Names what is there instead, if anything is.
        reader.refuse_unknown(|_| false)?;
        return Err(AdapterError::MissingTensor { name: "base_model.model.model.layers.0".to_owned() });
    }
    Ok(targets)
}

fn lora_config(json: &Map<String, Value>, targets: Vec<LoraTarget>) -> Result<LoraConfig, AdapterError> {
    for (field, value) in json {
        if READ.contains(&field.as_str()) || NOT_READ.contains(&field.as_str()) || is_off(field, value) {
            continue;
        }
        return Err(refused(field, format!("is {value}, which Lockstep doesn't compute")));
    }
    let field = |name: &str| json.get(name).ok_or_else(|| refused(name, "is missing".to_owned()));
    if field("peft_type")? != "LORA" {
        return Err(refused("peft_type", format!("is {}; LORA is read", json["peft_type"])));
    }
    if let Some(dropout) = json.get("lora_dropout").filter(|dropout| dropout.as_f64() != Some(0.0)) {
        let problem = format!("is {dropout}; Lockstep trains without dropout. To go on so, make it 0");
        return Err(refused("lora_dropout", problem));
    }
    match json.get("init_lora_weights").unwrap_or(&Value::Null) {
        Value::Null | Value::Bool(_) => {}
        Value::String(name) if PLAIN_INITIALISATIONS.contains(&name.as_str()) => {}
        other => {
            let problem =
                format!("is {other}: its base model has other weights than the one it is named for");
            return Err(refused("init_lora_weights", problem));
        }
    }
    let rank = field("r")?.as_u64().and_then(|rank| u32::try_from(rank).ok()).filter(|rank| *rank > 0);
    let rank =
        rank.ok_or_else(|| refused("r", format!("is {}; a whole number above 0 is needed", json["r"])))?;
    let alpha = field("lora_alpha")?.as_f64();
    let alpha =
        alpha.ok_or_else(|| refused("lora_alpha", format!("is {}, no number", json["lora_alpha"])))?;
    let factor =
        if json.get("use_rslora") == Some(&Value::Bool(true)) { f64::from(rank).sqrt() } else { 1.0 };
    Ok(LoraConfig { rank, alpha: (alpha * factor) as f32, seed: 0, targets })
}

/// Whether a field that Lockstep knows nothing of asks for nothing.
fn is_off(field: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => field == "bias" && text == "none",
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn refused(field: &str, problem: String) -> AdapterError {
    AdapterError::Peft { field: field.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::lora::adapter::tests::dense_adapter;

    /// What PEFT 0.21 writes beside ours.
    fn config(edit: impl FnOnce(&mut Map<String, Value>)) -> Vec<u8> {
        let [_, (_, ours)] = dense_adapter().to_peft("org/base");
        let mut json: Map<String, Value> = serde_json::from_slice(&ours).unwrap();
        for field in ["rank_pattern", "alpha_pattern", "loftq_config"] {
            json.insert(field.into(), Value::Object(Map::new()));
        }
        json.insert("qalora_group_size".into(), 16.into());
        json.insert("layers_to_transform".into(), Value::Null);
        json.insert("lora_dropout".into(), 0.0.into());
        edit(&mut json);
        serde_json::to_vec(&json).unwrap()
    }

    fn read(edit: impl FnOnce(&mut Map<String, Value>)) -> Result<Adapter, AdapterError> {
        Adapter::from_peft(&config(edit), &dense_adapter().to_bytes())
    }

    #[test]
    fn what_is_exported_is_imported() {
        let adapter = read(|_| {}).unwrap();
        assert_eq!(adapter.values, dense_adapter().values);
        assert_eq!(adapter.digest(), dense_adapter().digest());
    }

    #[test]
    fn a_rank_stabilised_scale_is_kept() {
        let adapter = read(|json| drop(json.insert("use_rslora".into(), true.into()))).unwrap();
        let expected = 32.0 / 3f32.sqrt();
        assert!((adapter.layout.scale() - expected).abs() < 1e-5 * expected);
    }

    #[test]
    fn refuses_another_computation_by_its_field() {
        let cases: [(&str, Value); 10] = [
            ("lora_dropout", 0.05.into()),
            ("use_dora", true.into()),
            ("bias", "all".into()),
            ("fan_in_fan_out", true.into()),
            ("modules_to_save", vec!["lm_head"].into()),
            ("rank_pattern", serde_json::json!({"q_proj": 4})),
            ("layers_to_transform", vec![1].into()),
            ("something_new", 3.into()),
            ("peft_type", "IA3".into()),
            ("init_lora_weights", "pissa".into()),
        ];
        for (field, value) in cases {
            let error = read(|json| drop(json.insert(field.into(), value))).unwrap_err();
            assert!(matches!(&error, AdapterError::Peft { field: found, .. } if found == field), "{error}");
        }
    }

    #[test]
    fn refuses_a_rank_that_is_not_the_files() {
        let error = read(|json| drop(json.insert("r".into(), 4.into()))).unwrap_err();
        assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
        for (field, value) in [("r", Value::from(0)), ("r", "8".into()), ("lora_alpha", Value::Null)] {
            let error = read(|json| drop(json.insert(field.into(), value))).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    #[test]
    fn refuses_tensors_that_have_no_place() {
        let values = [1.0; 4];
        let tensor = || super::super::bytes::Tensor { shape: vec![2, 2], values: &values };
        let name = "base_model.model.model.norm.lora_A.weight";
        let bytes = safetensors::serialize([(name, tensor())], None).unwrap();
        let error = Adapter::from_peft(&config(|_| {}), &bytes).unwrap_err();
        assert!(matches!(error, AdapterError::UnknownTensor { name: found } if found == name));
    }

    #[test]
    fn refuses_weights_of_the_base_model_beside_the_adapter() {
        let values = [1.0; 4];
        for name in
            ["base_model.model.lm_head.base_layer.weight", "base_model.model.model.embed_tokens.weight"]
        {
            let tensor = super::super::bytes::Tensor { shape: vec![2, 2], values: &values };
            let bytes = safetensors::serialize([(name, tensor)], None).unwrap();
            let error = Adapter::from_peft(&config(|_| {}), &bytes).unwrap_err();
            assert!(
                matches!(&error, AdapterError::Peft { field, .. } if field == "save_embedding_layers"),
                "{error}"
            );
        }
    }
}

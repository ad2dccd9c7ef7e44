use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    model::{ModelConfig, ParamVector},
    types::{Digest, Hasher, LoraConfig, LoraTarget},
};

use super::{
    AdapterError, LoraLayout,
    bytes::{Reader, Tensor, write},
    init,
};

/// An adapter's weights, immutable once made.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub layout: Arc<LoraLayout>,
    /// `layout.len()` values.
    pub values: ParamVector,
}

/// Version of [`Adapter::to_bytes`].
const VERSION: u32 = 1;

/// What the file says about itself beside its tensors.
#[derive(Serialize, Deserialize)]
struct Metadata {
    version: u32,
    lora: LoraConfig,
    /// [`Adapter::digest`].
    digest: Digest,
}

impl Adapter {
    /// The fresh adapter of a seed: A uniform in ±1/sqrt(in) from ChaCha8 keyed by (seed,
    /// tensor name), B zero.
    pub fn init(layout: Arc<LoraLayout>) -> Self {
        let values = init::initial_values(&layout).into();
        Self { layout, values }
    }

    /// SHA-256 over the tensors, rank, alpha and targets: the digest of a `PolicyId`.
    pub fn digest(&self) -> Digest {
        let LoraConfig { rank, alpha, targets, seed: _ } = &self.layout.config;
        let mut hasher = Hasher::default();
        hasher.update(b"lockstep adapter 1\0");
        hasher.update(&rank.to_le_bytes());
        hasher.update(&alpha.to_le_bytes());
        for target in targets {
            hasher.update(target.name().as_bytes());
            hasher.update(b"\0");
        }
        hasher.update(&self.values.digest().0);
        hasher.finish()
    }

    /// Canonical bytes: a safetensors file with PEFT's tensor names and the configuration in
    /// its metadata.
    pub fn to_bytes(&self) -> Vec<u8> {
        let rank = self.layout.config.rank as usize;
        let mut tensors = Vec::with_capacity(2 * self.layout.entries.len());
        for entry in &self.layout.entries {
            let [name_a, name_b] = entry.tensor_names();
            let (a, b) = (&self.values[entry.a.clone()], &self.values[entry.b.clone()]);
            tensors.push((name_a, Tensor { shape: vec![rank, entry.in_features], values: a }));
            tensors.push((name_b, Tensor { shape: vec![entry.out_features, rank], values: b }));
        }
        let lora = self.layout.config.clone();
        write(tensors, &Metadata { version: VERSION, lora, digest: self.digest() })
    }

    /// Reads [`Adapter::to_bytes`], checking every shape against the model, every value, and
    /// the digest.
    pub fn from_bytes(model: &ModelConfig, bytes: &[u8]) -> Result<Self, AdapterError> {
        let reader = Reader::new(bytes)?;
        let metadata: Metadata = reader.metadata(VERSION)?;
        Self::read(&reader, LoraLayout::new(model, &metadata.lora)?, &metadata)
    }

    /// The same without its model: shapes are those that the file has.
    pub fn of_any_model(bytes: &[u8]) -> Result<Self, AdapterError> {
        let reader = Reader::new(bytes)?;
        let metadata: Metadata = reader.metadata(VERSION)?;
        let layout = LoraLayout::of_tensors(&metadata.lora, |name| reader.shape(name))?;
        Self::read(&reader, layout, &metadata)
    }

    fn read(reader: &Reader<'_>, layout: LoraLayout, metadata: &Metadata) -> Result<Self, AdapterError> {
        let rank = metadata.lora.rank as usize;
        let mut values = Vec::with_capacity(layout.len());
        let mut names = std::collections::HashSet::new();
        for entry in &layout.entries {
            let [name_a, name_b] = entry.tensor_names();
            reader.read_finite(&name_a, &[rank, entry.in_features], &mut values)?;
            reader.read_finite(&name_b, &[entry.out_features, rank], &mut values)?;
            names.extend([name_a, name_b]);
        }
        reader.refuse_unknown(|name| names.contains(name))?;
        let adapter = Self { layout: Arc::new(layout), values: values.into() };
        let found = adapter.digest();
        if found != metadata.digest {
            return Err(AdapterError::Altered { expected: metadata.digest, found });
        }
        Ok(adapter)
    }

    /// The two files of a PEFT adapter directory: (`adapter_model.safetensors`,
    /// `adapter_config.json`).
    pub fn to_peft(&self, base_model: &str) -> [(String, Vec<u8>); 2] {
        #[derive(Serialize)]
        struct PeftConfig<'a> {
            base_model_name_or_path: &'a str,
            bias: &'a str,
            fan_in_fan_out: bool,
            inference_mode: bool,
            init_lora_weights: bool,
            lora_alpha: f32,
            lora_dropout: f32,
            modules_to_save: Option<Vec<String>>,
            peft_type: &'a str,
            r: u32,
            target_modules: &'a [LoraTarget],
            task_type: &'a str,
            use_dora: bool,
            use_rslora: bool,
        }
        let config = PeftConfig {
            base_model_name_or_path: base_model,
            bias: "none",
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true,
            lora_alpha: self.layout.config.alpha,
            lora_dropout: 0.0,
            modules_to_save: None,
            peft_type: "LORA",
            r: self.layout.config.rank,
            target_modules: &self.layout.config.targets,
            task_type: "CAUSAL_LM",
            use_dora: false,
            use_rslora: false,
        };
        // A struct of numbers and strings always has a JSON form.
        let mut json = serde_json::to_vec_pretty(&config).expect("a PEFT configuration is plain data");
        json.push(b'\n');
        [("adapter_model.safetensors".to_owned(), self.to_bytes()), ("adapter_config.json".to_owned(), json)]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::lora::layout::tests::tiny_model;

    /// An adapter whose B is not zero, so that nothing hides behind it.
    pub(crate) fn dense_adapter() -> Adapter {
        let layout = Arc::new(LoraLayout::new(&tiny_model(), &LoraConfig::new(3, 5)).unwrap());
        let fresh = Adapter::init(layout.clone());
        let values: Vec<f32> =
            fresh.values.iter().enumerate().map(|(i, v)| v + (i % 17) as f32 * 0.01).collect();
        Adapter { layout, values: values.into() }
    }

    /// The bytes of a file with these tensors and this `lockstep` metadata.
    fn file(metadata: serde_json::Value, edit: impl FnOnce(&mut Vec<(String, Tensor<'_>)>)) -> Vec<u8> {
        let adapter = dense_adapter();
        let rank = adapter.layout.config.rank as usize;
        let mut tensors = Vec::new();
        for entry in &adapter.layout.entries {
            let [a, b] = entry.tensor_names();
            let a_values = &adapter.values[entry.a.clone()];
            tensors.push((a, Tensor { shape: vec![rank, entry.in_features], values: a_values }));
            let b_values = &adapter.values[entry.b.clone()];
            tensors.push((b, Tensor { shape: vec![entry.out_features, rank], values: b_values }));
        }
        edit(&mut tensors);
        write(tensors, &metadata)
    }

    fn metadata() -> serde_json::Value {
        let adapter = dense_adapter();
        serde_json::json!({ "version": VERSION, "lora": adapter.layout.config, "digest": adapter.digest() })
    }

    fn refusal(bytes: &[u8]) -> AdapterError {
        Adapter::from_bytes(&tiny_model(), bytes).unwrap_err()
    }

    #[test]
    fn bytes_round_trip_and_are_deterministic() {
        let adapter = dense_adapter();
        let bytes = adapter.to_bytes();
        let back = Adapter::from_bytes(&tiny_model(), &bytes).unwrap();
        assert_eq!(back.values, adapter.values);
        assert_eq!(back.layout, adapter.layout);
        assert_eq!(back.digest(), adapter.digest());
        assert!(back.to_bytes() == bytes);
    }

    #[test]
    fn without_its_model_a_file_is_read_as_strictly() {
        let adapter = dense_adapter();
        let bytes = adapter.to_bytes();
        let back = Adapter::of_any_model(&bytes).unwrap();
        assert_eq!((&back.values, &back.layout), (&adapter.values, &adapter.layout));
        let mut altered = bytes.clone();
        *altered.last_mut().unwrap() ^= 1;
        assert!(matches!(Adapter::of_any_model(&altered), Err(AdapterError::Altered { .. })));
        for remove in 0..4 {
            let bytes = file(metadata(), |tensors| drop(tensors.remove(remove)));
            let error = Adapter::of_any_model(&bytes).unwrap_err();
            assert!(matches!(error, AdapterError::MissingTensor { .. }), "{remove}: {error}");
        }
        // The last layer gone as a whole leaves another adapter, which the digest tells.
        let shorter = file(metadata(), |tensors| tensors.truncate(tensors.len() / 2));
        assert!(matches!(Adapter::of_any_model(&shorter), Err(AdapterError::Altered { .. })));
        let bytes = file(metadata(), |tensors| tensors[1].1.shape = vec![3, 16]);
        let error = Adapter::of_any_model(&bytes).unwrap_err();
        assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
    }

    #[test]
    fn digest_covers_tensors_rank_alpha_and_targets_but_not_the_seed() {
        let adapter = dense_adapter();
        let with = |change: &dyn Fn(&mut LoraConfig)| {
            let mut layout = (*adapter.layout).clone();
            change(&mut layout.config);
            Adapter { layout: Arc::new(layout), values: adapter.values.clone() }.digest()
        };
        assert_eq!(with(&|config| config.seed += 1), adapter.digest());
        assert_ne!(with(&|config| config.rank += 1), adapter.digest());
        assert_ne!(with(&|config| config.alpha += 1.0), adapter.digest());
        assert_ne!(with(&|config| config.targets.truncate(3)), adapter.digest());
        let mut values = adapter.values.to_vec();
        values[3] = -values[3];
        let changed = Adapter { layout: adapter.layout.clone(), values: values.into() };
        assert_ne!(changed.digest(), adapter.digest());
    }

    #[test]
    fn refuses_a_truncated_file() {
        let bytes = dense_adapter().to_bytes();
        for end in [0, 7, 100, bytes.len() - 1] {
            assert!(matches!(refusal(&bytes[..end]), AdapterError::File(_)), "{end}");
        }
    }

    #[test]
    fn refuses_trailing_bytes() {
        let mut bytes = dense_adapter().to_bytes();
        bytes.push(0);
        assert!(matches!(refusal(&bytes), AdapterError::File(_)));
    }

    #[test]
    fn refuses_an_altered_value() {
        let mut bytes = dense_adapter().to_bytes();
        let last = bytes.len() - 4;
        bytes[last] ^= 1;
        assert!(matches!(refusal(&bytes), AdapterError::Altered { .. }));
    }

    #[test]
    fn refuses_an_altered_alpha() {
        let mut metadata = metadata();
        metadata["lora"]["alpha"] = 16.0.into();
        assert!(matches!(refusal(&file(metadata, |_| {})), AdapterError::Altered { .. }));
    }

    proptest::proptest! {
        /// Whatever happens to one byte: refused, or (the seed aside, which is no part of the
        /// identity) the same adapter.
        #[test]
        fn a_changed_byte_never_changes_the_weights(at in 0usize..20_000, flip in 1u8..) {
            let adapter = dense_adapter();
            let mut bytes = adapter.to_bytes();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            if let Ok(read) = Adapter::from_bytes(&tiny_model(), &bytes) {
                assert_eq!(read.digest(), adapter.digest());
                assert_eq!(read.values, adapter.values);
            }
        }
    }

    #[test]
    fn refuses_a_file_without_our_metadata() {
        let values = [1.0];
        let tensors = [("x", Tensor { shape: vec![1], values: &values })];
        let bytes = safetensors::serialize(tensors, None).unwrap();
        assert!(matches!(refusal(&bytes), AdapterError::NoMetadata));
    }

    #[test]
    fn refuses_metadata_that_is_something_else() {
        let bytes = file(serde_json::json!({ "version": VERSION }), |_| {});
        assert!(matches!(refusal(&bytes), AdapterError::Metadata(_)));
    }

    #[test]
    fn refuses_another_version() {
        let bytes = file(serde_json::json!({ "version": 9 }), |_| {});
        assert!(matches!(refusal(&bytes), AdapterError::Version { expected: VERSION, found: 9 }));
    }

    #[test]
    fn refuses_a_config_that_the_model_cannot_carry() {
        let mut metadata = metadata();
        metadata["lora"]["rank"] = 400.into();
        assert!(matches!(refusal(&file(metadata, |_| {})), AdapterError::Config(_)));
    }

    #[test]
    fn refuses_a_missing_tensor() {
        let bytes = file(metadata(), |tensors| drop(tensors.remove(4)));
        assert!(matches!(refusal(&bytes), AdapterError::MissingTensor { name } if name.contains("v_proj")));
    }

    #[test]
    fn refuses_an_unknown_tensor() {
        let bytes = file(metadata(), |tensors| tensors[4].0.push_str(".more"));
        assert!(matches!(refusal(&bytes), AdapterError::MissingTensor { .. }));
        let bytes = file(metadata(), |tensors| {
            tensors.push(("extra".into(), Tensor { shape: vec![1], values: &[1.0] }));
        });
        assert!(matches!(refusal(&bytes), AdapterError::UnknownTensor { name } if name == "extra"));
    }

    #[test]
    fn refuses_the_shapes_of_another_model() {
        let other = ModelConfig { intermediate_size: 24, ..tiny_model() };
        let error = Adapter::from_bytes(&other, &dense_adapter().to_bytes()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight` has shape [20, 3], \
             this model needs [24, 3]"
        );
    }

    #[test]
    fn refuses_another_dtype() {
        struct Half(Vec<u8>);
        impl safetensors::View for Half {
            fn dtype(&self) -> safetensors::Dtype {
                safetensors::Dtype::F16
            }
            fn shape(&self) -> &[usize] {
                &[3, 12]
            }
            fn data(&self) -> std::borrow::Cow<'_, [u8]> {
                (&self.0).into()
            }
            fn data_len(&self) -> usize {
                self.0.len()
            }
        }
        let [name, _] = dense_adapter().layout.entries[0].tensor_names();
        let metadata = std::collections::HashMap::from([("lockstep".into(), metadata().to_string())]);
        let bytes = safetensors::serialize([(name, Half(vec![0; 72]))], Some(metadata)).unwrap();
        assert!(matches!(refusal(&bytes), AdapterError::Type { .. }));
    }

    #[test]
    fn refuses_values_that_are_no_numbers() {
        for values in [&[f32::NAN; 36], &[f32::INFINITY; 36]] {
            let bytes = file(metadata(), |tensors| tensors[0].1.values = values);
            assert!(matches!(refusal(&bytes), AdapterError::NotFinite { index: 0, .. }));
        }
    }

    #[test]
    fn peft_configuration_names_rank_alpha_and_modules() {
        let [(model, bytes), (config, json)] = dense_adapter().to_peft("org/base");
        assert_eq!((model.as_str(), config.as_str()), ("adapter_model.safetensors", "adapter_config.json"));
        assert!(bytes == dense_adapter().to_bytes());
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["peft_type"], "LORA");
        assert_eq!(json["r"], 3);
        assert_eq!(json["lora_alpha"], 32.0);
        assert_eq!(json["lora_dropout"], 0.0);
        assert_eq!(json["bias"], "none");
        assert_eq!(json["task_type"], "CAUSAL_LM");
        assert_eq!(json["base_model_name_or_path"], "org/base");
        assert_eq!(json["target_modules"].as_array().unwrap().len(), 7);
    }
}

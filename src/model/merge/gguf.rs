//! A GGUF file with an adapter added to its weights, as a Hugging Face directory.

use std::{
    borrow::Cow,
    cell::RefCell,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use half::bf16;
use safetensors::{Dtype, View};
use serde_json::{Value, json};

use super::{Delta, weight_name};
use crate::{
    kernels::WeightDtype,
    model::{
        Adapter, LoraEntry, ModelConfig, ModelError, TextCodec,
        files::ModelFiles,
        weights::{Gguf, TensorSource, Weight, hugging_face_name},
    },
};

/// Writes config.json, tokenizer.json, tokenizer_config.json and model.safetensors into the directory
/// `out`: the weights of `model` as their codes stand for, adapted ones with the adapter's part added, each
/// rounded once to `dtype`.
pub(super) fn merge(
    adapter: &Adapter,
    model: &Path,
    out: &Path,
    dtype: WeightDtype,
) -> Result<(), ModelError> {
    let ModelFiles { config, text, .. } = ModelFiles::open(model)?;
    let gguf = Gguf::open(model)?;
    super::refuse_tied_head(adapter, &config, model)?;
    for entry in &adapter.layout.entries {
        check_entry(entry, &config, model)?;
    }
    let config = ModelConfig { rope_scaling: config.rope_scaling_by_factors(), ..config };
    let Some(config_json) = config.to_hugging_face(name_of(dtype)) else {
        let problem = "has divisors of rotary frequencies that are not Llama 3's, and a config.json has no place for them";
        return Err(ModelError::unsupported(model, "rope_freqs.weight", problem));
    };
    let failure = RefCell::new(None);
    let tensors = Weight::all(&config).map(|weight| {
        let name = hugging_face_name(weight);
        let entry = adapter.layout.entries.iter().find(|entry| weight_name(entry) == name);
        let shape = weight.shape(&config);
        let of = entry.map(|entry| (adapter, entry));
        (name, Dequantised { gguf: &gguf, config: &config, weight, shape, dtype, of, failure: &failure })
    });
    let to = out.join("model.safetensors");
    let metadata = [("format".to_owned(), "pt".to_owned())];
    safetensors::serialize_to_file(tensors, Some(metadata.into_iter().collect()), &to)
        .map_err(|error| ModelError::malformed(&to, error.to_string()))?;
    if let Some(error) = failure.into_inner() {
        return Err(error);
    }
    File::open(&to).and_then(|file| file.sync_all()).map_err(|error| ModelError::unreadable(&to, &error))?;
    write(out.join("config.json"), &Value::Object(config_json).to_string())?;
    write(out.join("tokenizer.json"), text.tokenizer_json())?;
    write(out.join("tokenizer_config.json"), &tokenizer_config(&text, &config).to_string())
}

/// The adapted layer must be there, with the shape that the adapter is for.
fn check_entry(entry: &LoraEntry, config: &ModelConfig, model: &Path) -> Result<(), ModelError> {
    let (tensor, expected) = (weight_name(entry), vec![entry.out_features, entry.in_features]);
    let weight = Weight::all(config).find(|weight| hugging_face_name(*weight) == tensor);
    match weight.map(|weight| weight.shape(config)) {
        None => Err(ModelError::MissingTensor { path: model.to_owned(), tensor }),
        Some(found) if found != expected => {
            Err(ModelError::TensorShape { path: model.to_owned(), tensor, expected, found })
        }
        Some(_) => Ok(()),
    }
}

/// As transformers names it.
fn name_of(dtype: WeightDtype) -> &'static str {
    match dtype {
        WeightDtype::F32 => "float32",
        WeightDtype::Bf16 => "bfloat16",
    }
}

fn tokenizer_config(text: &TextCodec, config: &ModelConfig) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text.bos_token(),
        "eos_token": text.eos_token(),
        "chat_template": text.chat_template(),
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
    })
}

fn write(path: PathBuf, text: &str) -> Result<(), ModelError> {
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| ModelError::unreadable(&path, &error))
}

/// A weight of the file, read and merged when it is written: one at a time is in memory.
struct Dequantised<'a> {
    gguf: &'a Gguf,
    config: &'a ModelConfig,
    weight: Weight,
    shape: Vec<usize>,
    dtype: WeightDtype,
    of: Option<(&'a Adapter, &'a LoraEntry)>,
    /// What could not be read: the writer takes no error.
    failure: &'a RefCell<Option<ModelError>>,
}

impl View for Dequantised<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            WeightDtype::F32 => Dtype::F32,
            WeightDtype::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = match self.gguf.values(self.weight, self.config) {
            Ok(values) => values,
            Err(error) => {
                self.failure.borrow_mut().get_or_insert(error);
                return vec![0; self.data_len()].into();
            }
        };
        let delta = self.of.map(|(adapter, entry)| Delta::new(adapter, entry));
        let merged = values.iter().enumerate().map(|(i, base)| match &delta {
            Some(delta) => f64::from(*base) + delta.at(i),
            None => f64::from(*base),
        });
        let bytes: Vec<u8> = match self.dtype {
            WeightDtype::F32 => merged.flat_map(|value| (value as f32).to_le_bytes()).collect(),
            WeightDtype::Bf16 => merged.flat_map(|value| bf16::from_f64(value).to_le_bytes()).collect(),
        };
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }
}

//! Weights in safetensors: one file, or shards listed by an index.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};

use super::{LayerWeight, Stored, TensorSource, Weight};
use crate::model::{
    ModelConfig, ModelError,
    files::{map_file, read_json},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The safetensors files of a directory.
pub(in crate::model) struct Shards {
    directory: PathBuf,
    index: Option<Index>,
    shards: Vec<PathBuf>,
}

/// Which shard the index says that a tensor is in.
struct Index {
    path: PathBuf,
    shard_of: BTreeMap<String, PathBuf>,
}

impl Shards {
    /// Finds the files: `model.safetensors`, else what `model.safetensors.index.json` lists.
    pub fn find(directory: &Path) -> Result<Self, ModelError> {
        let single = directory.join(SINGLE);
        let index = directory.join(INDEX);
        if single.exists() {
            return Ok(Self { directory: directory.to_owned(), index: None, shards: vec![single] });
        }
        if !index.exists() {
            let file = format!("{SINGLE} and no {INDEX}");
            return Err(ModelError::MissingFile { directory: directory.to_owned(), file });
        }
        let index = Index::read(index, directory)?;
        let mut shards: Vec<PathBuf> = index.shard_of.values().cloned().collect();
        shards.sort();
        shards.dedup();
        if let Some(missing) = shards.iter().find(|shard| !shard.exists()) {
            let file = missing.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(ModelError::MissingFile { directory: directory.to_owned(), file });
        }
        Ok(Self { directory: directory.to_owned(), index: Some(index), shards })
    }

    /// The index, if there is one, and the shards.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.index.iter().map(|index| &index.path).chain(&self.shards)
    }

    /// The shards alone.
    pub fn shards(&self) -> impl Iterator<Item = &PathBuf> {
        self.shards.iter()
    }

    /// Maps the files and reads their headers.
    pub fn open(&self) -> Result<Tensors, ModelError> {
        let mut files = Vec::with_capacity(self.shards.len());
        let mut file_of = BTreeMap::new();
        for path in &self.shards {
            let map = map_file(path)?;
            let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
                .map_err(|error| ModelError::malformed(path, error.to_string()))?;
            for tensor in metadata.tensors().into_keys() {
                if file_of.insert(tensor.clone(), files.len()).is_some() {
                    return Err(ModelError::DuplicateTensor { path: path.clone(), tensor });
                }
            }
            // The header is preceded by its length, eight bytes.
            files.push(ShardFile { path: path.clone(), data_start: 8 + header_bytes, map, metadata });
        }
        let tensors = Tensors { directory: self.directory.clone(), files, file_of };
        if let Some(index) = &self.index {
            index.check(&tensors)?;
        }
        Ok(tensors)
    }
}

impl Index {
    fn read(path: PathBuf, directory: &Path) -> Result<Self, ModelError> {
        let shard_of = read_index(&path)?;
        let shard_of = shard_of.into_iter().map(|(tensor, shard)| (tensor, directory.join(shard)));
        Ok(Self { shard_of: shard_of.collect(), path })
    }

    /// Refuses shards that hold other tensors than the index says.
    fn check(&self, tensors: &Tensors) -> Result<(), ModelError> {
        for (tensor, shard) in &self.shard_of {
            if tensors.file(tensor).is_none_or(|file| file.path != *shard) {
                return Err(ModelError::MissingTensor { path: shard.clone(), tensor: tensor.clone() });
            }
        }
        Ok(())
    }
}

fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(part)) if part == name);
    plain && components.next().is_none() && !name.contains('\\')
}

/// Mapped safetensors files.
pub(in crate::model) struct Tensors {
    directory: PathBuf,
    files: Vec<ShardFile>,
    file_of: BTreeMap<String, usize>,
}

struct ShardFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

impl Tensors {
    fn file(&self, tensor: &str) -> Option<&ShardFile> {
        self.file_of.get(tensor).map(|&file| &self.files[file])
    }

    fn info(&self, tensor: &str) -> Result<(&ShardFile, &TensorInfo), ModelError> {
        let found = self.file(tensor).and_then(|file| Some((file, file.metadata.info(tensor)?)));
        found.ok_or_else(|| self.missing(tensor))
    }

    /// The file that holds a tensor, and the tensor's shape.
    pub fn place_and_shape(&self, tensor: &str) -> Result<(&Path, Vec<usize>), ModelError> {
        let (file, info) = self.info(tensor)?;
        Ok((&file.path, info.shape.clone()))
    }

    fn missing(&self, tensor: &str) -> ModelError {
        ModelError::MissingTensor { path: self.path_of(tensor).to_owned(), tensor: tensor.to_owned() }
    }
}

impl TensorSource for Tensors {
    fn name(&self, weight: Weight) -> String {
        hugging_face_name(weight)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>, ModelError> {
        let (file, info) = self.info(name)?;
        Format::of(file, name, info.dtype)?;
        Ok(info.shape.clone())
    }

    fn values(&self, weight: Weight, _: &ModelConfig) -> Result<Vec<f32>, ModelError> {
        let name = self.name(weight);
        let (file, info) = self.info(&name)?;
        let (start, end) = info.data_offsets;
        // `read_metadata` has checked that every tensor lies inside the file.
        let bytes = &file.map[file.data_start..][start..end];
        Ok(match Format::of(file, &name, info.dtype)? {
            Format::F32 => bytes.as_chunks().0.iter().map(|&le| f32::from_le_bytes(le)).collect(),
            Format::F16 => bytes.as_chunks().0.iter().map(|&le| f16::from_le_bytes(le).to_f32()).collect(),
            Format::BF16 => bytes.as_chunks().0.iter().map(|&le| bf16::from_le_bytes(le).to_f32()).collect(),
        })
    }

    fn stored(&self, weight: Weight) -> Stored {
        match self.info(&self.name(weight)) {
            Ok((_, info)) if info.dtype == Dtype::BF16 => Stored::Bf16,
            _ => Stored::F32,
        }
    }

    fn path_of(&self, name: &str) -> &Path {
        match (self.file(name), &self.files[..]) {
            (Some(file), _) => &file.path,
            (None, [only]) => &only.path,
            _ => &self.directory,
        }
    }

    fn is_ignored(&self, name: &str) -> bool {
        // Saved by old versions of transformers; recomputed from rope_theta by all.
        name.ends_with(".rotary_emb.inv_freq")
    }
}

/// The shards that an index lists, by their plain file names.
pub(crate) fn shards_of_index(path: &Path) -> Result<BTreeSet<String>, ModelError> {
    Ok(read_index(path)?.into_values().collect())
}

/// Which shard holds each tensor. An index comes from strangers: it must not reach outside its
/// directory.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    let json = read_json(path)?;
    let Some(weight_map) = json.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(ModelError::malformed(path, "`weight_map` is missing"));
    };
    let shard_of = weight_map.iter().map(|(tensor, shard)| match shard.as_str() {
        Some(name) if is_plain_file_name(name) => Ok((tensor.clone(), name.to_owned())),
        _ => {
            let problem = format!("`weight_map.{tensor}` is {shard}, no plain file name");
            Err(ModelError::malformed(path, problem))
        }
    });
    shard_of.collect()
}

/// What transformers calls a weight.
pub(in crate::model) fn hugging_face_name(weight: Weight) -> String {
    match weight {
        Weight::Embed => "model.embed_tokens.weight".to_owned(),
        Weight::FinalNorm => "model.norm.weight".to_owned(),
        Weight::Head => "lm_head.weight".to_owned(),
        Weight::Layer(layer, weight) => {
            let part = match weight {
                LayerWeight::AttnNorm => "input_layernorm.weight",
                LayerWeight::Q => "self_attn.q_proj.weight",
                LayerWeight::K => "self_attn.k_proj.weight",
                LayerWeight::V => "self_attn.v_proj.weight",
                LayerWeight::O => "self_attn.o_proj.weight",
                LayerWeight::MlpNorm => "post_attention_layernorm.weight",
                LayerWeight::Gate => "mlp.gate_proj.weight",
                LayerWeight::Up => "mlp.up_proj.weight",
                LayerWeight::Down => "mlp.down_proj.weight",
                LayerWeight::QBias => "self_attn.q_proj.bias",
                LayerWeight::KBias => "self_attn.k_proj.bias",
                LayerWeight::VBias => "self_attn.v_proj.bias",
                LayerWeight::QNorm => "self_attn.q_norm.weight",
                LayerWeight::KNorm => "self_attn.k_norm.weight",
                LayerWeight::Router => "mlp.gate.weight",
                LayerWeight::ExpertGate(expert) => &format!("mlp.experts.{expert}.gate_proj.weight"),
                LayerWeight::ExpertUp(expert) => &format!("mlp.experts.{expert}.up_proj.weight"),
                LayerWeight::ExpertDown(expert) => &format!("mlp.experts.{expert}.down_proj.weight"),
            };
            format!("model.layers.{layer}.{part}")
        }
    }
}

/// The number formats that are read.
enum Format {
    F32,
    F16,
    BF16,
}

impl Format {
    fn of(file: &ShardFile, tensor: &str, dtype: Dtype) -> Result<Self, ModelError> {
        match dtype {
            Dtype::F32 => Ok(Self::F32),
            Dtype::F16 => Ok(Self::F16),
            Dtype::BF16 => Ok(Self::BF16),
            other => Err(ModelError::TensorType {
                path: file.path.clone(),
                tensor: tensor.to_owned(),
                found: other.to_string(),
                supported: "F32, F16 and BF16",
            }),
        }
    }
}

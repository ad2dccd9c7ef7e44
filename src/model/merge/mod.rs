//! An adapter added to its model's weights, as safetensors that need no adapter any more.

mod gguf;

use std::{
    borrow::Cow,
    fs::{self, File},
    path::Path,
};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};

use super::{
    Adapter, LoraEntry, ModelConfig, ModelError, files::ModelFiles, files::map_file, weights::Shards,
};
use crate::kernels::WeightDtype;

/// Writes the model at `model` as a Hugging Face directory into the directory `out`, each adapted weight `W`
/// replaced by `W + (alpha / rank) · B A`.
///
/// The weights of a Hugging Face directory keep the types they are stored in, and its other files are
/// copied; those of a GGUF file, whose codes cannot hold a sum, are written as `dtype`, f32 if absent.
///
/// Refused: a model that isn't read here, an adapter whose layers it doesn't have, or one on a head
/// that is the embedding, too; a `dtype` for a directory.
pub fn merge_into_weights(
    adapter: &Adapter,
    model: &Path,
    out: &Path,
    dtype: Option<WeightDtype>,
) -> Result<(), ModelError> {
    if !model.is_dir() {
        return gguf::merge(adapter, model, out, dtype.unwrap_or_default());
    }
    if dtype.is_some() {
        let problem = "is for GGUF files: a directory's weights keep the types they are stored in";
        return Err(ModelError::unsupported(model, "dtype", problem));
    }
    // Whatever is wrong with the model is said before anything is written.
    let files = ModelFiles::open(model)?;
    refuse_tied_head(adapter, &files.config, model)?;
    let shards = Shards::find(model)?;
    check_shapes(adapter, &shards)?;
    let weights: Vec<&Path> = shards.shards().map(|path| path.as_path()).collect();
    for path in files.paths().filter(|path| !weights.contains(&path.as_path())) {
        copy(path, out)?;
    }
    for path in weights {
        merge_shard(adapter, path, out)?;
    }
    Ok(())
}

fn refuse_tied_head(adapter: &Adapter, config: &ModelConfig, model: &Path) -> Result<(), ModelError> {
    if config.tie_word_embeddings && adapter.layout.head().is_some() {
        let problem = "is true, and the adapter has a part on `lm_head`: added to it, it would change the embedding, \
                       too; give the model a head of its own, or serve the adapter beside the model";
        return Err(ModelError::unsupported(model, "tie_word_embeddings", problem));
    }
    Ok(())
}

/// Every adapted layer must be there, with the shape that the adapter is for.
fn check_shapes(adapter: &Adapter, shards: &Shards) -> Result<(), ModelError> {
    let tensors = shards.open()?;
    for entry in &adapter.layout.entries {
        let (tensor, expected) = (weight_name(entry), vec![entry.out_features, entry.in_features]);
        let (path, found) = tensors.place_and_shape(&tensor)?;
        if found != expected {
            let path = path.to_owned();
            return Err(ModelError::TensorShape { path, tensor, expected, found });
        }
    }
    Ok(())
}

fn copy(path: &Path, out: &Path) -> Result<(), ModelError> {
    let to = out.join(path.file_name().unwrap_or_default());
    let copied = fs::copy(path, &to).and_then(|_| File::open(&to)?.sync_all());
    copied.map_err(|error| ModelError::unreadable(path, &error))
}

fn merge_shard(adapter: &Adapter, path: &Path, out: &Path) -> Result<(), ModelError> {
    let malformed = |error: safetensors::SafeTensorError| ModelError::malformed(path, error.to_string());
    let map = map_file(path)?;
    let (_, header) = SafeTensors::read_metadata(&map).map_err(malformed)?;
    let tensors = SafeTensors::deserialize(&map).map_err(malformed)?;
    let merged = tensors.tensors().into_iter().map(|(name, base)| {
        let entry = adapter.layout.entries.iter().find(|entry| weight_name(entry) == name);
        (name, Merged { base, of: entry.map(|entry| (adapter, entry)) })
    });
    let to = out.join(path.file_name().unwrap_or_default());
    safetensors::serialize_to_file(merged, header.metadata().clone(), &to).map_err(malformed)?;
    let synced = File::open(&to).and_then(|file| file.sync_all());
    synced.map_err(|error| ModelError::unreadable(&to, &error))
}

fn weight_name(entry: &LoraEntry) -> String {
    format!("{}.weight", entry.module_name())
}

/// A tensor of the model, computed when it is written: one at a time is in memory.
struct Merged<'a> {
    base: TensorView<'a>,
    of: Option<(&'a Adapter, &'a LoraEntry)>,
}

impl View for Merged<'_> {
    fn dtype(&self) -> Dtype {
        self.base.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.base.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.base.data();
        let Some((adapter, entry)) = self.of else { return bytes.into() };
        let delta = Delta::new(adapter, entry);
        // `check_shapes` has read the type with `ModelFiles::open`: one of these three.
        match self.base.dtype() {
            Dtype::F16 => map_values(bytes, |i, le| {
                f16::from_f64(f16::from_le_bytes(le).to_f64() + delta.at(i)).to_le_bytes()
            }),
            Dtype::BF16 => map_values(bytes, |i, le| {
                bf16::from_f64(bf16::from_le_bytes(le).to_f64() + delta.at(i)).to_le_bytes()
            }),
            _ => map_values(bytes, |i, le| {
                ((f64::from(f32::from_le_bytes(le)) + delta.at(i)) as f32).to_le_bytes()
            }),
        }
        .into()
    }

    fn data_len(&self) -> usize {
        self.base.data().len()
    }
}

fn map_values<const N: usize>(bytes: &[u8], value: impl Fn(usize, [u8; N]) -> [u8; N]) -> Vec<u8> {
    let values = bytes.as_chunks().0.iter().enumerate();
    values.flat_map(|(i, le)| value(i, *le)).collect()
}

/// `(alpha / rank) · B A`, row-major `[out, in]`.
struct Delta {
    in_features: usize,
    rows: Vec<Vec<f64>>,
}

impl Delta {
    fn new(adapter: &Adapter, entry: &LoraEntry) -> Self {
        let rank = adapter.layout.config.rank as usize;
        let (a, b) = (&adapter.values[entry.a.clone()], &adapter.values[entry.b.clone()]);
        // As in the forward, the scale is an f32.
        let scale = f64::from(adapter.layout.scale());
        let row = |b: &[f32]| {
            let mut row = vec![0.0; entry.in_features];
            for (b, a) in b.iter().zip(a.chunks_exact(entry.in_features)) {
                row.iter_mut().zip(a).for_each(|(sum, a)| *sum += f64::from(*b) * f64::from(*a));
            }
            row.iter_mut().for_each(|sum| *sum *= scale);
            row
        };
        Self { in_features: entry.in_features, rows: b.chunks_exact(rank).map(row).collect() }
    }

    fn at(&self, i: usize) -> f64 {
        self.rows[i / self.in_features][i % self.in_features]
    }
}

//! Safetensors files of ours: written canonically, read with suspicion.
//!
//! A file holds float32 tensors and one metadata entry, [`METADATA_KEY`], whose value is JSON
//! that begins with a version. One entry only: the format's library writes several in an order
//! that changes from run to run, and equal content must be equal bytes.

use std::{borrow::Cow, collections::HashMap};

use safetensors::{Dtype, SafeTensorError, SafeTensors, View, tensor::TensorView};
use serde::de::DeserializeOwned;

use crate::{
    model::param_vector::little_endian,
    types::{Digest, InvalidInput},
};

/// Bytes that are no adapter or state of this model.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Truncated, trailed by something, or no safetensors at all.
    #[error("not a whole safetensors file: {0}")]
    File(#[from] SafeTensorError),
    /// Somebody else's safetensors file.
    #[error("the file's metadata has no `lockstep` entry: it was not written by Lockstep")]
    NoMetadata,
    /// The metadata is not what this version writes.
    #[error("the file's `lockstep` metadata can't be read: {0}")]
    Metadata(serde_json::Error),
    /// Written by another version.
    #[error("the file has format version {found}, this build reads {expected}")]
    Version { expected: u32, found: u32 },
    /// The adapter can't be put on this model.
    #[error("the file's adapter does not fit this model: {0}")]
    Config(#[from] InvalidInput),
    #[error("tensor `{name}` is missing")]
    MissingTensor { name: String },
    #[error("tensor `{name}` has no place in this file")]
    UnknownTensor { name: String },
    #[error("tensor `{name}` has shape {found:?}, this model needs {expected:?}")]
    Shape { name: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("tensor `{name}` is {found:?}, which is not read here")]
    Type { name: String, found: Dtype },
    #[error("tensor `{name}` holds {value} at index {index}")]
    NotFinite { name: String, index: usize, value: f32 },
    /// The counts contradict each other.
    #[error("the file's counts contradict each other: {0}")]
    Inconsistent(&'static str),
    /// A PEFT configuration that asks for another computation than Lockstep's.
    #[error("`adapter_config.json`: `{field}` {problem}")]
    Peft { field: String, problem: String },
    /// The content was changed after it was written.
    #[error("the file was altered: its content has digest {found}, it was written with {expected}")]
    Altered { expected: Digest, found: Digest },
}

/// The one metadata entry of a file.
const METADATA_KEY: &str = "lockstep";

/// A float32 tensor to be written.
pub(in crate::model) struct Tensor<'a> {
    pub shape: Vec<usize>,
    pub values: &'a [f32],
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(little_endian(self.values))
    }

    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

/// Writes `tensors` (the file orders them by name) and `metadata`.
pub(in crate::model) fn write<M: serde::Serialize>(
    tensors: Vec<(String, Tensor<'_>)>,
    metadata: &M,
) -> Vec<u8> {
    // A struct of numbers, strings and lists always has a JSON form.
    let metadata = serde_json::to_string(metadata).expect("metadata is plain data");
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), metadata)]);
    // Fails only if a shape contradicts its data, which a layout rules out, or if the header
    // passes 100 MB, some hundred thousand tensors.
    safetensors::serialize(tensors, Some(metadata)).expect("shapes follow the layout")
}

/// A file that was read, not yet believed.
pub(in crate::model) struct Reader<'a> {
    file: SafeTensors<'a>,
    /// Of [`METADATA_KEY`].
    metadata: Option<String>,
}

impl<'a> Reader<'a> {
    pub(in crate::model) fn new(bytes: &'a [u8]) -> Result<Self, AdapterError> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let metadata = header.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY).cloned());
        Ok(Self { file: SafeTensors::deserialize(bytes)?, metadata })
    }

    /// The metadata, if its `version` is the `expected` one.
    pub(in crate::model) fn metadata<M: DeserializeOwned>(&self, expected: u32) -> Result<M, AdapterError> {
        #[derive(serde::Deserialize)]
        struct Versioned {
            version: u32,
        }
        let metadata = self.metadata.as_ref().ok_or(AdapterError::NoMetadata)?;
        let Versioned { version } = serde_json::from_str(metadata).map_err(AdapterError::Metadata)?;
        if version != expected {
            return Err(AdapterError::Version { expected, found: version });
        }
        serde_json::from_str(metadata).map_err(AdapterError::Metadata)
    }

    /// Refuses tensors whose name `is_known` does not know.
    pub(in crate::model) fn refuse_unknown(
        &self,
        is_known: impl Fn(&str) -> bool,
    ) -> Result<(), AdapterError> {
        // The least of them, so that the message does not depend on a hash map's order.
        match self.file.names().into_iter().filter(|name| !is_known(name)).min() {
            Some(name) => Err(AdapterError::UnknownTensor { name: name.to_owned() }),
            None => Ok(()),
        }
    }

    pub(in crate::model) fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_ok()
    }

    pub(in crate::model) fn shape(&self, name: &str) -> Result<Vec<usize>, AdapterError> {
        self.file.tensor(name).map(|tensor| tensor.shape().to_vec()).map_err(|_| missing(name))
    }

    /// Appends the values of a float32 tensor of exactly this shape to `values`.
    pub(in crate::model) fn read(
        &self,
        name: &str,
        shape: &[usize],
        values: &mut Vec<f32>,
    ) -> Result<(), AdapterError> {
        let tensor = self.tensor(name, shape)?;
        if tensor.dtype() != Dtype::F32 {
            return Err(AdapterError::Type { name: name.to_owned(), found: tensor.dtype() });
        }
        let (words, _) = tensor.data().as_chunks::<4>();
        values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        Ok(())
    }

    /// [`Reader::read`] of a float32, float16 or bfloat16 tensor, which f32 all hold exactly.
    pub(in crate::model) fn read_widened(
        &self,
        name: &str,
        shape: &[usize],
        values: &mut Vec<f32>,
    ) -> Result<(), AdapterError> {
        let tensor = self.tensor(name, shape)?;
        let (halves, _) = tensor.data().as_chunks::<2>();
        match tensor.dtype() {
            Dtype::F16 => values.extend(halves.iter().map(|half| half::f16::from_le_bytes(*half).to_f32())),
            Dtype::BF16 => values.extend(halves.iter().map(|half| half::bf16::from_le_bytes(*half).to_f32())),
            _ => self.read(name, shape, values)?,
        }
        Ok(())
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, AdapterError> {
        let tensor = self.file.tensor(name).map_err(|_| missing(name))?;
        if tensor.shape() != shape {
            let (expected, found) = (shape.to_vec(), tensor.shape().to_vec());
            return Err(AdapterError::Shape { name: name.to_owned(), expected, found });
        }
        Ok(tensor)
    }

    /// [`Reader::read`], refusing NaN and infinities.
    pub(in crate::model) fn read_finite(
        &self,
        name: &str,
        shape: &[usize],
        values: &mut Vec<f32>,
    ) -> Result<(), AdapterError> {
        let start = values.len();
        self.read(name, shape, values)?;
        refuse_infinite(name, &values[start..])
    }
}

/// Refuses NaN and infinities.
pub(super) fn refuse_infinite(name: &str, values: &[f32]) -> Result<(), AdapterError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(AdapterError::NotFinite { name: name.to_owned(), index, value: values[index] }),
        None => Ok(()),
    }
}

fn missing(name: &str) -> AdapterError {
    AdapterError::MissingTensor { name: name.to_owned() }
}

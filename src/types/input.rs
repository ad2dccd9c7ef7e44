use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::TensorData;

/// A run of token ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodedTextChunk {
    /// Token ids of the model's vocabulary.
    pub tokens: Vec<u32>,
}

/// Encoding of an image's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    Png,
    Jpeg,
}

/// An image inside a prompt. It stands for `expected_tokens` positions of the sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageChunk {
    /// The encoded image; base64 on the wire.
    pub data: Vec<u8>,
    /// How `data` is encoded.
    pub format: ImageFormat,
    /// Positions that the image takes; loss inputs are indexed over them with weight 0.
    pub expected_tokens: u32,
}

/// One piece of a [`ModelInput`], tagged `type` on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ModelInputChunk {
    EncodedText(EncodedTextChunk),
    Image(ImageChunk),
}

/// A tokenised prompt: the concatenation of its chunks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelInput {
    pub chunks: Vec<ModelInputChunk>,
}

/// One training example: a sequence, and the inputs of the loss function by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Datum {
    /// The sequence of N positions.
    pub model_input: ModelInput,
    /// Inputs of the loss, each of shape `[N]` (or as the loss says); see [`super::LossFn`].
    #[serde(default)]
    pub loss_fn_inputs: BTreeMap<String, TensorData>,
}

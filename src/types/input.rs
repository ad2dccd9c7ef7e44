use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{InvalidInput, TensorData};

/// A run of token ids.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EncodedTextChunk {
    /// Token ids of the model's vocabulary.
    pub tokens: Vec<u32>,
}

/// Encoding of an image's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// Portable Network Graphics.
    Png,
    /// JPEG.
    Jpeg,
}

/// An image inside a prompt. It stands for `expected_tokens` positions of the sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageChunk {
    /// The encoded image; base64 (standard alphabet, padded) in JSON.
    #[serde(with = "base64_text")]
    pub data: Vec<u8>,
    /// How `data` is encoded.
    pub format: ImageFormat,
    /// Positions that the image takes; loss inputs are indexed over them with weight 0.
    pub expected_tokens: u32,
}

/// One piece of a [`ModelInput`], tagged `type` in JSON (`encoded_text`, `image`). An unknown tag
/// is refused by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ModelInputChunk {
    /// Token ids.
    EncodedText(EncodedTextChunk),
    /// An image, for a model with vision.
    Image(ImageChunk),
}

impl ModelInputChunk {
    /// Positions of the sequence that it takes.
    pub fn length(&self) -> usize {
        match self {
            Self::EncodedText(text) => text.tokens.len(),
            Self::Image(image) => image.expected_tokens as usize,
        }
    }
}

/// A tokenised prompt: the concatenation of its chunks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelInput {
    /// The pieces, in order.
    pub chunks: Vec<ModelInputChunk>,
}

impl ModelInput {
    /// A prompt of nothing.
    pub fn empty() -> Self {
        Self::default()
    }

    /// A prompt of text alone.
    pub fn from_ints(tokens: Vec<u32>) -> Self {
        Self { chunks: vec![ModelInputChunk::EncodedText(EncodedTextChunk { tokens })] }
    }

    /// Adds a chunk at the end.
    pub fn append(&mut self, chunk: ModelInputChunk) {
        self.chunks.push(chunk);
    }

    /// Adds one token at the end: to the last chunk if that is text.
    pub fn append_int(&mut self, token: u32) {
        match self.chunks.last_mut() {
            Some(ModelInputChunk::EncodedText(text)) => text.tokens.push(token),
            _ => self.append(ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![token] })),
        }
    }

    /// The token ids of a prompt of text; refused if there is an image in it.
    pub fn to_ints(&self) -> Result<Vec<u32>, InvalidInput> {
        let mut tokens = Vec::with_capacity(self.length());
        for (i, chunk) in self.chunks.iter().enumerate() {
            match chunk {
                ModelInputChunk::EncodedText(text) => tokens.extend_from_slice(&text.tokens),
                ModelInputChunk::Image(_) => {
                    return Err(InvalidInput::new(
                        format!("chunks[{i}]"),
                        "is an image, which has no token ids; only text was expected",
                    ));
                }
            }
        }
        Ok(tokens)
    }

    /// Positions of the whole sequence.
    pub fn length(&self) -> usize {
        self.chunks.iter().map(ModelInputChunk::length).sum()
    }
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

// serde's own reading of a tagged enum copies every token into a 32-byte intermediate value
// first; a body of 24 MiB would take 200. This reads the fields of both variants as they come.
impl<'de> Deserialize<'de> for ModelInputChunk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Tag {
            EncodedText,
            Image,
        }

        #[derive(Deserialize)]
        struct Base64(#[serde(with = "base64_text")] Vec<u8>);

        #[derive(Deserialize)]
        #[serde(rename = "ModelInputChunk")]
        struct Fields {
            r#type: Tag,
            tokens: Option<Vec<u32>>,
            data: Option<Base64>,
            format: Option<ImageFormat>,
            expected_tokens: Option<u32>,
        }

        let fields = Fields::deserialize(deserializer)?;
        let missing = D::Error::missing_field;
        match fields.r#type {
            Tag::EncodedText => Ok(Self::EncodedText(EncodedTextChunk {
                tokens: fields.tokens.ok_or_else(|| missing("tokens"))?,
            })),
            Tag::Image => Ok(Self::Image(ImageChunk {
                data: fields.data.ok_or_else(|| missing("data"))?.0,
                format: fields.format.ok_or_else(|| missing("format"))?,
                expected_tokens: fields.expected_tokens.ok_or_else(|| missing("expected_tokens"))?,
            })),
        }
    }
}

/// Bytes as base64 in a string.
mod base64_text {
    use super::*;

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64.decode(text).map_err(|e| D::Error::custom(format!("no base64: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn image() -> ModelInputChunk {
        ModelInputChunk::Image(ImageChunk {
            data: vec![0xff, 0xd8, 0],
            format: ImageFormat::Jpeg,
            expected_tokens: 5,
        })
    }

    fn refused(chunk: serde_json::Value) -> String {
        serde_json::from_value::<ModelInput>(json!({"chunks": [chunk]})).unwrap_err().to_string()
    }

    #[test]
    fn a_prompt_is_the_concatenation_of_its_chunks() {
        let mut prompt = ModelInput::from_ints(vec![1, 2]);
        prompt.append(ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![3] }));
        prompt.append_int(4);
        assert_eq!(prompt.chunks.len(), 2);
        assert_eq!(prompt.to_ints().unwrap(), [1, 2, 3, 4]);
        assert_eq!(prompt.length(), 4);
    }

    #[test]
    fn a_token_after_an_image_starts_a_chunk() {
        let mut prompt = ModelInput::empty();
        assert_eq!((prompt.length(), prompt.to_ints().unwrap()), (0, vec![]));
        prompt.append(image());
        prompt.append_int(9);
        assert_eq!((prompt.chunks.len(), prompt.length()), (2, 6));
    }

    #[test]
    fn the_tokens_of_an_image_are_refused_by_its_place() {
        let mut prompt = ModelInput::from_ints(vec![1]);
        prompt.append(image());
        assert_eq!(prompt.to_ints().unwrap_err().field, "chunks[1]");
    }

    #[test]
    fn chunks_are_tagged_and_images_are_base64() {
        let mut prompt = ModelInput::from_ints(vec![1, 2]);
        prompt.append(image());
        let written = json!({"chunks": [
            {"type": "encoded_text", "tokens": [1, 2]},
            {"type": "image", "data": "/9gA", "format": "jpeg", "expected_tokens": 5},
        ]});
        assert_eq!(serde_json::to_value(&prompt).unwrap(), written);
        assert_eq!(serde_json::from_value::<ModelInput>(written).unwrap(), prompt);
    }

    #[test]
    fn an_unknown_tag_is_refused_by_name() {
        let message = refused(json!({"type": "audio", "samples": [1]}));
        assert!(message.contains("audio") && message.contains("encoded_text"), "{message}");
    }

    #[test]
    fn a_chunk_without_its_tag_or_a_field_is_refused() {
        for (chunk, missing) in [
            (json!({"tokens": [1]}), "type"),
            (json!({"type": "encoded_text"}), "tokens"),
            (json!({"type": "image", "data": "", "format": "png"}), "expected_tokens"),
            (json!({"type": "image", "data": "", "expected_tokens": 1}), "format"),
            (json!({"type": "image", "format": "png", "expected_tokens": 1}), "data"),
        ] {
            assert!(refused(chunk).contains(&format!("missing field `{missing}`")));
        }
    }

    #[test]
    fn what_is_no_base64_is_refused() {
        let message = refused(json!({"type": "image", "data": "/9g", "format": "png", "expected_tokens": 1}));
        assert!(message.contains("base64"), "{message}");
    }

    #[test]
    fn an_unknown_image_format_is_refused_by_name() {
        let message = refused(json!({"type": "image", "data": "", "format": "gif", "expected_tokens": 1}));
        assert!(message.contains("gif"), "{message}");
    }

    #[test]
    fn a_negative_token_is_refused() {
        assert!(refused(json!({"type": "encoded_text", "tokens": [-1]})).contains("-1"));
    }

    #[test]
    fn a_datum_may_come_without_loss_inputs() {
        let datum: Datum = serde_json::from_value(json!({"model_input": {"chunks": []}})).unwrap();
        assert!(datum.loss_fn_inputs.is_empty());
    }
}

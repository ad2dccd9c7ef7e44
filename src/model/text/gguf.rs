//! A tokenizer out of GGUF metadata, as the tokenizer.json that it was made from.
//!
//! GGUF keeps vocabulary and merges, but of the pre-tokenizer only a name
//! (`tokenizer.ggml.pre`); what the name means stands in llama.cpp's llama-vocab.cpp. Guessing
//! gives ids that are almost right, so a name that isn't known here is refused.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::TextCodec;
use crate::model::{
    ModelError,
    weights::{Header, Value},
};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Values of [`TYPES`] (`llama_token_type`).
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Llama 3's split, from its tokenizer.json.
const LLAMA_3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen2's split, from its tokenizer.json: Llama 3's, but each digit by itself.
const QWEN_2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The pre-tokenizers whose meaning is known.
#[derive(Clone, Copy)]
enum PreTokenizer {
    /// Each digit by itself, then GPT-2's split.
    SmolLm,
    Gpt2,
    Llama3,
    /// Of Qwen2, 2.5 and 3, whose texts are brought to Unicode's form C first.
    Qwen2,
}

impl TextCodec {
    /// Tokenizer, special tokens and chat template of a GGUF file.
    pub(in crate::model) fn from_gguf(path: &Path, header: &Header) -> Result<Self, ModelError> {
        let metadata = Metadata { path, header };
        let tokens = metadata.texts(TOKENS)?;
        let json = tokenizer_json(&metadata, tokens)?.to_string();
        let template = match metadata.get("tokenizer.chat_template") {
            Some(Value::Text(template)) => Some(template.clone()),
            _ => None,
        };
        let special = |key| Ok(metadata.token(key, tokens)?.map(|(_, text)| text.to_owned()));
        let bos = special("tokenizer.ggml.bos_token_id")?;
        let eos = special("tokenizer.ggml.eos_token_id")?;
        Ok(Self::new(&json, template)?.with_special_tokens(bos, eos))
    }
}

fn tokenizer_json(metadata: &Metadata, tokens: &[String]) -> Result<Json, ModelError> {
    metadata.require_text(MODEL, "gpt2", "the byte-level BPE called gpt2")?;
    if metadata.get("tokenizer.ggml.add_space_prefix") == Some(&Value::Bool(true)) {
        let problem = "is true, which byte-level BPE doesn't do";
        return Err(ModelError::unsupported(metadata.path, "tokenizer.ggml.add_space_prefix", problem));
    }
    let pre = metadata.pre_tokenizer()?;
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(metadata, tokens)?,
        "normalizer": pre.normalizer(),
        "pre_tokenizer": pre.json(),
        "post_processor": post_processor(metadata, tokens)?,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            // Llama 3 takes a whole word that is in the vocabulary before it looks at merges.
            "ignore_merges": matches!(pre, PreTokenizer::Llama3),
            "vocab": vocabulary(metadata, tokens)?,
            "merges": merges(metadata)?,
        },
    }))
}

impl PreTokenizer {
    /// llama.cpp leaves texts as they are; the reference is the tokenizer that trained the model.
    fn normalizer(self) -> Json {
        match self {
            Self::Qwen2 => json!({ "type": "NFC" }),
            Self::SmolLm | Self::Gpt2 | Self::Llama3 => Json::Null,
        }
    }

    fn json(self) -> Json {
        let byte_level = |split: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": split,
            })
        };
        let split = |regex: &str| {
            json!({
                "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false,
            })
        };
        let first = match self {
            Self::Gpt2 => return byte_level(true),
            Self::SmolLm => json!({ "type": "Digits", "individual_digits": true }),
            Self::Llama3 => split(LLAMA_3_SPLIT),
            Self::Qwen2 => split(QWEN_2_SPLIT),
        };
        // A split of the model's own stands in the place of GPT-2's.
        let second = byte_level(matches!(self, Self::SmolLm));
        json!({ "type": "Sequence", "pretokenizers": [first, second] })
    }
}

fn vocabulary(metadata: &Metadata, tokens: &[String]) -> Result<Map<String, Json>, ModelError> {
    let mut vocabulary = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = vocabulary.insert(token.clone(), id.into()) {
            let problem = format!("has {token:?} twice, as {first} and {id}");
            return Err(ModelError::invalid_field(metadata.path, TOKENS, problem));
        }
    }
    Ok(vocabulary)
}

fn merges(metadata: &Metadata) -> Result<Vec<[String; 2]>, ModelError> {
    let split = |merge: &String| {
        // A token may begin with a blank: the separator is the first one after it.
        let start = merge.chars().next()?.len_utf8();
        let (left, right) = merge[start..].split_once(' ')?;
        Some([format!("{}{left}", &merge[..start]), right.to_owned()])
    };
    let pair = |merge: &String| {
        let wrong = || ModelError::invalid_field(metadata.path, MERGES, format!("has {merge:?}, no pair"));
        split(merge).ok_or_else(wrong)
    };
    metadata.texts(MERGES)?.iter().map(pair).collect()
}

/// Control tokens as special ones, user-defined tokens as plain added ones; both are found in a
/// text before it is split.
fn added_tokens(metadata: &Metadata, tokens: &[String]) -> Result<Vec<Json>, ModelError> {
    let types = match metadata.get(TYPES) {
        None => return Ok(Vec::new()),
        Some(Value::Integers(types)) if types.len() == tokens.len() => types,
        Some(_) => {
            let problem = format!("must be a list of {} whole numbers, one a token", tokens.len());
            return Err(ModelError::invalid_field(metadata.path, TYPES, problem));
        }
    };
    let added = tokens.iter().zip(types).enumerate().filter_map(|(id, (content, &kind))| {
        let special = match kind {
            UNKNOWN | CONTROL => true,
            USER_DEFINED => false,
            _ => return None,
        };
        Some(json!({
            "id": id, "content": content, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }))
    });
    Ok(added.collect())
}

/// The first token that users of the tokenizer expect before a text, if the model wants one.
fn post_processor(metadata: &Metadata, tokens: &[String]) -> Result<Json, ModelError> {
    if metadata.get("tokenizer.ggml.add_bos_token") != Some(&Value::Bool(true)) {
        return Ok(Json::Null);
    }
    let Some((id, token)) = metadata.token("tokenizer.ggml.bos_token_id", tokens)? else {
        return Ok(Json::Null);
    };
    let (bos, a, b) = (
        |sequence: u32| json!({ "SpecialToken": { "id": token, "type_id": sequence } }),
        json!({ "Sequence": { "id": "A", "type_id": 0 } }),
        json!({ "Sequence": { "id": "B", "type_id": 1 } }),
    );
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [bos(0), a],
        "pair": [bos(0), a, bos(1), b],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    }))
}

/// The metadata and where it was read.
struct Metadata<'a> {
    path: &'a Path,
    header: &'a Header,
}

impl Metadata<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    fn texts(&self, key: &str) -> Result<&[String], ModelError> {
        match self.get(key) {
            Some(Value::Texts(texts)) => Ok(texts),
            Some(_) => Err(ModelError::invalid_field(self.path, key, "is no list of texts")),
            None => Err(ModelError::invalid_field(self.path, key, "is missing")),
        }
    }

    fn require_text(&self, key: &str, text: &str, supported: &str) -> Result<(), ModelError> {
        match self.get(key) {
            Some(Value::Text(found)) if found == text => Ok(()),
            Some(found) => {
                let problem = format!("is {found}; Lockstep reads {supported} only");
                Err(ModelError::unsupported(self.path, key, problem))
            }
            None => Err(ModelError::invalid_field(self.path, key, "is missing")),
        }
    }

    fn pre_tokenizer(&self) -> Result<PreTokenizer, ModelError> {
        const SUPPORTED: &str = "smollm, gpt-2, llama-bpe and qwen2";
        match self.get(PRE) {
            Some(Value::Text(name)) => match name.as_str() {
                "smollm" => Ok(PreTokenizer::SmolLm),
                "gpt-2" => Ok(PreTokenizer::Gpt2),
                "llama-bpe" | "llama3" | "llama-v3" => Ok(PreTokenizer::Llama3),
                "qwen2" => Ok(PreTokenizer::Qwen2),
                other => {
                    let problem = format!("is \"{other}\"; Lockstep knows {SUPPORTED}");
                    Err(ModelError::unsupported(self.path, PRE, problem))
                }
            },
            _ => Err(ModelError::unsupported(
                self.path,
                PRE,
                format!("is missing; Lockstep knows {SUPPORTED}"),
            )),
        }
    }

    /// The token that `key` names by its id.
    fn token<'t>(&self, key: &str, tokens: &'t [String]) -> Result<Option<(usize, &'t str)>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = value.integer().and_then(|id| usize::try_from(id).ok());
        let found = id.and_then(|id| Some((id, tokens.get(id)?.as_str())));
        let wrong = || ModelError::invalid_field(self.path, key, format!("is {value}, no id of a token"));
        found.map(Some).ok_or_else(wrong)
    }
}

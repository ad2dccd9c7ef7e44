//! A directory as hubs hold it: config.json, tokenizer.json, safetensors, and what else
//! transformers would read of it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value};

use super::{Form, ModelFiles, read_json, read_text};
use crate::model::{
    ModelConfig, ModelError, TextCodec,
    weights::{self, Shards},
};

pub(super) fn open(directory: &Path) -> Result<ModelFiles, ModelError> {
    let config_path = required(directory, "config.json")?;
    let generation_path = optional(directory, "generation_config.json");
    let tokenizer_path = required(directory, "tokenizer.json")?;
    let tokenizer_config_path = optional(directory, "tokenizer_config.json");
    let template_path = optional(directory, "chat_template.jinja");
    let shards = Shards::find(directory)?;

    let read_optional = |path: &Option<PathBuf>| path.as_deref().map(read_json).transpose();
    let tokenizer_config = read_optional(&tokenizer_config_path)?.unwrap_or_default();
    let template = match &template_path {
        Some(path) => Some(read_text(path)?),
        None => template_in(&tokenizer_config),
    };
    let [bos, eos] = ["bos_token", "eos_token"].map(|field| special_token(&tokenizer_config, field));
    let text = TextCodec::new(&read_text(&tokenizer_path)?, template)?.with_special_tokens(bos, eos.clone());
    let eos_id = eos.and_then(|eos| text.token_id(&eos));
    let config = ModelConfig::from_hugging_face(
        &config_path,
        &read_json(&config_path)?,
        read_optional(&generation_path)?.as_ref(),
        eos_id,
    )?;
    text.check_vocabulary(config.vocab_size)?;
    weights::check(&config, &shards.open()?)?;

    let mut files = vec![config_path, tokenizer_path];
    files.extend([generation_path, tokenizer_config_path, template_path].into_iter().flatten());
    files.extend(shards.files().cloned());
    files.sort();
    Ok(ModelFiles { config, text: Arc::new(text), files, form: Form::HuggingFace(shards) })
}

fn required(directory: &Path, file: &str) -> Result<PathBuf, ModelError> {
    optional(directory, file)
        .ok_or_else(|| ModelError::MissingFile { directory: directory.to_owned(), file: file.to_owned() })
}

fn optional(directory: &Path, file: &str) -> Option<PathBuf> {
    Some(directory.join(file)).filter(|path| path.exists())
}

/// A chat template inside tokenizer_config.json: one text, or a list of named ones of which
/// `default` counts.
fn template_in(tokenizer_config: &Map<String, Value>) -> Option<String> {
    match tokenizer_config.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// A special token's text, written plainly or as an `AddedToken` object.
fn special_token(tokenizer_config: &Map<String, Value>, field: &str) -> Option<String> {
    let token = tokenizer_config.get(field)?;
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

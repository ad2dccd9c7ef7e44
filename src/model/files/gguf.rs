//! One GGUF file: configuration, tokenizer, chat template and weights in one.

use std::{path::Path, sync::Arc};

use super::{Form, ModelFiles};
use crate::model::{
    ModelConfig, ModelError, TextCodec,
    weights::{self, Gguf},
};

pub(super) fn open(path: &Path) -> Result<ModelFiles, ModelError> {
    let gguf = Gguf::open(path)?;
    let config = ModelConfig::from_gguf(path, &gguf.header, gguf.rope_divisors()?)?;
    weights::check(&config, &gguf)?;
    let text = TextCodec::from_gguf(path, &gguf.header)?;
    text.check_vocabulary(config.vocab_size)?;
    let files = vec![path.to_owned()];
    Ok(ModelFiles { config, text: Arc::new(text), files, form: Form::Gguf(path.to_owned()) })
}

use std::{path::PathBuf, sync::Arc};

use crate::types::Digest;

use super::{BaseModel, ModelConfig, ModelError};

/// A model on disk under the name it is served by.
#[derive(Debug, Clone)]
pub struct ModelSource {
    pub name: String,
    pub aliases: Vec<String>,
    /// A Hugging Face directory or a GGUF file.
    pub path: PathBuf,
}

/// The base models of a process: each is loaded once, when first asked for, and shared.
pub struct Library {}

impl Library {
    /// Reads each model's configuration and digest, not its weights.
    pub fn open(sources: Vec<ModelSource>) -> Result<Self, ModelError> {
        let _ = sources;
        todo!()
    }

    /// Names offered, with their sources, configurations and digests.
    pub fn offers(&self) -> Vec<(ModelSource, ModelConfig, Digest)> {
        todo!()
    }

    /// The model of this name or alias; loads it (blocking, seconds) when nobody has yet.
    pub fn load(&self, name: &str) -> Result<Arc<BaseModel>, ModelError> {
        let _ = name;
        todo!()
    }
}

use serde::{Deserialize, Serialize};

/// A base model that can be trained and sampled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupportedModel {
    /// The name its users' tokenizers know, `ORG/NAME`.
    pub model_name: String,
    /// Most positions of a sequence.
    pub max_context_length: Option<u32>,
    /// Device classes that can serve it; `cpu` is one.
    pub devices: Vec<String>,
}

/// What a service offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerCapabilities {
    /// By name.
    pub supported_models: Vec<SupportedModel>,
}

use serde::{Deserialize, Serialize};

/// Where a run's training metrics are streamed on Weights & Biases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WandbConfig {
    /// Project name; not empty.
    pub project: String,
    /// Name of the run there; W&B picks one when absent.
    #[serde(default)]
    pub name: Option<String>,
}

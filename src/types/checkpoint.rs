use serde::{Deserialize, Serialize};

use super::{CheckpointId, RunId};

/// What a checkpoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointTarget {
    /// Adapter, optimiser moments and step: to go on training.
    Trainer,
    /// The adapter alone, in PEFT layout: to sample from.
    Sampler,
}

/// Metadata of a saved checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub id: CheckpointId,
    pub run_id: RunId,
    /// The name it was saved under.
    pub checkpoint_id: String,
    /// Always `lora`.
    pub checkpoint_type: String,
    pub target: CheckpointTarget,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: u64,
    pub base_model: String,
    pub lora_rank: u32,
    pub lora_alpha: f32,
    /// Optimiser steps of the weights.
    pub step: u64,
    pub size_bytes: u64,
    /// `bt://loops:<run>/(weights|sampler_weights)/<name>`.
    pub path: String,
}

/// One file of a checkpoint, and where to fetch it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFile {
    /// Presigned URL over HTTP; `blob:<digest>` over QUIC.
    pub url: String,
    pub relative_file_name: String,
    pub node_rank: u32,
    pub size_bytes: u64,
    /// Milliseconds since the Unix epoch.
    pub last_modified_ms: u64,
}

/// One page of a checkpoint's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFilesResponse {
    pub presigned_urls: Vec<CheckpointFile>,
    pub next_page_token: Option<u64>,
    pub total_count: u64,
}

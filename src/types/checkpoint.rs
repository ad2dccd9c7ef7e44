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
    /// New with every save, also of a name that exists.
    pub id: CheckpointId,
    /// The run that saved it.
    pub run_id: RunId,
    /// The name it was saved under.
    pub checkpoint_id: String,
    /// Always `lora`.
    pub checkpoint_type: String,
    /// What it is for, and so what is in it.
    pub target: CheckpointTarget,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: u64,
    /// The model that the adapter belongs to.
    pub base_model: String,
    /// Rank of the adapter.
    pub lora_rank: u32,
    /// Numerator of the adapter's scale.
    pub lora_alpha: f32,
    /// Optimiser steps of the weights.
    pub step: u64,
    /// Sum over its files.
    pub size_bytes: u64,
    /// `bt://loops:<run>/(weights|sampler_weights)/<name>`.
    pub path: String,
}

/// One file of a checkpoint, and where to fetch it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFile {
    /// Presigned URL over HTTP; `blob:<digest>` over QUIC.
    pub url: String,
    /// Path below the checkpoint's directory.
    pub relative_file_name: String,
    /// The node that wrote it; 0, for an adapter is written once.
    pub node_rank: u32,
    /// Length of the file.
    pub size_bytes: u64,
    /// Milliseconds since the Unix epoch.
    pub last_modified_ms: u64,
}

/// One page of a checkpoint's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFilesResponse {
    /// The files of this page, by name.
    pub presigned_urls: Vec<CheckpointFile>,
    /// Asks for the next page; absent on the last.
    pub next_page_token: Option<u64>,
    /// Files of the whole checkpoint.
    pub total_count: u64,
}

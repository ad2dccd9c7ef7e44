use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{CheckpointId, Digest, InvalidInput, RunId};

/// What a checkpoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointTarget {
    /// Adapter, optimiser moments and step: to go on training.
    Trainer,
    /// The adapter alone, in PEFT layout: to sample from.
    Sampler,
}

/// `bt://loops:<run>/(weights|sampler_weights)/<name>`: what a checkpoint is found by. Saving
/// the same path again replaces what it names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CheckpointPath {
    pub run: RunId,
    pub target: CheckpointTarget,
    pub name: String,
}

/// Longest checkpoint name, in bytes: a file name's limit.
const NAME_MAX: usize = 255;

impl CheckpointPath {
    /// Refuses a name that is not 1 to 255 of `[A-Za-z0-9._-]`, or that starts with a dot.
    pub fn validate_name(name: &str) -> Result<(), InvalidInput> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let fits = (1..=NAME_MAX).contains(&name.len());
        if fits && name.chars().all(legal) && !name.starts_with('.') {
            return Ok(());
        }
        let shown: String = name.chars().take(64).collect();
        let problem =
            format!("must be 1 to {NAME_MAX} of A-Z a-z 0-9 . _ -, not starting with a dot; got {shown:?}");
        Err(InvalidInput::new("name", problem))
    }
}

impl FromStr for CheckpointPath {
    type Err = InvalidInput;

    /// Tolerates one trailing slash.
    fn from_str(path: &str) -> Result<Self, Self::Err> {
        let malformed = || {
            let shown: String = path.chars().take(128).collect();
            let problem =
                format!("expected bt://loops:RUN/weights/NAME or …/sampler_weights/NAME, got {shown:?}");
            InvalidInput::new("path", problem)
        };
        let rest = path.strip_prefix("bt://loops:").ok_or_else(malformed)?;
        let mut parts = rest.strip_suffix('/').unwrap_or(rest).split('/');
        let (Some(run), Some(target), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed());
        };
        let target = match target {
            "weights" => CheckpointTarget::Trainer,
            "sampler_weights" => CheckpointTarget::Sampler,
            _ => return Err(malformed()),
        };
        Self::validate_name(name).map_err(|_| malformed())?;
        let run = run.parse().map_err(|_| malformed())?;
        Ok(Self { run, target, name: name.to_owned() })
    }
}

impl fmt::Display for CheckpointPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.target {
            CheckpointTarget::Trainer => "weights",
            CheckpointTarget::Sampler => "sampler_weights",
        };
        write!(f, "bt://loops:{}/{kind}/{}", self.run, self.name)
    }
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
    /// When it is deleted, in milliseconds since the Unix epoch; absent: never by itself.
    #[serde(default)]
    pub expires_at_ms: Option<u64>,
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

impl CheckpointFile {
    /// The digest that a `blob:` URL names; `None` of one over HTTP.
    pub fn digest(&self) -> Option<Digest> {
        self.url.strip_prefix("blob:")?.parse().ok()
    }
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

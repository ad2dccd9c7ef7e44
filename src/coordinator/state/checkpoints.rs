//! Saved checkpoints by id and by name, and the `bt://` paths that name them.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    str::FromStr,
};

use crate::{
    protocol::{ADAPTER_FILE, BlobRef, LoadSource, STATE_FILE, SavedFile},
    types::{
        Checkpoint, CheckpointFile, CheckpointFilesResponse, CheckpointId, CheckpointTarget, InvalidInput,
        PolicyId, RunId,
    },
};

use super::{Refusal, admission};

/// Most files on a page.
const PAGE_MAX: u32 = 1_000;

/// A checkpoint with what it holds.
#[derive(Clone)]
pub(super) struct StoredCheckpoint {
    pub checkpoint: Checkpoint,
    /// By name.
    pub files: Vec<SavedFile>,
    /// What a sampler checkpoint is served as.
    pub policy: Option<PolicyId>,
}

/// All checkpoints; one (run, target, name) is one.
#[derive(Default)]
pub(super) struct Checkpoints {
    by_id: BTreeMap<CheckpointId, StoredCheckpoint>,
    by_path: HashMap<CheckpointPath, CheckpointId>,
    last: u64,
}

/// `bt://loops:<run>/(weights|sampler_weights)/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct CheckpointPath {
    pub run: RunId,
    pub target: CheckpointTarget,
    pub name: String,
}

impl Checkpoints {
    /// A number that no checkpoint has had.
    pub fn next_id(&mut self) -> CheckpointId {
        self.last += 1;
        CheckpointId(self.last)
    }

    /// Adds a checkpoint; the one of the same name is gone.
    pub fn insert(&mut self, mut stored: StoredCheckpoint) {
        stored.files.sort_by(|a, b| a.name.cmp(&b.name));
        let id = stored.checkpoint.id;
        self.last = self.last.max(id.0);
        if let Some(replaced) = self.by_path.insert(stored.path(), id) {
            self.by_id.remove(&replaced);
        }
        self.by_id.insert(id, stored);
    }

    pub fn find(&self, path: &CheckpointPath) -> Result<&StoredCheckpoint, Refusal> {
        let id = self.by_path.get(path).ok_or_else(|| Refusal::UnknownCheckpoint(path.to_string()))?;
        Ok(&self.by_id[id])
    }

    /// The checkpoint whose file is `blob`, if it is still kept.
    pub fn holding(&self, blob: &BlobRef) -> Option<&StoredCheckpoint> {
        self.by_id.values().find(|stored| stored.files.iter().any(|file| file.blob == *blob))
    }

    /// Newest first.
    pub fn list(&self, run: Option<RunId>) -> Vec<Checkpoint> {
        let all = self.by_id.values().rev().map(|stored| &stored.checkpoint);
        all.filter(|checkpoint| run.is_none_or(|run| checkpoint.run_id == run)).cloned().collect()
    }

    /// Every sampler checkpoint's policy, base model and adapter.
    pub fn policies(&self) -> impl Iterator<Item = (PolicyId, &str, BlobRef)> {
        self.by_id.values().filter_map(|stored| {
            let adapter = stored.file(ADAPTER_FILE)?;
            Some((stored.policy?, stored.checkpoint.base_model.as_str(), adapter))
        })
    }

    /// One page of a checkpoint's files, by name.
    pub fn files(
        &self,
        checkpoint: CheckpointId,
        page_size: u32,
        page_token: u64,
    ) -> Result<CheckpointFilesResponse, Refusal> {
        let stored = self.by_id.get(&checkpoint).ok_or(Refusal::UnknownCheckpointId(checkpoint))?;
        if page_size == 0 {
            return Err(InvalidInput::new("page_size", "must be at least 1, got 0").into());
        }
        let total = stored.files.len();
        let start = usize::try_from(page_token).unwrap_or(usize::MAX).min(total);
        let end = start.saturating_add(page_size.min(PAGE_MAX) as usize).min(total);
        let page = stored.files[start..end].iter().map(|file| CheckpointFile {
            url: format!("blob:{}", file.blob.digest),
            relative_file_name: file.name.clone(),
            node_rank: 0,
            size_bytes: file.blob.size,
            last_modified_ms: stored.checkpoint.created_at_ms,
        });
        Ok(CheckpointFilesResponse {
            presigned_urls: page.collect(),
            next_page_token: (end < total).then_some(end as u64),
            total_count: total as u64,
        })
    }
}

impl StoredCheckpoint {
    pub fn path(&self) -> CheckpointPath {
        CheckpointPath {
            run: self.checkpoint.run_id,
            target: self.checkpoint.target,
            name: self.checkpoint.checkpoint_id.clone(),
        }
    }

    pub fn file(&self, name: &str) -> Option<BlobRef> {
        self.files.iter().find(|file| file.name == name).map(|file| file.blob)
    }

    /// What a `LoadState` of it reads.
    pub fn load_source(&self) -> Option<LoadSource> {
        let target = self.checkpoint.target;
        let file = match target {
            CheckpointTarget::Trainer => STATE_FILE,
            CheckpointTarget::Sampler => ADAPTER_FILE,
        };
        Some(LoadSource { target, blob: self.file(file)? })
    }
}

impl CheckpointPath {
    /// Whether a `LoadState` may name it.
    pub fn loadable(&self, with_optimizer: bool) -> Result<(), InvalidInput> {
        if with_optimizer && self.target == CheckpointTarget::Sampler {
            let problem = format!("{self} holds no optimiser state; load a `weights` path, or without it");
            return Err(InvalidInput::new("path", problem));
        }
        Ok(())
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
        admission::checkpoint_name(name).map_err(|_| malformed())?;
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

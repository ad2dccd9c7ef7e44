//! Saved checkpoints by id and by path.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{
    journal::SavedCheckpoint,
    protocol::{ADAPTER_FILE, BlobRef, LoadSource, STATE_FILE},
    types::{
        Checkpoint, CheckpointFile, CheckpointFilesResponse, CheckpointId, CheckpointPath, CheckpointTarget,
        InvalidInput, PolicyId, RunId,
    },
};

use super::Refusal;

/// Most files on a page.
const PAGE_MAX: u32 = 1_000;

/// All checkpoints; one (run, target, name) is one.
#[derive(Default)]
pub(super) struct Checkpoints {
    by_id: BTreeMap<CheckpointId, SavedCheckpoint>,
    by_path: HashMap<CheckpointPath, CheckpointId>,
    /// Those that have a time to live, by its end.
    expiring: BTreeSet<(u64, CheckpointId)>,
    last: u64,
}

impl Checkpoints {
    /// A number that no checkpoint has had.
    pub fn next_id(&mut self) -> CheckpointId {
        self.last += 1;
        CheckpointId(self.last)
    }

    /// Adds a checkpoint; the one of the same name is gone.
    pub fn insert(&mut self, mut stored: SavedCheckpoint) {
        stored.files.sort_by(|a, b| a.name.cmp(&b.name));
        let id = stored.checkpoint.id;
        self.last = self.last.max(id.0);
        if let Some(replaced) = self.by_path.insert(stored.path(), id) {
            self.by_id.remove(&replaced);
        }
        self.expiring.extend(stored.checkpoint.expires_at_ms.map(|at_ms| (at_ms, id)));
        self.by_id.insert(id, stored);
    }

    /// Those whose time is up, each once.
    pub fn take_expired(&mut self, now_ms: u64) -> Vec<CheckpointId> {
        let later = self.expiring.split_off(&(now_ms + 1, CheckpointId(0)));
        let expired = std::mem::replace(&mut self.expiring, later);
        expired.into_iter().map(|(_, id)| id).filter(|id| self.by_id.contains_key(id)).collect()
    }

    /// Those of `ids` that have a time to live are expired again then.
    pub fn expire_again(&mut self, ids: &[CheckpointId], at_ms: u64) {
        let mortal = |id: &&CheckpointId| {
            self.by_id.get(id).is_some_and(|saved| saved.checkpoint.expires_at_ms.is_some())
        };
        let again: Vec<_> = ids.iter().filter(mortal).map(|id| (at_ms, *id)).collect();
        self.expiring.extend(again);
    }

    pub fn by_id(&self, id: CheckpointId) -> Result<&SavedCheckpoint, Refusal> {
        self.by_id.get(&id).ok_or(Refusal::UnknownCheckpointId(id))
    }

    pub fn remove(&mut self, id: CheckpointId) {
        if let Some(saved) = self.by_id.remove(&id) {
            // A later one of the same name may have its place already.
            let path = saved.path();
            if self.by_path.get(&path) == Some(&id) {
                self.by_path.remove(&path);
            }
        }
    }

    /// Those of a run that were saved in order to be served, oldest first.
    pub fn published(&self, run: RunId) -> impl Iterator<Item = &SavedCheckpoint> {
        self.by_id.values().filter(move |saved| saved.published && saved.checkpoint.run_id == run)
    }

    /// Forgets all checkpoints of a run.
    pub fn remove_of(&mut self, run: RunId) {
        let of_run = self.by_id.values().filter(|saved| saved.checkpoint.run_id == run);
        let ids: Vec<_> = of_run.map(|saved| saved.checkpoint.id).collect();
        ids.into_iter().for_each(|id| self.remove(id));
    }

    /// Bytes of all checkpoints of a run.
    pub fn bytes_of(&self, run: RunId) -> u64 {
        let of_run = self.by_id.values().filter(|saved| saved.checkpoint.run_id == run);
        of_run.map(|saved| saved.checkpoint.size_bytes).sum()
    }

    /// Every file of every checkpoint.
    pub fn blobs(&self) -> impl Iterator<Item = BlobRef> {
        self.by_id.values().flat_map(|saved| saved.files.iter().map(|file| file.blob))
    }

    pub fn find(&self, path: &CheckpointPath) -> Result<&SavedCheckpoint, Refusal> {
        let id = self.by_path.get(path).ok_or_else(|| Refusal::UnknownCheckpoint(path.to_string()))?;
        Ok(&self.by_id[id])
    }

    /// The checkpoint whose file is `blob`, if it is still kept.
    pub fn holding(&self, blob: &BlobRef) -> Option<&SavedCheckpoint> {
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
        let stored = self.by_id(checkpoint)?;
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

impl SavedCheckpoint {
    pub(super) fn path(&self) -> CheckpointPath {
        CheckpointPath {
            run: self.checkpoint.run_id,
            target: self.checkpoint.target,
            name: self.checkpoint.checkpoint_id.clone(),
        }
    }

    pub(super) fn file(&self, name: &str) -> Option<BlobRef> {
        self.files.iter().find(|file| file.name == name).map(|file| file.blob)
    }

    /// What a `LoadState` of it reads.
    pub(super) fn load_source(&self) -> Option<LoadSource> {
        let target = self.checkpoint.target;
        let file = match target {
            CheckpointTarget::Trainer => STATE_FILE,
            CheckpointTarget::Sampler => ADAPTER_FILE,
        };
        Some(LoadSource { target, blob: self.file(file)? })
    }
}

/// What a `LoadState` may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LoadPath {
    Checkpoint(CheckpointPath),
    /// An adapter that a client has stored.
    Adapter(BlobRef),
}

impl LoadPath {
    /// Reads the path, and whether it holds what is asked for.
    pub fn parse(path: &str, with_optimizer: bool) -> Result<Self, InvalidInput> {
        let parsed = match BlobRef::from_load_path(path) {
            Some(blob) => Self::Adapter(blob),
            None => Self::Checkpoint(path.parse()?),
        };
        let has_optimizer =
            matches!(&parsed, Self::Checkpoint(path) if path.target == CheckpointTarget::Trainer);
        if with_optimizer && !has_optimizer {
            let problem = format!("{path} holds no optimiser state; load a `weights` path, or without it");
            return Err(InvalidInput::new("path", problem));
        }
        Ok(parsed)
    }
}

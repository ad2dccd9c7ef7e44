use std::{collections::BTreeMap, fs, path::Path};

use crate::{
    model::{Adapter, TrainState},
    protocol::{ADAPTER_FILE, STATE_FILE},
    types::{Checkpoint, CheckpointTarget, Digest, LoraConfig},
};

use super::{ArchiveError, MANIFEST, Manifest, ManifestFile};

/// PEFT's description of an adapter, beside [`ADAPTER_FILE`].
pub(super) const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// What was proved.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// The files, with sizes and digests.
    pub files: Vec<ManifestFile>,
    /// What the manifest says it is; absent if there is none, and only the digests inside the
    /// files could be checked.
    pub checkpoint: Option<Checkpoint>,
    /// Rank, scale and targets of the adapter.
    pub lora: LoraConfig,
    /// Optimiser steps of a trainer checkpoint.
    pub step: Option<u64>,
}

/// Proves a directory: every file that the manifest lists is there, whole and unaltered, there
/// is no other, and what the files hold is what their own digests and the manifest say.
///
/// Without a manifest (a directory that a client downloaded file by file) only the digests
/// inside the files are checked.
pub fn verify_directory(directory: &Path) -> Result<Verified, ArchiveError> {
    let manifest = Manifest::read(directory)?;
    let mut files = read_files(directory)?;
    match &manifest {
        Some(manifest) => check_listed(manifest, &files)?,
        // Whatever else lies in somebody's directory is none of our files.
        None => {
            files.retain(|name, _| [ADAPTER_FILE, ADAPTER_CONFIG_FILE, STATE_FILE].contains(&name.as_str()))
        }
    }
    if !files.contains_key(ADAPTER_FILE) && !files.contains_key(STATE_FILE) {
        return Err(ArchiveError::Empty { path: directory.to_owned() });
    }
    verify_files(manifest.map(|manifest| manifest.checkpoint), &files)
}

/// Proves the content of a checkpoint's files, by name.
pub fn verify_files(
    checkpoint: Option<Checkpoint>,
    files: &BTreeMap<String, Vec<u8>>,
) -> Result<Verified, ArchiveError> {
    let required = match checkpoint.as_ref().map(|checkpoint| checkpoint.target) {
        Some(CheckpointTarget::Trainer) => STATE_FILE,
        Some(CheckpointTarget::Sampler) => ADAPTER_FILE,
        None if files.contains_key(STATE_FILE) => STATE_FILE,
        None => ADAPTER_FILE,
    };
    let missing = || ArchiveError::Missing { file: required.to_owned() };
    let bytes = files.get(required).ok_or_else(missing)?;
    let content = |source| ArchiveError::content(required, source);
    let (lora, step) = match required {
        STATE_FILE => {
            TrainState::check_bytes(bytes).map(|(lora, step)| (lora, Some(step))).map_err(content)?
        }
        _ => (verify_adapter(bytes, files)?, None),
    };
    if let Some(checkpoint) = &checkpoint {
        let steps = step.map(|step| ("step", checkpoint.step.to_string(), step.to_string()));
        let facts = [
            ("rank", checkpoint.lora_rank.to_string(), lora.rank.to_string()),
            ("alpha", checkpoint.lora_alpha.to_string(), lora.alpha.to_string()),
        ];
        for (field, expected, found) in facts.into_iter().chain(steps) {
            if expected != found {
                let file = required.to_owned();
                return Err(ArchiveError::Contradiction { file, field, expected, found });
            }
        }
    }
    let described = files.iter().map(|(name, bytes)| ManifestFile {
        name: name.clone(),
        size_bytes: bytes.len() as u64,
        sha256: Digest::of(bytes),
    });
    Ok(Verified { files: described.collect(), checkpoint, lora, step })
}

/// The adapter by its own digest, and by what PEFT would read of it.
fn verify_adapter(bytes: &[u8], files: &BTreeMap<String, Vec<u8>>) -> Result<LoraConfig, ArchiveError> {
    let adapter = Adapter::of_any_model(bytes).map_err(|e| ArchiveError::content(ADAPTER_FILE, e))?;
    let missing = || ArchiveError::Missing { file: ADAPTER_CONFIG_FILE.to_owned() };
    let config = files.get(ADAPTER_CONFIG_FILE).ok_or_else(missing)?;
    let as_peft =
        Adapter::from_peft(config, bytes).map_err(|e| ArchiveError::content(ADAPTER_CONFIG_FILE, e))?;
    let (expected, found) = (adapter.layout.config.alpha, as_peft.layout.config.alpha);
    if expected != found {
        return Err(ArchiveError::Contradiction {
            file: ADAPTER_CONFIG_FILE.to_owned(),
            field: "alpha",
            expected: expected.to_string(),
            found: found.to_string(),
        });
    }
    Ok(adapter.layout.config.clone())
}

fn read_files(directory: &Path) -> Result<BTreeMap<String, Vec<u8>>, ArchiveError> {
    let failed = |e| ArchiveError::file(directory, e);
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == MANIFEST {
            continue;
        }
        if !path.is_file() {
            return Err(ArchiveError::Unlisted { file: name });
        }
        let bytes = fs::read(&path).map_err(|e| ArchiveError::file(&path, e))?;
        files.insert(name, bytes);
    }
    Ok(files)
}

fn check_listed(manifest: &Manifest, files: &BTreeMap<String, Vec<u8>>) -> Result<(), ArchiveError> {
    for listed in &manifest.files {
        let file = listed.name.clone();
        let bytes = files.get(&file).ok_or_else(|| ArchiveError::Missing { file: file.clone() })?;
        let (expected, found) = (listed.size_bytes, bytes.len() as u64);
        if found != expected {
            return Err(ArchiveError::Size { file, expected, found });
        }
        let (expected, found) = (listed.sha256, Digest::of(bytes));
        if found != expected {
            return Err(ArchiveError::Altered { file, expected, found });
        }
    }
    match files.keys().find(|name| !manifest.files.iter().any(|listed| listed.name == **name)) {
        Some(file) => Err(ArchiveError::Unlisted { file: file.clone() }),
        None => Ok(()),
    }
}

use std::{fs, path::Path};

use crate::model::{Adapter, merge_into_weights};

use super::{ArchiveError, manifest::refuse_filled, verify::ADAPTER_CONFIG_FILE};
use crate::protocol::ADAPTER_FILE;

/// Reads an adapter in PEFT layout, ours or another's.
pub fn read_adapter(directory: &Path) -> Result<Adapter, ArchiveError> {
    let read = |file: &str| {
        let path = directory.join(file);
        fs::read(&path).map_err(|e| ArchiveError::file(&path, e))
    };
    let (config, tensors) = (read(ADAPTER_CONFIG_FILE)?, read(ADAPTER_FILE)?);
    Adapter::from_peft(&config, &tensors).map_err(|e| ArchiveError::content(ADAPTER_FILE, e))
}

/// Writes the Hugging Face model of `model` (a directory) with the adapter of `adapter` (a
/// directory in PEFT layout) added to its weights into `out`, which must be empty or not exist.
///
/// Each adapted weight becomes `W + (alpha / rank) · B A`, summed in f64 and rounded once to the
/// type in which the model stores `W`; everything else is copied as it is.
pub fn merge(adapter: &Path, model: &Path, out: &Path) -> Result<(), ArchiveError> {
    let adapter = read_adapter(adapter)?;
    refuse_filled(out)?;
    fs::create_dir_all(out).map_err(|e| ArchiveError::file(out, e))?;
    Ok(merge_into_weights(&adapter, model, out)?)
}

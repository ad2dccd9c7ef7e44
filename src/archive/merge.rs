use std::{fs, path::Path};

use crate::{
    kernels::WeightDtype,
    model::{Adapter, merge_into_weights},
};

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

/// Writes `model` (a Hugging Face directory or a GGUF file) with the adapter of `adapter` (a directory in
/// PEFT layout) added to its weights into the directory `out`, which must be empty or not exist.
///
/// Each adapted weight becomes `W + (alpha / rank) · B A`, summed in f64 and rounded once: to the
/// type in which a directory stores `W`, or to `dtype` (f32 if absent), as which a GGUF's weights are written.
pub fn merge(
    adapter: &Path,
    model: &Path,
    out: &Path,
    dtype: Option<WeightDtype>,
) -> Result<(), ArchiveError> {
    let adapter = read_adapter(adapter)?;
    refuse_filled(out)?;
    fs::create_dir_all(out).map_err(|e| ArchiveError::file(out, e))?;
    Ok(merge_into_weights(&adapter, model, out, dtype)?)
}

//! This program, run to its end for what it prints.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde::de::DeserializeOwned;

use super::BenchError;

/// The JSON that `lockstep bench ARGUMENTS` prints, in a process that takes its memory with it; `what` is what errors call it.
pub(super) fn printed<T: DeserializeOwned>(
    program: &Path,
    arguments: &[&str],
    what: &str,
) -> Result<T, BenchError> {
    let output = Command::new(program)
        .arg("bench")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| BenchError::Start { what: what.to_owned(), source })?;
    if !output.status.success() {
        return Err(BenchError::worker(what, format!("it ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| BenchError::worker(what, e))
}

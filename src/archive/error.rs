use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    model::{AdapterError, ModelError},
    types::Digest,
};

/// Why a directory is no checkpoint, or can't become one. All are the fault of the files, and the
/// same call fails again until they change.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file system refused.
    #[error("`{}`: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    /// Would be written over.
    #[error("`{}` is not empty; name a directory that is, or that does not exist yet", .path.display())]
    NotEmpty { path: PathBuf },
    /// Not the JSON of a manifest.
    #[error("`{file}` is no manifest of a checkpoint: {problem}")]
    Manifest { file: String, problem: String },
    /// The manifest names a file that would lie elsewhere.
    #[error("the manifest names `{file}`, which is no plain file name")]
    Name { file: String },
    /// The manifest lists it.
    #[error("`{file}` is missing")]
    Missing { file: String },
    /// The manifest does not list it.
    #[error("`{file}` is no part of this checkpoint")]
    Unlisted { file: String },
    /// Truncated, or longer than it was.
    #[error("`{file}` has {found} bytes, it was written with {expected}")]
    Size { file: String, expected: u64, found: u64 },
    /// Altered.
    #[error("`{file}` was altered: its SHA-256 is {found}, it was written with {expected}")]
    Altered { file: String, expected: Digest, found: Digest },
    /// Whole, but not what it should be.
    #[error("`{file}`: {source}")]
    Content { file: String, source: AdapterError },
    /// Files and manifest disagree.
    #[error("`{file}` says {field} {found}, the manifest says {expected}")]
    Contradiction { file: String, field: &'static str, expected: String, found: String },
    /// Neither form of checkpoint.
    #[error("`{}` holds no checkpoint: neither `{}` nor `{}`", .path.display(), crate::protocol::ADAPTER_FILE, crate::protocol::STATE_FILE)]
    Empty { path: PathBuf },
    /// The model that an adapter is to be merged into.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl ArchiveError {
    pub(super) fn file(path: &Path, source: io::Error) -> Self {
        Self::File { path: path.to_owned(), source }
    }

    pub(super) fn content(file: &str, source: AdapterError) -> Self {
        Self::Content { file: file.to_owned(), source }
    }
}

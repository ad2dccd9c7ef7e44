use std::path::{Path, PathBuf};

use crate::gpu::GpuError;

/// Why a model can't be found, read or used.
///
/// Every variant is the fault of the files or of the name given; the same call fails again
/// until they change. Cloneable, so that one failed load answers everyone who waited for it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// The GPU can't be had, or the model can't be put on it.
    #[error("{0}")]
    Gpu(GpuError),
    /// The GPU's kernels don't cover the model.
    #[error("`{name}`: {source}")]
    OnGpu { name: String, source: GpuError },
    /// No model of this name or alias is served.
    #[error("no model `{name}` is served here; offered: {offered}")]
    Unknown { name: String, offered: String },
    /// `--model NAME=PATH` was given something else.
    #[error("`{given}`: {problem}; write --model NAME=PATH or --model PATH")]
    Source { given: String, problem: String },
    /// Two models claim one name.
    #[error("two models are called `{name}`: `{first}` and `{second}`", first = .first.display(), second = .second.display())]
    NameTaken { name: String, first: PathBuf, second: PathBuf },
    /// The file system refused.
    #[error("cannot read `{}`: {problem}", .path.display())]
    Unreadable { path: PathBuf, problem: String },
    /// A model's directory lacks a file.
    #[error("`{}` holds no `{file}`", .directory.display())]
    MissingFile { directory: PathBuf, file: String },
    /// A file that is read into memory is larger than any real one.
    #[error("`{}` has {size} bytes; at most {limit} are read", .path.display())]
    TooLarge { path: PathBuf, size: u64, limit: u64 },
    /// A file is truncated, or no file of its format.
    #[error("`{}` is damaged: {problem}", .path.display())]
    Malformed { path: PathBuf, problem: String },
    /// A file changed after the service had read its digest.
    #[error("`{}` has changed since the service started; start it again", .path.display())]
    Changed { path: PathBuf },
    /// A sound file that asks for mathematics which Lockstep doesn't compute.
    #[error("`{}`: `{field}` {problem}", .path.display())]
    Unsupported { path: PathBuf, field: String, problem: String },
    /// A value that no model can have.
    #[error("`{}`: `{field}` {problem}", .path.display())]
    InvalidField { path: PathBuf, field: String, problem: String },
    /// A weight that the configuration calls for is in no file.
    #[error("`{}` holds no tensor `{tensor}`", .path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    /// A weight that the configuration doesn't call for.
    #[error("`{}` holds the tensor `{tensor}`, which this decoder doesn't have", .path.display())]
    UnexpectedTensor { path: PathBuf, tensor: String },
    /// The same weight twice.
    #[error("`{}` holds the tensor `{tensor}` a second time", .path.display())]
    DuplicateTensor { path: PathBuf, tensor: String },
    /// A weight whose shape contradicts the configuration.
    #[error("`{}`: tensor `{tensor}` has the shape {found:?}; the configuration says {expected:?}", .path.display())]
    TensorShape { path: PathBuf, tensor: String, expected: Vec<usize>, found: Vec<usize> },
    /// A weight in a number format that isn't read.
    #[error("`{}`: tensor `{tensor}` is stored as {found}; read are {supported}", .path.display())]
    TensorType { path: PathBuf, tensor: String, found: String, supported: &'static str },
    /// A weight that is infinite or no number.
    #[error("`{}`: tensor `{tensor}` holds a value that isn't finite, at element {index}", .path.display())]
    NotFinite { path: PathBuf, tensor: String, index: usize },
    /// The tokenizer can't be built, or refuses a text.
    #[error("tokenizer: {problem}")]
    Tokenizer { problem: String },
    /// A conversation was given to a model without a chat template.
    #[error("this model has no chat template; send the prompt as text or tokens")]
    NoChatTemplate,
    /// The chat template is wrong, or refuses this conversation.
    #[error("chat template: {problem}")]
    ChatTemplate { problem: String },
}

impl ModelError {
    pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Self {
        Self::Unreadable { path: path.to_owned(), problem: error.to_string() }
    }

    pub(super) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), problem: problem.into() }
    }

    pub(super) fn unsupported(path: &Path, field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), field: field.into(), problem: problem.into() }
    }

    pub(super) fn invalid_field(path: &Path, field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::InvalidField { path: path.to_owned(), field: field.into(), problem: problem.into() }
    }
}

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A value the caller gave that can't be accepted, named by its field.
///
/// `field` is the path a caller would write (`data[3].loss_fn_inputs.advantages`); `problem`
/// says the bound and the value given.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("`{field}`: {problem}")]
pub struct InvalidInput {
    /// Path of the offending field, from the root of the request.
    pub field: String,
    /// What is wrong with it, with the bound and the value.
    pub problem: String,
}

impl InvalidInput {
    /// Names `field` as the one at fault.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// The same fault seen from one level further out: `prefix.field`.
    pub fn within(mut self, prefix: impl AsRef<str>) -> Self {
        let prefix = prefix.as_ref();
        self.field = if self.field.starts_with('[') {
            format!("{prefix}{}", self.field)
        } else {
            format!("{prefix}.{}", self.field)
        };
        self
    }
}

/// Who is at fault when an operation fails, and so what the caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The request was wrong; the same request fails again. The run is as it was.
    InvalidInput,
    /// A checkpoint, run, model or operation that was named does not exist.
    NotFound,
    /// The numbers left the finite range (loss or gradient norm). The run is as it was.
    NotFinite,
    /// It does not fit into memory, disk or a limit of this service.
    ResourceExhausted,
    /// A part of the service was lost while it ran; the run was restored, try again.
    Unavailable,
    /// The caller did not wait long enough; the operation goes on.
    DeadlineExceeded,
    /// The caller may not do this.
    PermissionDenied,
    /// A fault of Lockstep.
    Internal,
}

/// Why an operation or a request failed. Replayed to whoever asks again.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct OperationError {
    /// Who is at fault.
    pub kind: ErrorKind,
    /// One sentence for people: what happened, where, and what to do.
    pub message: String,
}

impl OperationError {
    /// An error of `kind` with a sentence for people.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl From<InvalidInput> for OperationError {
    fn from(error: InvalidInput) -> Self {
        Self::new(ErrorKind::InvalidInput, error.to_string())
    }
}

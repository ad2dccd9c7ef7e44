use std::path::PathBuf;

use crate::{
    archive::ArchiveError,
    types::{InvalidInput, OperationError},
};

/// Why a client can't be made or a call has failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No service writes its address into this directory.
    #[error("no Lockstep service runs on {}: {reason}; start one with `lockstep up --data-dir {}`", .directory.display(), .directory.display())]
    NoService { directory: PathBuf, reason: String },
    /// The address is none that can be connected to.
    #[error("can't connect to `{target}`: {reason}")]
    Address { target: String, reason: String },
    /// The service could not be reached, or went away for longer than the client waits.
    #[error("the service at {address} did not answer: {reason}")]
    Unreachable { address: String, reason: String },
    /// The service has nothing to do with this client any more.
    #[error("{reason}")]
    ShutOut { reason: String },
    /// The service speaks another protocol, or there is a fault in it.
    #[error("unexpected answer from the service: {0}")]
    Protocol(String),
    /// A value that was given can't be accepted.
    #[error(transparent)]
    Invalid(#[from] InvalidInput),
    /// The service refused the request or the operation failed.
    #[error(transparent)]
    Operation(#[from] OperationError),
    /// A checkpoint's directory, or what a checkpoint holds.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A file of the local machine.
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: std::io::Error },
}

impl ClientError {
    /// Names the file that an operation's error is about.
    pub(super) fn about_file(self, name: &str) -> Self {
        match self {
            Self::Operation(OperationError { kind, message }) => {
                OperationError::new(kind, format!("`{name}`: {message}")).into()
            }
            other => other,
        }
    }
}

impl From<ClientError> for OperationError {
    fn from(error: ClientError) -> Self {
        use crate::types::ErrorKind;
        match error {
            ClientError::Operation(error) => error,
            ClientError::Invalid(error) => error.into(),
            ClientError::Archive(error) => Self::new(ErrorKind::InvalidInput, error.to_string()),
            ClientError::Protocol(_) | ClientError::File { .. } => {
                Self::new(ErrorKind::Internal, error.to_string())
            }
            ClientError::ShutOut { .. } => Self::new(ErrorKind::PermissionDenied, error.to_string()),
            ClientError::NoService { .. } | ClientError::Address { .. } | ClientError::Unreachable { .. } => {
                Self::new(ErrorKind::Unavailable, error.to_string())
            }
        }
    }
}

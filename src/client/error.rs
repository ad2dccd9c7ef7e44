use std::path::PathBuf;

use crate::types::{InvalidInput, OperationError};

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
    /// The service speaks another protocol, or there is a fault in it.
    #[error("unexpected answer from the service: {0}")]
    Protocol(String),
    /// A value that was given can't be accepted.
    #[error(transparent)]
    Invalid(#[from] InvalidInput),
    /// The service refused the request or the operation failed.
    #[error(transparent)]
    Operation(#[from] OperationError),
    /// A file of the local machine.
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: std::io::Error },
}

impl From<ClientError> for OperationError {
    fn from(error: ClientError) -> Self {
        use crate::types::ErrorKind;
        match error {
            ClientError::Operation(error) => error,
            ClientError::Invalid(error) => error.into(),
            ClientError::Protocol(_) | ClientError::File { .. } => {
                Self::new(ErrorKind::Internal, error.to_string())
            }
            ClientError::NoService { .. } | ClientError::Address { .. } | ClientError::Unreachable { .. } => {
                Self::new(ErrorKind::Unavailable, error.to_string())
            }
        }
    }
}

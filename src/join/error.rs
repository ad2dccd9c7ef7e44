use std::{io, path::PathBuf};

use crate::transport::TransportError;

/// Why a process could not join, or a token not be made.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The text is no token.
    #[error("this is no join token ({0}); `lockstep token create` on the coordinator's machine prints one")]
    Malformed(&'static str),
    /// The coordinator does not take the token, or the name.
    #[error("the coordinator refused: {0}")]
    Refused(String),
    /// The doorway could not be reached, or is another cluster's.
    #[error("can't join at {address}: {source}")]
    Doorway { address: String, source: TransportError },
    /// What came back was no answer.
    #[error("no answer from {address}: {reason}")]
    NoAnswer { address: String, reason: String },
    /// A key or certificate could not be made or used.
    #[error(transparent)]
    Identity(TransportError),
    /// No token of this id.
    #[error("there is no token {id}; `lockstep token list` shows those there are")]
    Unknown { id: String },
    /// A token's file could not be read or written.
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    /// A token's file is not what it should be.
    #[error("{} is no token: {problem}; delete it", .path.display())]
    Damaged { path: PathBuf, problem: String },
}

impl JoinError {
    /// Whether the same attempt may go well later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Doorway { source, .. } => source.is_retryable(),
            Self::NoAnswer { .. } => true,
            _ => false,
        }
    }
}

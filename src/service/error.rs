use std::path::PathBuf;

use crate::{
    client::ClientError, coordinator::CoordinatorError, gateway::GatewayError, join::JoinError,
    journal::JournalError, node::NodeError, store::StoreError, transport::TransportError,
};

/// Why a service, or a part of it, can't start or has stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A file or directory of this machine.
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// A thread, a process or a runtime can't be started.
    #[error("can't start {what}: {source}")]
    Start { what: String, source: std::io::Error },
    /// A part gave up for a reason that starting it again would not change.
    #[error("the {part} can't run: {reason}")]
    Refused { part: String, reason: String },
    /// A part did not come up in time.
    #[error("the {part} was not ready within {seconds} s; its log says why{hint}")]
    NotReady { part: String, seconds: u64, hint: String },
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Of a backup.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Of a backup.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ServiceError {
    /// Whether starting again would end the same way.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Refused { .. } => true,
            Self::Join(error) => !error.is_retryable(),
            Self::Coordinator(error) => error.is_final(),
            Self::Node(error) => error.is_final(),
            Self::Transport(
                TransportError::AddressInUse { .. }
                | TransportError::Damaged { .. }
                | TransportError::File { .. },
            ) => true,
            Self::Gateway(GatewayError::Bind { .. } | GatewayError::Open { .. }) => true,
            _ => false,
        }
    }
}

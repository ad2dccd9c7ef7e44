use std::io;

use crate::{client::ClientError, service::ServiceError, transport::TransportError, types::OperationError};

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// What the caller asked for can't be measured.
    #[error("{flag}: {problem}")]
    Refused { flag: &'static str, problem: String },
    #[error("starting {what}: {source}")]
    Start { what: String, source: io::Error },
    /// A process of the measurement ended, fell silent or reported a failure.
    #[error("{who}: {problem}")]
    Worker { who: String, problem: String },
    /// A peer's script ended without its line of JSON.
    #[error("{script}: {problem}")]
    Peer { script: &'static str, problem: String },
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Operation(#[from] OperationError),
    #[error("{what}: {source}")]
    File { what: String, source: io::Error },
}

impl BenchError {
    pub(super) fn worker(who: impl ToString, problem: impl ToString) -> Self {
        Self::Worker { who: who.to_string(), problem: problem.to_string() }
    }
}

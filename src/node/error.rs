use crate::{model::ModelError, transport::TransportError};

/// Why a node ended, or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A model that it is to offer can't be described.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The coordinator is of another cluster, or speaks another version: trying again is no use.
    #[error("can't join {coordinator}: {source}")]
    Join { coordinator: String, source: TransportError },
    /// A thread could not be started.
    #[error("can't start a compute thread: {source}")]
    Thread { source: std::io::Error },
    /// A rank or replica has panicked; what it held is lost. Start the process anew.
    #[error("{what}")]
    Died { what: String },
}

impl NodeError {
    /// Whether starting the node again would end the same way.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Model(_) | Self::Join { .. } => true,
            Self::Thread { .. } | Self::Died { .. } => false,
        }
    }
}

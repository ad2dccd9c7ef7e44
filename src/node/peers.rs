//! Connections that other nodes open: the streams of their ranks' collectives.

use std::sync::Arc;

use crate::{
    trainer::Join,
    transport::{Endpoint, Role},
    types::{ErrorKind, OperationError},
};

/// The node's side of its ranks' collectives.
#[derive(Clone)]
pub(super) struct Peers {}

impl Peers {
    pub(super) fn new(_endpoint: &Endpoint) -> Self {
        Self {}
    }

    /// How a rank joins its run's collectives.
    pub(super) fn join(&self) -> Join {
        Arc::new(|_| Err(OperationError::new(ErrorKind::Internal, "collectives have not landed")))
    }

    /// Takes other nodes' connections until the endpoint is closed.
    pub(super) async fn accept(self, endpoint: Endpoint) {
        while let Some(connection) = endpoint.accept().await {
            if connection.peer().role != Role::Node {
                connection.close("a node takes connections of nodes only");
            }
        }
    }
}

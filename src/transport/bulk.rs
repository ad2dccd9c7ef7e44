//! quinn's own bulk transfer, over a connection as every other has it: one stream, nothing of ours in
//! between. What a machine can do at most, for benchmarks to stand beside.

use bytes::Bytes;

use super::{Connection, TransportError, connection::Wire, quic};

/// Sends `count` times the same `chunk` and waits until the other end holds all of it.
pub async fn send_bulk(connection: &Connection, chunk: Bytes, count: u64) -> Result<(), TransportError> {
    link(connection)?.send_bulk(chunk, count).await
}

/// Receives what [`send_bulk`] sends, and drops it; how many bytes came.
pub async fn receive_bulk(connection: &Connection) -> Result<u64, TransportError> {
    link(connection)?.receive_bulk().await
}

fn link(connection: &Connection) -> Result<&quic::Link, TransportError> {
    match connection.wire() {
        Wire::Quic(link) => Ok(link),
        Wire::Memory(_) => Err(TransportError::InvalidAddress {
            address: format!("memory:{}", connection.peer().name),
            reason: "a bulk transfer of quinn's takes QUIC".into(),
        }),
    }
}

//! Connections between processes: QUIC with mutual TLS (quinn), and an in-memory twin for
//! embedding and simulation. Moves opaque frames and byte streams; knows no message.

use std::{net::SocketAddr, path::Path, time::Duration};

/// What a process is, proved by its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Coordinator,
    Node,
    Gateway,
    Client,
}

/// Who is at the other end, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub role: Role,
    pub name: String,
}

/// Why a connection or stream can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("{0}")]
    Placeholder(String),
}

/// The certificate authority of a cluster, in `DIR/ca` (mode 0600): made at first start.
pub struct ClusterCa {}

/// A certificate, its key and the CA it trusts.
#[derive(Clone)]
pub struct Identity {}

impl ClusterCa {
    /// Opens or makes the CA of a data directory.
    pub fn open_or_create(directory: &Path) -> Result<Self, TransportError> {
        let _ = directory;
        todo!()
    }

    /// Issues an identity.
    pub fn issue(&self, role: Role, name: &str) -> Result<Identity, TransportError> {
        let _ = (role, name);
        todo!()
    }

    /// SHA-256 of the CA certificate, hexadecimal.
    pub fn fingerprint(&self) -> String {
        todo!()
    }
}

impl Identity {
    /// Writes certificate, key and CA under `directory/<name>.*`, key mode 0600.
    pub fn save(&self, directory: &Path, name: &str) -> Result<(), TransportError> {
        let _ = (directory, name);
        todo!()
    }

    /// Reads what [`Identity::save`] wrote.
    pub fn load(directory: &Path, name: &str) -> Result<Self, TransportError> {
        let _ = (directory, name);
        todo!()
    }
}

/// A socket that accepts and makes connections: QUIC or in memory.
#[derive(Clone)]
pub struct Endpoint {}

/// The network that in-memory endpoints of one process share.
#[derive(Clone, Default)]
pub struct MemoryNetwork {}

impl Endpoint {
    /// Binds a UDP socket (port 0: any). Must be called inside a tokio runtime.
    pub fn quic(bind: SocketAddr, identity: Identity, alpn: &[u8]) -> Result<Self, TransportError> {
        let _ = (bind, identity, alpn);
        todo!()
    }

    /// An endpoint of an in-memory network; its address is `memory:<name>`.
    pub fn memory(network: &MemoryNetwork, role: Role, name: &str) -> Result<Self, TransportError> {
        let _ = (network, role, name);
        todo!()
    }

    /// Where this endpoint is reached: `IP:PORT` or `memory:<name>`.
    pub fn local_address(&self) -> String {
        todo!()
    }

    /// Connects, checks that the other end has `role` (by the DNS name of its certificate),
    /// within `deadline`.
    pub async fn connect(
        &self,
        address: &str,
        role: Role,
        deadline: Duration,
    ) -> Result<Connection, TransportError> {
        let _ = (address, role, deadline);
        todo!()
    }

    /// The next connection whose handshake succeeded; `None` once closed. A failed handshake
    /// is logged and costs the others nothing.
    pub async fn accept(&self) -> Option<Connection> {
        todo!()
    }

    /// Closes every connection.
    pub async fn close(&self) {
        todo!()
    }
}

/// One authenticated connection, cheap to clone.
#[derive(Clone)]
pub struct Connection {}

impl Connection {
    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        todo!()
    }

    /// Opens a stream.
    pub async fn open_stream(&self) -> Result<Stream, TransportError> {
        todo!()
    }

    /// The next stream that the other end opened.
    pub async fn accept_stream(&self) -> Result<Stream, TransportError> {
        todo!()
    }

    /// Returns when the connection is gone, and says why.
    pub async fn closed(&self) -> TransportError {
        todo!()
    }

    /// Closes it, telling the other end why.
    pub fn close(&self, reason: &str) {
        let _ = reason;
        todo!()
    }
}

/// A bidirectional stream, in two halves that may live in different tasks. Dropping an
/// unfinished `send` half resets the stream.
pub struct Stream {
    pub send: SendHalf,
    pub recv: RecvHalf,
}

pub struct SendHalf {}

pub struct RecvHalf {}

impl SendHalf {
    /// Sends one frame: a `u32` length, little endian, then the bytes.
    pub async fn send_frame(&mut self, frame: &[u8]) -> Result<(), TransportError> {
        let _ = frame;
        todo!()
    }

    /// Sends raw bytes.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), TransportError> {
        let _ = bytes;
        todo!()
    }

    /// Says that nothing follows.
    pub async fn finish(&mut self) -> Result<(), TransportError> {
        todo!()
    }
}

impl RecvHalf {
    /// One frame of at most `limit` bytes; `None` when the other end has finished.
    pub async fn recv_frame(&mut self, limit: usize) -> Result<Option<Vec<u8>>, TransportError> {
        let _ = limit;
        todo!()
    }

    /// Exactly `size` raw bytes; grows its buffer as bytes arrive, so that a forged size
    /// allocates nothing.
    pub async fn recv_bytes(&mut self, size: u64) -> Result<Vec<u8>, TransportError> {
        let _ = size;
        todo!()
    }
}

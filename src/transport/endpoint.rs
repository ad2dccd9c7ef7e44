use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use super::{Connection, Identity, MemoryNetwork, Revocation, Role, TransportError, memory, quic};

/// A socket that accepts and makes connections: QUIC or in memory. Dropping the last clone stops
/// accepting; connections live on until they are dropped.
#[derive(Clone)]
pub struct Endpoint(Kind);

#[derive(Clone)]
enum Kind {
    Quic(Arc<quic::Socket>),
    Memory(Arc<memory::Station>),
}

impl Endpoint {
    /// Binds a UDP socket (port 0: any). Must be called inside a tokio runtime. An identity of the
    /// role `Client` only connects.
    pub fn quic(bind: SocketAddr, identity: Identity, alpn: &[u8]) -> Result<Self, TransportError> {
        quic::Socket::bind(bind, identity, alpn).map(|socket| Self(Kind::Quic(Arc::new(socket))))
    }

    /// An endpoint of an in-memory network; its address is `memory:<name>`. Names are unique on
    /// a network, whatever the role, until the endpoint is closed or dropped.
    pub fn memory(network: &MemoryNetwork, role: Role, name: &str) -> Result<Self, TransportError> {
        memory::Station::register(network, role, name).map(|station| Self(Kind::Memory(Arc::new(station))))
    }

    /// Where this endpoint is reached: `IP:PORT` or `memory:<name>`.
    pub fn local_address(&self) -> String {
        match &self.0 {
            Kind::Quic(socket) => socket.local_address(),
            Kind::Memory(station) => station.local_address(),
        }
    }

    /// The cluster that this endpoint belongs to: no two on a host have the same. From the
    /// fingerprint of its CA, or, in memory, one for each network.
    pub fn cluster(&self) -> &str {
        match &self.0 {
            Kind::Quic(socket) => socket.cluster(),
            Kind::Memory(station) => station.cluster(),
        }
    }

    /// Shows another identity of the same process from the next handshake on, and trusts the CAs that come with
    /// it. Connections that are there stay. Nothing in memory.
    pub fn present(&self, identity: Identity) -> Result<(), TransportError> {
        match &self.0 {
            Kind::Quic(socket) => socket.present(identity),
            Kind::Memory(_) => Ok(()),
        }
    }

    /// What it shows; nobody has an identity in memory.
    pub fn identity(&self) -> Option<Identity> {
        match &self.0 {
            Kind::Quic(socket) => Some(socket.identity()),
            Kind::Memory(_) => None,
        }
    }

    /// From the next handshake on, has nothing to do with whom these revocations concern, and tells them so.
    /// What was refused before stays so, whichever order two of these come in. Nothing in memory.
    pub fn refuse(&self, revoked: Vec<Revocation>) {
        match &self.0 {
            Kind::Quic(socket) => socket.refuse(revoked),
            Kind::Memory(_) => {}
        }
    }

    /// Connects, checks that the other end has `role` (by the DNS name of its certificate),
    /// within `deadline`. Somebody who comes to the address before the deadline is found.
    ///
    /// Returns once the other end has checked us too: a certificate or protocol that it refuses
    /// is an error here, not on the first stream.
    pub async fn connect(
        &self,
        address: &str,
        role: Role,
        deadline: Duration,
    ) -> Result<Connection, TransportError> {
        let connecting = async {
            match &self.0 {
                Kind::Quic(socket) => socket.connect(address, role).await,
                Kind::Memory(station) => station.connect(address, role).await,
            }
        };
        tokio::time::timeout(deadline, connecting)
            .await
            .unwrap_or_else(|_| Err(TransportError::ConnectTimeout { address: address.into(), deadline }))
    }

    /// The next connection whose handshake succeeded; `None` once closed. A failed handshake
    /// is logged and costs the others nothing.
    pub async fn accept(&self) -> Option<Connection> {
        match &self.0 {
            Kind::Quic(socket) => socket.accept().await,
            Kind::Memory(station) => station.accept().await,
        }
    }

    /// Closes every connection.
    pub async fn close(&self) {
        match &self.0 {
            Kind::Quic(socket) => socket.close().await,
            Kind::Memory(station) => station.close(),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({})", self.local_address())
    }
}

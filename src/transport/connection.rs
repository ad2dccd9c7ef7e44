use std::{fmt, sync::Arc};

use super::{Peer, Proof, Stream, TransportError, memory, quic};

/// One authenticated connection, cheap to clone. It closes when its last clone and its last stream
/// are dropped.
#[derive(Clone)]
pub struct Connection {
    known: Arc<(Peer, Option<Proof>)>,
    wire: Wire,
}

#[derive(Clone)]
pub(super) enum Wire {
    Quic(quic::Link),
    Memory(Arc<memory::Side>),
}

impl Connection {
    pub(super) fn new(peer: Peer, proof: Option<Proof>, wire: Wire) -> Self {
        Self { known: Arc::new((peer, proof)), wire }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.known.0
    }

    /// What else its certificate says; nothing in memory, where nobody has one.
    pub fn proof(&self) -> Option<&Proof> {
        self.known.1.as_ref()
    }

    pub(super) fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Opens a stream. Waits while the other end has as many open as it allows.
    ///
    /// Over QUIC the other end hears of it with the first bytes that are sent.
    pub async fn open_stream(&self) -> Result<Stream, TransportError> {
        match &self.wire {
            Wire::Quic(link) => link.open_stream().await,
            Wire::Memory(side) => side.open_stream().await,
        }
    }

    /// The next stream that the other end opened. Those that arrived before the connection closed
    /// come first, then the error that says why it did.
    pub async fn accept_stream(&self) -> Result<Stream, TransportError> {
        match &self.wire {
            Wire::Quic(link) => link.accept_stream().await,
            Wire::Memory(side) => side.accept_stream().await,
        }
    }

    /// Returns when the connection is gone, and says why.
    pub async fn closed(&self) -> TransportError {
        match &self.wire {
            Wire::Quic(link) => link.closed().await,
            Wire::Memory(side) => side.closed().await,
        }
    }

    /// Whether it is a clone of the other.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.known, &other.known)
    }

    /// Closes it as that of a process that is put out of the cluster, which hears
    /// [`ShutOut`](TransportError::ShutOut) and should not come back.
    pub fn shut_out(&self, reason: &str) {
        let reason = &reason[..reason.floor_char_boundary(super::MAX_CLOSE_REASON)];
        match &self.wire {
            Wire::Quic(link) => link.shut_out(reason),
            Wire::Memory(side) => side.close(reason),
        }
    }

    /// Closes it, telling the other end why (the first 512 bytes of it). Bytes that have not
    /// reached the other end are lost: [`finish`](super::SendHalf::finish) what must arrive.
    pub fn close(&self, reason: &str) {
        let reason = &reason[..reason.floor_char_boundary(super::MAX_CLOSE_REASON)];
        match &self.wire {
            Wire::Quic(link) => link.close(reason),
            Wire::Memory(side) => side.close(reason),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({})", self.peer())
    }
}

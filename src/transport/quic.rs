//! The twin over UDP: quinn with the certificates of one cluster.
//!
//! A server sees a client's certificate after the client's own handshake has ended (TLS 1.3), so
//! a client could not tell "accepted" from "about to be refused". Hence the welcome: once the
//! server has checked the client and has room for it, it opens an empty unidirectional stream, and
//! `connect` waits for that.

use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use quinn::{
    ConnectionError, EndpointConfig, IdleTimeout, ReadError, StoppedError, TransportConfig,
    TransportErrorCode, WriteError,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc},
    task::AbortHandle,
    time::timeout,
};

use super::{
    Connection, Identity, MAX_STREAMS, Revocation, Role, Stream, TransportError, name,
    stream::{RecvWire, SendWire},
};

mod face;

use face::{Face, Shared, server_config};

/// Silence after which the other end counts as gone. Control threads answer within milliseconds;
/// 30 s outlives a machine that swaps or a switch that restarts.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The same between nodes: their ranks wait for one another, and a node that its peers don't hear for as long as
/// this is left out, as is one that the coordinator does not hear.
const PEER_IDLE_TIMEOUT: Duration = Duration::from_secs(15);

/// Also how soon the loss of a peer that was killed and is back is noticed: it disowns the first
/// packet that it gets.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// A handshake takes two round trips; one that takes longer than this is no peer of ours.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Handshakes at once; more are told to come again. A cluster that restarts brings a few hundred.
const MAX_HANDSHAKES: usize = 512;

/// Handshakes at once from which an address must prove that it receives (QUIC's retry), so that
/// forged ones can't hold the rest.
const UNVALIDATED_HANDSHAKES: usize = 64;

/// Connections whose handshake is done and that nobody has accepted yet.
const ACCEPT_QUEUE: usize = 64;

/// Unread bytes of one stream: 8 MiB keep 1 Gbit/s busy over 60 ms.
const STREAM_WINDOW: u32 = 8 << 20;

/// Unread bytes of one connection: 32 streams whose reader has stalled do not stall the others.
const CONNECTION_WINDOW: u32 = 256 << 20;

/// Sent and not acknowledged bytes of one connection.
const SEND_WINDOW: u64 = 32 << 20;

/// How long `close` waits for the other ends to hear of it.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// Application error code of a closed connection; the reason beside it is what counts.
const CODE_CLOSED: u32 = 0;

/// Pieces taken from quinn under one lock.
const PIECES: usize = 32;

/// Application error code of a connection whose other end is put out of the cluster.
const CODE_SHUT_OUT: u32 = 1;

/// A bound socket.
pub(super) struct Socket {
    endpoint: quinn::Endpoint,
    alpn: Vec<u8>,
    shared: Arc<Shared>,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    acceptor: AbortHandle,
    local: SocketAddr,
}

impl Socket {
    pub(super) fn bind(bind: SocketAddr, identity: Identity, alpn: &[u8]) -> Result<Self, TransportError> {
        let server = server_config(&identity, alpn)?;
        let bind_error = |source| bind_error(bind, source);
        let socket = UdpSocket::bind(bind).map_err(bind_error)?;
        let endpoint =
            quinn::Endpoint::new(endpoint_config(&identity), server, socket, Arc::new(quinn::TokioRuntime))
                .map_err(bind_error)?;
        let local = endpoint.local_addr().map_err(bind_error)?;

        let (ready, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let shared = Arc::new(Shared {
            cluster: identity.cluster().to_owned(),
            face: RwLock::new(Face::new(identity, alpn)?),
            revoked: RwLock::default(),
        });
        let acceptor = tokio::spawn(accept_all(endpoint.clone(), shared.clone(), ready)).abort_handle();
        let accepted = Mutex::new(accepted);
        Ok(Self { endpoint, alpn: alpn.to_vec(), shared, accepted, acceptor, local })
    }

    /// Shows another identity from the next handshake on; connections stay.
    pub(super) fn present(&self, identity: Identity) -> Result<(), TransportError> {
        let (server, face) = (server_config(&identity, &self.alpn)?, Face::new(identity, &self.alpn)?);
        self.endpoint.set_server_config(server);
        *self.shared.face.write().unwrap_or_else(PoisonError::into_inner) = face;
        Ok(())
    }

    pub(super) fn identity(&self) -> Identity {
        self.shared.face().identity
    }

    pub(super) fn refuse(&self, revoked: Vec<Revocation>) {
        let mut refused = self.shared.revoked.write().unwrap_or_else(PoisonError::into_inner);
        for revocation in revoked {
            let is_same = |r: &&mut Revocation| (r.role, &r.name) == (revocation.role, &revocation.name);
            match refused.iter_mut().find(is_same) {
                Some(before) => before.upto = before.upto.max(revocation.upto),
                None => refused.push(revocation),
            }
        }
    }

    pub(super) fn local_address(&self) -> String {
        self.local.to_string()
    }

    pub(super) fn cluster(&self) -> &str {
        &self.shared.cluster
    }

    pub(super) async fn connect(&self, address: &str, role: Role) -> Result<Connection, TransportError> {
        let to = resolve(address, self.local).await?;
        let face = self.shared.face();
        let config = if role == Role::Node { face.to_node } else { face.to_others };
        let connecting = self
            .endpoint
            .connect_with(config, to, &name::role_dns_name(role, &self.shared.cluster))
            .map_err(|e| match e {
                quinn::ConnectError::EndpointStopping => TransportError::EndpointClosed,
                other => {
                    TransportError::InvalidAddress { address: address.into(), reason: other.to_string() }
                }
            })?;
        let failed = |e| connect_error(address, role, e);
        let connection = connecting.await.map_err(failed)?;
        // The welcome.
        connection.accept_uni().await.map_err(failed)?;
        self.shared.admit(connection)
    }

    pub(super) async fn accept(&self) -> Option<Connection> {
        self.accepted.lock().await.recv().await
    }

    pub(super) async fn close(&self) {
        self.endpoint.close(CODE_CLOSED.into(), b"shutting down");
        // Bounded: a peer that is gone does not hold up our exit.
        let _ = timeout(CLOSE_DEADLINE, self.endpoint.wait_idle()).await;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

/// The first address behind a name that a socket at `local` reaches.
pub(super) async fn resolve(address: &str, local: SocketAddr) -> Result<SocketAddr, TransportError> {
    let invalid =
        |reason: &str| TransportError::InvalidAddress { address: address.into(), reason: reason.into() };
    let (host, port) = address.rsplit_once(':').ok_or_else(|| invalid("expected HOST:PORT"))?;
    match port.parse::<u16>() {
        Ok(0) | Err(_) => return Err(invalid("expected a port from 1 to 65535 behind the last `:`")),
        Ok(_) if host.is_empty() => return Err(invalid("expected HOST:PORT")),
        Ok(_) => {}
    }
    let unreachable = |reason: String| TransportError::Unreachable { address: address.into(), reason };
    let mut found = tokio::net::lookup_host(address).await.map_err(|e| unreachable(e.to_string()))?;
    found
        .find(|a| a.is_ipv4() || local.is_ipv6())
        .ok_or_else(|| unreachable(format!("it has no IPv4 address, and this process listens on {}", local)))
}

/// Connection ids and reset tokens come from the identity's secret, so that a process that was killed and
/// started again recognises packets of its former life and resets those connections (RFC 9000,
/// 10.3): the peer hears of it at once, and not when the idle timeout is over.
fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let reset = hmac::Key::new(hmac::HMAC_SHA256, &identity.secret("lockstep stateless reset"));
    let [a, b, c, d, e, f, g, h, ..] = identity.secret("lockstep connection ids");
    let ids = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let mut config = EndpointConfig::new(Arc::new(reset));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    config
}

/// Of the two ends' idle timeouts the shorter one counts.
fn transport_config(idle_timeout: Duration) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        // The welcome, and nothing else.
        .max_concurrent_uni_streams(1u8.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(
            IdleTimeout::try_from(idle_timeout).expect("seconds fit a variable-length integer"),
        ));
    config
}

/// Runs every handshake in a task of its own, so that a slow one holds up nobody.
async fn accept_all(endpoint: quinn::Endpoint, shared: Arc<Shared>, ready: mpsc::Sender<Connection>) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        let busy = MAX_HANDSHAKES - slots.available_permits() >= UNVALIDATED_HANDSHAKES;
        let Some((incoming, slot)) = take_slot(incoming, &slots, busy) else { continue };
        let (shared, ready) = (shared.clone(), ready.clone());
        tokio::spawn(async move {
            let from = incoming.remote_address();
            match timeout(HANDSHAKE_DEADLINE, welcome(incoming, &shared, &ready)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%from, %error, "refused a connection"),
                Err(_) => tracing::warn!(%from, "refused a connection: its handshake did not end in time"),
            }
            drop(slot);
        });
    }
}

/// Gives a handshake one of the slots; turns it away if there is none, and first makes it prove that it
/// receives at its address if many are taken.
pub(super) fn take_slot(
    incoming: quinn::Incoming,
    slots: &Arc<Semaphore>,
    busy: bool,
) -> Option<(quinn::Incoming, OwnedSemaphorePermit)> {
    let Ok(slot) = slots.clone().try_acquire_owned() else {
        incoming.refuse();
        return None;
    };
    if busy && incoming.may_retry() {
        // Checked: `retry` fails only for one that has been retried.
        let _ = incoming.retry();
        return None;
    }
    Some((incoming, slot))
}

/// Why a socket can't be had.
pub(super) fn bind_error(bind: SocketAddr, source: io::Error) -> TransportError {
    match source.kind() {
        io::ErrorKind::AddrInUse => TransportError::AddressInUse { address: bind.to_string() },
        _ => TransportError::Bind { address: bind.to_string(), source },
    }
}

/// Completes one handshake, reads who it is and queues it.
async fn welcome(
    incoming: quinn::Incoming,
    shared: &Shared,
    ready: &mpsc::Sender<Connection>,
) -> Result<(), TransportError> {
    let connection = incoming.await.map_err(stream_error)?;
    let admitted = shared.admit(connection.clone())?;
    let place = ready.reserve().await.map_err(|_| TransportError::EndpointClosed)?;
    let mut welcome = connection.open_uni().await.map_err(stream_error)?;
    // Fails only if it was finished before.
    let _ = welcome.finish();
    tracing::debug!(peer = %admitted.peer(), from = %connection.remote_address(), "accepted a connection");
    place.send(admitted);
    Ok(())
}

/// An established connection.
#[derive(Clone)]
pub(super) struct Link(quinn::Connection);

impl Link {
    pub(super) async fn open_stream(&self) -> Result<Stream, TransportError> {
        self.0.open_bi().await.map(into_stream).map_err(stream_error)
    }

    pub(super) async fn accept_stream(&self) -> Result<Stream, TransportError> {
        self.0.accept_bi().await.map(into_stream).map_err(stream_error)
    }

    pub(super) async fn closed(&self) -> TransportError {
        stream_error(self.0.closed().await)
    }

    pub(super) async fn send_bulk(&self, chunk: Bytes, count: u64) -> Result<(), TransportError> {
        let (mut send, _recv) = self.0.open_bi().await.map_err(stream_error)?;
        for _ in 0..count {
            send.write_chunk(chunk.clone()).await.map_err(write_error)?;
        }
        Writer(send).finish().await
    }

    pub(super) async fn receive_bulk(&self) -> Result<u64, TransportError> {
        let (_send, mut recv) = self.0.accept_bi().await.map_err(stream_error)?;
        let (mut pieces, mut received) = ([const { Bytes::new() }; PIECES], 0);
        while let Some(count) = recv.read_chunks(&mut pieces).await.map_err(read_error)? {
            received += pieces[..count].iter().map(|piece| piece.len() as u64).sum::<u64>();
        }
        Ok(received)
    }

    pub(super) fn close(&self, reason: &str) {
        self.0.close(CODE_CLOSED.into(), reason.as_bytes());
    }

    pub(super) fn shut_out(&self, reason: &str) {
        self.0.close(CODE_SHUT_OUT.into(), reason.as_bytes());
    }
}

pub(super) fn into_stream((send, recv): (quinn::SendStream, quinn::RecvStream)) -> Stream {
    Stream::new(SendWire::Quic(Writer(send)), RecvWire::Quic(Reader(recv)))
}

pub(super) struct Writer(quinn::SendStream);

impl Writer {
    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), TransportError> {
        self.0.write_all(bytes).await.map_err(write_error)
    }

    pub(super) async fn write_shared(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        self.0.write_chunk(bytes).await.map_err(write_error)
    }

    /// quinn's own `finish` returns at once; `stopped` returns when everything is acknowledged, or
    /// the other end has stopped reading.
    pub(super) async fn finish(&mut self) -> Result<(), TransportError> {
        // Fails if the other end stopped reading, which `stopped` then says.
        let _ = self.0.finish();
        match self.0.stopped().await {
            Ok(_) => Ok(()),
            Err(StoppedError::ConnectionLost(e)) => Err(stream_error(e)),
            Err(StoppedError::ZeroRttRejected) => {
                Err(TransportError::NotWritable { reason: "it was closed" })
            }
        }
    }

    pub(super) fn reset(&mut self, code: u32) {
        // Fails only if it was reset before.
        let _ = self.0.reset(code.into());
    }
}

pub(super) struct Reader(quinn::RecvStream);

impl Reader {
    /// Appends what has arrived; `false` at the end.
    pub(super) async fn read(&mut self, into: &mut VecDeque<Bytes>) -> Result<bool, TransportError> {
        let mut pieces = [const { Bytes::new() }; PIECES];
        match self.0.read_chunks(&mut pieces).await {
            Ok(Some(count)) => {
                into.extend(pieces.into_iter().take(count));
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(e) => Err(read_error(e)),
        }
    }
}

/// Said to whoever speaks under a name that the other end does not know.
const OTHER_VERSION: &str =
    "it speaks another version of Lockstep's protocol; give all processes of a cluster the same build";

/// TLS alert 120, no_application_protocol.
fn no_common_protocol() -> TransportErrorCode {
    TransportErrorCode::crypto(120)
}

/// Why a connection attempt failed. TLS alerts are QUIC errors 0x100 to 0x1ff (RFC 9001, 4.8).
pub(super) fn connect_error(address: &str, role: Role, error: ConnectionError) -> TransportError {
    let is_tls = |code: TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
    let address = address.to_owned();
    match error {
        ConnectionError::TransportError(e) if is_tls(e.code) => {
            TransportError::Untrusted { address, role: role.as_str(), reason: e.reason }
        }
        // Whichever end noticed: the names under which both speak hold their versions.
        ConnectionError::ConnectionClosed(e) if e.error_code == no_common_protocol() => {
            TransportError::Refused { address, reason: OTHER_VERSION.into() }
        }
        ConnectionError::ConnectionClosed(e) if is_tls(e.error_code) => {
            TransportError::Refused { address, reason: e.to_string() }
        }
        ConnectionError::ConnectionClosed(e) if e.error_code == TransportErrorCode::CONNECTION_REFUSED => {
            TransportError::Busy { address }
        }
        ConnectionError::VersionMismatch => {
            TransportError::Refused { address, reason: "it speaks another version of QUIC".into() }
        }
        // quinn's own limit for a handshake is the idle timeout.
        ConnectionError::TimedOut => {
            let deadline = if role == Role::Node { PEER_IDLE_TIMEOUT } else { IDLE_TIMEOUT };
            TransportError::ConnectTimeout { address, deadline }
        }
        other => stream_error(other),
    }
}

/// Why a stream can't be written.
fn write_error(error: WriteError) -> TransportError {
    match error {
        WriteError::Stopped(_) => TransportError::Stopped,
        WriteError::ConnectionLost(e) => stream_error(e),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => {
            TransportError::NotWritable { reason: "it was closed" }
        }
    }
}

/// Why a stream can't be read.
fn read_error(error: ReadError) -> TransportError {
    match error {
        // Ours are of 32 bits; what is longer says nothing that we know.
        ReadError::Reset(code) => {
            TransportError::Reset { code: u32::try_from(code.into_inner()).unwrap_or(0) }
        }
        ReadError::ConnectionLost(e) => stream_error(e),
        e => TransportError::Lost { reason: e.to_string() },
    }
}

/// Why an established connection is gone.
pub(super) fn stream_error(error: ConnectionError) -> TransportError {
    match error {
        ConnectionError::ApplicationClosed(e) => {
            let reason = String::from_utf8_lossy(&e.reason).into_owned();
            match e.error_code == CODE_SHUT_OUT.into() {
                true => TransportError::ShutOut { reason },
                false => TransportError::ClosedByPeer { reason },
            }
        }
        ConnectionError::LocallyClosed => TransportError::ClosedLocally,
        ConnectionError::TimedOut => TransportError::TimedOut,
        other => TransportError::Lost { reason: other.to_string() },
    }
}

//! The twin inside one process: channels instead of packets, no certificates, the same promises.
//! Its ends may live on different threads and different runtimes.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex as StdMutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::{
    Connection, MAX_STREAMS, Peer, Role, Stream, TransportError,
    connection::Wire,
    name,
    stream::{RecvWire, SendWire},
};

/// Connections that nobody has accepted yet, as over QUIC.
const ACCEPT_QUEUE: usize = 64;

/// Largest piece in which bytes travel.
const PIECE: usize = 64 << 10;

/// Pieces under way in one direction of a stream: 2 MiB.
const PIECES: usize = 32;

/// The network that in-memory endpoints of one process share.
#[derive(Clone, Default)]
pub struct MemoryNetwork(Arc<Network>);

struct Network {
    /// Told from other networks of this host.
    cluster: String,
    stations: StdMutex<HashMap<String, Registration>>,
    /// Tells those who wait for an address that somebody has come.
    arrivals: Notify,
}

impl Default for Network {
    fn default() -> Self {
        // The keys of a hasher are random in each process and differ from call to call.
        let random = RandomState::new().hash_one(std::process::id());
        Self { cluster: format!("{random:016x}"), stations: StdMutex::default(), arrivals: Notify::new() }
    }
}

/// How a station is reached.
#[derive(Clone)]
struct Registration {
    role: Role,
    visitors: mpsc::Sender<Connection>,
    links: Links,
}

/// The connections of one station, to be closed with it.
type Links = Arc<StdMutex<Vec<(Weak<Link>, End)>>>;

/// A registered name.
pub(super) struct Station {
    network: MemoryNetwork,
    me: Peer,
    visitors: Mutex<mpsc::Receiver<Connection>>,
    links: Links,
    closed: watch::Sender<bool>,
}

impl Station {
    pub(super) fn register(network: &MemoryNetwork, role: Role, name: &str) -> Result<Self, TransportError> {
        name::check_name(name)?;
        let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
        let links = Links::default();
        {
            let mut stations = lock(&network.0.stations);
            if stations.contains_key(name) {
                return Err(TransportError::AddressInUse { address: format!("memory:{name}") });
            }
            stations.insert(name.into(), Registration { role, visitors: sender, links: links.clone() });
        }
        network.0.arrivals.notify_waiters();
        Ok(Self {
            network: network.clone(),
            me: Peer { role, name: name.into() },
            visitors: Mutex::new(receiver),
            links,
            closed: watch::Sender::new(false),
        })
    }

    pub(super) fn local_address(&self) -> String {
        format!("memory:{}", self.me.name)
    }

    pub(super) fn cluster(&self) -> &str {
        &self.network.0.cluster
    }

    pub(super) async fn connect(&self, address: &str, role: Role) -> Result<Connection, TransportError> {
        let name = address.strip_prefix("memory:").ok_or_else(|| TransportError::InvalidAddress {
            address: address.into(),
            reason: "expected memory:NAME".into(),
        })?;
        let target = self.find(name).await?;
        if target.role != role {
            let reason = format!("it is a {}", target.role);
            return Err(TransportError::Untrusted { address: address.into(), role: role.as_str(), reason });
        }
        let (near, far) = link();
        note(&self.links, &near);
        note(&target.links, &far);
        let there = Connection::new(self.me.clone(), None, Wire::Memory(far));
        let here = Connection::new(Peer { role, name: name.into() }, None, Wire::Memory(near));
        // Fails when the other station closed meanwhile.
        target
            .visitors
            .send(there)
            .await
            .map_err(|_| TransportError::ClosedByPeer { reason: SHUTTING_DOWN.into() })?;
        Ok(here)
    }

    /// Waits until somebody has the name, as QUIC goes on sending until somebody answers.
    async fn find(&self, name: &str) -> Result<Registration, TransportError> {
        loop {
            let arrival = self.network.0.arrivals.notified();
            if *self.closed.borrow() {
                return Err(TransportError::EndpointClosed);
            }
            // Looked up after `notified`, so that nobody comes unseen between the two.
            let found = lock(&self.network.0.stations).get(name).cloned();
            match found {
                Some(registration) => return Ok(registration),
                None => arrival.await,
            }
        }
    }

    pub(super) async fn accept(&self) -> Option<Connection> {
        let mut closed = self.closed.subscribe();
        let mut visitors = self.visitors.lock().await;
        tokio::select! {
            biased;
            // Fails only without a sender, and `self` holds it.
            _ = closed.wait_for(|closed| *closed) => None,
            visitor = visitors.recv() => visitor,
        }
    }

    pub(super) fn close(&self) {
        if self.closed.send_replace(true) {
            return;
        }
        self.leave();
        // One who is still looking for an address looks again, and sees that we are closed.
        self.network.0.arrivals.notify_waiters();
        for (link, end) in lock(&self.links).drain(..) {
            if let Some(link) = link.upgrade() {
                link.close(end, SHUTTING_DOWN);
            }
        }
    }

    fn leave(&self) {
        let mut stations = lock(&self.network.0.stations);
        // The name may be a successor's by now.
        if stations.get(&self.me.name).is_some_and(|r| Arc::ptr_eq(&r.links, &self.links)) {
            stations.remove(&self.me.name);
        }
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        self.leave();
    }
}

/// What both twins say when an endpoint closes.
const SHUTTING_DOWN: &str = "shutting down";

fn note(links: &Links, side: &Side) {
    let mut links = lock(links);
    links.retain(|(link, _)| link.strong_count() > 0);
    links.push((Arc::downgrade(&side.link), side.end));
}

/// The critical sections of this file only move values: one that panicked left nothing half-done.
fn lock<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Caller,
    Called,
}

/// What the two ends of a connection share: whether it is closed, by whom and why.
struct Link {
    closed: watch::Sender<Option<(End, String)>>,
}

impl Link {
    fn close(&self, by: End, reason: &str) {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some((by, reason.into()));
            }
            first
        });
    }
}

/// One end of a connection; closes it when dropped. Streams hold it too.
pub(super) struct Side {
    link: Arc<Link>,
    end: End,
    opened: mpsc::Sender<Offer>,
    offered: Mutex<mpsc::Receiver<Offer>>,
    /// Streams that this end may still open.
    openable: Arc<Semaphore>,
}

/// The far end of a new stream: holds no `Side`, or an offer that nobody takes would keep its own
/// connection alive.
struct Offer {
    send: Inlet,
    recv: Outlet,
    permit: Arc<OwnedSemaphorePermit>,
}

enum Piece {
    Data(Bytes),
    Finish,
}

/// One direction of a stream. The code says why the sender was dropped before its `Finish`.
type Inlet = (mpsc::Sender<Piece>, Arc<AtomicU32>);
type Outlet = (mpsc::Receiver<Piece>, Arc<AtomicU32>);

fn pipe() -> (Inlet, Outlet) {
    let (sender, receiver) = mpsc::channel(PIECES);
    let reset_code = Arc::new(AtomicU32::new(0));
    ((sender, reset_code.clone()), (receiver, reset_code))
}

fn link() -> (Arc<Side>, Arc<Side>) {
    let link = Arc::new(Link { closed: watch::Sender::new(None) });
    // As many as can be open: an offer never waits.
    let (to_called, from_caller) = mpsc::channel(MAX_STREAMS as usize);
    let (to_caller, from_called) = mpsc::channel(MAX_STREAMS as usize);
    let side = |end, opened, offered| {
        let openable = Arc::new(Semaphore::new(MAX_STREAMS as usize));
        Arc::new(Side { link: link.clone(), end, opened, offered: Mutex::new(offered), openable })
    };
    (side(End::Caller, to_called, from_called), side(End::Called, to_caller, from_caller))
}

impl Side {
    pub(super) async fn open_stream(self: &Arc<Self>) -> Result<Stream, TransportError> {
        let permit = tokio::select! {
            biased;
            error = self.closed() => return Err(error),
            permit = self.openable.clone().acquire_owned() => Arc::new(permit.map_err(|_| TransportError::EndpointClosed)?),
        };
        let (near_send, far_recv) = pipe();
        let (far_send, near_recv) = pipe();
        let offer = Offer { send: far_send, recv: far_recv, permit: permit.clone() };
        match self.opened.send(offer).await {
            Ok(()) => Ok(self.stream(Offer { send: near_send, recv: near_recv, permit })),
            // The other side is dropped, which has closed the link.
            Err(_) => Err(self.closed().await),
        }
    }

    pub(super) async fn accept_stream(self: &Arc<Self>) -> Result<Stream, TransportError> {
        let mut offered = self.offered.lock().await;
        tokio::select! {
            biased;
            Some(offer) = offered.recv() => Ok(self.stream(offer)),
            error = self.closed() => Err(error),
        }
    }

    fn stream(self: &Arc<Self>, Offer { send, recv, permit }: Offer) -> Stream {
        let ((pieces, reset_code), side) = (send, self.clone());
        let writer = Writer { pieces: Some(pieces), reset_code, side, _permit: permit.clone() };
        let ((pieces, reset_code), side) = (recv, self.clone());
        let reader = Reader { pieces, reset_code, ended: false, side, _permit: permit };
        Stream::new(SendWire::Memory(writer), RecvWire::Memory(reader))
    }

    pub(super) async fn closed(&self) -> TransportError {
        let mut watching = self.link.closed.subscribe();
        // Fails only without a sender, and `self` holds it.
        let _ = watching.wait_for(Option::is_some).await;
        self.why_closed().unwrap_or(TransportError::EndpointClosed)
    }

    fn why_closed(&self) -> Option<TransportError> {
        self.link.closed.borrow().as_ref().map(|(by, reason)| match *by == self.end {
            true => TransportError::ClosedLocally,
            false => TransportError::ClosedByPeer { reason: reason.clone() },
        })
    }

    pub(super) fn close(&self, reason: &str) {
        self.link.close(self.end, reason);
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.link.close(self.end, "");
    }
}

pub(super) struct Writer {
    /// Dropped without a `Finish` before: a reset.
    pieces: Option<mpsc::Sender<Piece>>,
    reset_code: Arc<AtomicU32>,
    side: Arc<Side>,
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Writer {
    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), TransportError> {
        for piece in bytes.chunks(PIECE) {
            self.send(Piece::Data(Bytes::copy_from_slice(piece))).await?;
        }
        Ok(())
    }

    /// What is in the channel is at the other end, whatever becomes of this one.
    pub(super) async fn finish(&mut self) -> Result<(), TransportError> {
        match self.send(Piece::Finish).await {
            Ok(()) | Err(TransportError::Stopped) => {
                self.pieces = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn send(&mut self, piece: Piece) -> Result<(), TransportError> {
        let Some(pieces) = &self.pieces else {
            return Err(TransportError::NotWritable { reason: "it was closed" });
        };
        tokio::select! {
            biased;
            error = self.side.closed() => Err(error),
            sent = pieces.send(piece) => sent.map_err(|_| TransportError::Stopped),
        }
    }

    pub(super) fn reset(&mut self, code: u32) {
        // Before the drop that makes the reader look at it.
        self.reset_code.store(code, Ordering::Release);
        self.pieces = None;
    }
}

pub(super) struct Reader {
    pieces: mpsc::Receiver<Piece>,
    reset_code: Arc<AtomicU32>,
    ended: bool,
    side: Arc<Side>,
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Reader {
    /// Appends what has arrived; `false` at the end.
    pub(super) async fn read(&mut self, into: &mut VecDeque<Bytes>) -> Result<bool, TransportError> {
        if self.ended {
            return Ok(false);
        }
        let piece = tokio::select! {
            biased;
            piece = self.pieces.recv() => piece,
            error = self.side.closed() => return Err(error),
        };
        match piece {
            Some(Piece::Data(bytes)) => {
                into.push_back(bytes);
                Ok(true)
            }
            Some(Piece::Finish) => {
                self.ended = true;
                Ok(false)
            }
            // Its writer is gone: with the connection, or alone.
            None => Err(self.side.why_closed().unwrap_or_else(|| {
                let code = self.reset_code.load(Ordering::Acquire);
                TransportError::Reset { code }
            })),
        }
    }
}

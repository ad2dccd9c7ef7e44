//! The coordinator on the network: who connects, what each stream carries, and who may send it.
//!
//! Every stream has a task of its own that reads, checks and waits, so that the actor only
//! decides. Connections, streams and bytes in flight are bounded; whoever is over a bound waits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use actix::Addr;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::{
    journal::Journal,
    protocol::{
        BlobRef, BlobReply, Call, ClientRequest, ClientResponse, CoordinatorMessage, MAX_MESSAGE, NodeHello,
        NodeId, NodeMessage, Operation, Payload, StreamOpen, decode, encode,
    },
    store::BlobStore,
    transport::{Connection, Endpoint, RecvHalf, Role, SendHalf, Stream},
    types::{ErrorKind, OperationError},
};

use super::{
    CoordinatorConfig, CoordinatorError,
    actor::{Ask, Clock, Coordinator, Count, Gone, Happened, Join, Link, Stopped},
    backup::Backup,
    blobs::Blobs,
    doorkeeper::Doorkeeper,
    state::{Event, State, WaiterId},
    sweep::sweep,
};

/// Connections at once: nodes, gateways and clients.
const CONNECTIONS_MAX: usize = 1_024;

/// Control streams at once.
const NODES_MAX: u32 = 512;

/// Streams of one connection at once: a gateway has one for each request that it holds.
const STREAMS_MAX: usize = 4_352;

/// Control messages on their way to one node. Full: the node does not read, so it is lost.
const CONTROL_QUEUE: usize = 1_024;

/// How long the opener of a stream may take to say what it carries.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// How long one frame may take to be written.
const SEND_DEADLINE: Duration = Duration::from_secs(30);

/// Beyond the longest wait of the state machine: an answer that takes longer never comes.
const ANSWER_SLACK: Duration = Duration::from_secs(120);

/// How long nodes have to hang up after they were told to shut down.
const FAREWELL: Duration = Duration::from_secs(3);

/// Runs a coordinator on `endpoint` until `shutdown` resolves, then drains: takes snapshots,
/// tells the nodes to stop, closes the journal. Must run inside an actix system.
pub async fn serve(
    config: CoordinatorConfig,
    endpoint: Endpoint,
    shutdown: impl Future<Output = ()>,
) -> Result<(), CoordinatorError> {
    let data_dir = config.data_dir.clone();
    let opened = tokio::task::spawn_blocking(move || Journal::open(&data_dir));
    let (journal, recovered) = opened.await.map_err(|_| CoordinatorError::ActorDied)??;
    // After the journal, whose lock says that nobody else uses the blobs.
    let store = BlobStore::open(&config.data_dir, config.store.as_ref()).await?;
    if let Some(opened) = config.opened {
        opened();
    }
    let clock = Clock::start();
    let generate_deadline = config.limits.generate_deadline;
    let state = State::recover(config.limits, recovered, clock.now_ms());
    let revocations = state.revocations();
    let doorkeeper = Doorkeeper::new(config.authority, endpoint.clone());
    let (actor, mut stopped) =
        Coordinator::launch(state, clock, journal.clone(), generate_deadline, doorkeeper.clone());
    doorkeeper.begin(revocations, &actor).await;
    let alone = Arc::default();
    let sweeping = tokio::spawn(sweep(store.clone(), journal.clone(), actor.clone(), Arc::clone(&alone)));
    let server = Arc::new(Server {
        actor,
        backup: Backup::new(&config.data_dir, journal.clone(), store.clone(), alone),
        blobs: Blobs::new(store),
        doorkeeper,
        answer_deadline: generate_deadline + ANSWER_SLACK,
        next_waiter: AtomicU64::new(1),
        next_node: AtomicU32::new(1),
        connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        nodes: Semaphore::new(NODES_MAX as usize),
    });

    let ended = tokio::select! {
        ended = accept(server.clone(), &endpoint) => Err(ended),
        how = &mut stopped => Err(why_it_stopped(how).err().unwrap_or(CoordinatorError::ActorDied)),
        () = shutdown => Ok(()),
    };
    sweeping.abort();
    let drained = match ended {
        Ok(()) => drain(&server, &endpoint, stopped).await,
        Err(error) => Err(error),
    };
    // Waits for the disk, which no task of this runtime should do itself.
    let closed = tokio::task::spawn_blocking(move || journal.close()).await;
    endpoint.close().await;
    closed.map_err(|_| CoordinatorError::ActorDied).and(drained)
}

/// Lets the state machine end what runs; connections are served meanwhile.
async fn drain(
    server: &Arc<Server>,
    endpoint: &Endpoint,
    stopped: oneshot::Receiver<Stopped>,
) -> Result<(), CoordinatorError> {
    server.tell(Event::Drain).await;
    tokio::select! {
        ended = accept(server.clone(), endpoint) => return Err(ended),
        how = stopped => why_it_stopped(how)?,
    }
    // The last permit comes back when the last node has hung up.
    let _ = tokio::time::timeout(FAREWELL, server.nodes.acquire_many(NODES_MAX)).await;
    Ok(())
}

/// What the actor said at its end; one that said nothing has died.
fn why_it_stopped(how: Result<Stopped, oneshot::error::RecvError>) -> Result<(), CoordinatorError> {
    Ok(how.map_err(|_| CoordinatorError::ActorDied)??)
}

/// Accepts connections for ever.
async fn accept(server: Arc<Server>, endpoint: &Endpoint) -> CoordinatorError {
    loop {
        // The semaphore is never closed.
        let Ok(permit) = server.connections.clone().acquire_owned().await else {
            return CoordinatorError::EndpointClosed;
        };
        let Some(connection) = endpoint.accept().await else {
            return CoordinatorError::EndpointClosed;
        };
        tokio::spawn(server.clone().connection(connection, permit));
    }
}

/// What the tasks of all streams share.
struct Server {
    actor: Addr<Coordinator>,
    backup: Backup,
    blobs: Blobs,
    doorkeeper: Arc<Doorkeeper>,
    answer_deadline: Duration,
    next_waiter: AtomicU64,
    next_node: AtomicU32,
    connections: Arc<Semaphore>,
    nodes: Semaphore,
}

impl Server {
    async fn connection(self: Arc<Self>, connection: Connection, _permit: OwnedSemaphorePermit) {
        let streams = Arc::new(Semaphore::new(STREAMS_MAX));
        let _guest = self.doorkeeper.enter(&connection, &self.actor).await;
        loop {
            let Ok(permit) = streams.clone().acquire_owned().await else { return };
            let stream = match connection.accept_stream().await {
                Ok(stream) => stream,
                Err(reason) => {
                    tracing::debug!(peer = ?connection.peer(), "connection ended: {reason}");
                    return;
                }
            };
            let (server, connection) = (self.clone(), connection.clone());
            tokio::spawn(async move {
                server.stream(connection, stream).await;
                drop(permit);
            });
        }
    }

    /// Reads what a stream carries and sees to it. Whoever sends what is no message of ours, or
    /// nothing, finds the stream reset.
    async fn stream(&self, connection: Connection, mut stream: Stream) {
        let peer = connection.peer().clone();
        let frame = match tokio::time::timeout(OPEN_DEADLINE, stream.recv.recv_frame(MAX_MESSAGE)).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return,
            Ok(Err(reason)) => {
                return tracing::debug!(?peer, "stream ended before its first frame: {reason}");
            }
            Err(_) => return tracing::warn!(?peer, "a stream was opened and nothing was sent"),
        };
        let open = match decode::<StreamOpen>("stream's first frame", &frame, MAX_MESSAGE) {
            Ok(open) => open,
            Err(error) => return tracing::warn!(?peer, "{error}"),
        };
        match (open, peer.role) {
            (StreamOpen::NodeControl(hello), Role::Node) => self.node(connection, hello, stream).await,
            (StreamOpen::Request { call, request }, Role::Client | Role::Gateway) => {
                self.request(connection, call, request, stream).await;
            }
            (StreamOpen::GetBlobPart { digest, offset, length }, Role::Client | Role::Gateway) => {
                self.blobs.get_part(&mut stream.send, digest, offset, length).await;
            }
            (StreamOpen::Figures, Role::Client | Role::Gateway) => {
                // The actor is gone only with this process.
                let Ok(figures) = self.actor.send(Count).await else { return };
                send_last(&mut stream.send, &encode(&figures)).await;
            }
            (StreamOpen::Trust(held), Role::Node | Role::Client | Role::Gateway) => {
                let reply = self.doorkeeper.trust(&connection, held, &self.actor).await;
                let Some(reply) = reply else { return };
                send_last(&mut stream.send, &encode(&reply)).await;
            }
            (StreamOpen::Renew { public_key }, Role::Node | Role::Client | Role::Gateway) => {
                let Some(reply) = self.doorkeeper.renew(&connection, public_key).await else { return };
                send_last(&mut stream.send, &encode(&reply)).await;
            }
            (StreamOpen::PutBlob { digest, size }, Role::Node | Role::Client | Role::Gateway) => {
                let reply = self.blobs.put(&mut stream.recv, BlobRef { digest, size }).await;
                send_last(&mut stream.send, &encode(&reply)).await;
            }
            (StreamOpen::GetBlob { digest }, Role::Node | Role::Client | Role::Gateway) => {
                self.blobs.get(&mut stream.send, digest).await;
            }
            (open, _) => self.forbid(open, &mut stream.send, &connection).await,
        }
    }

    /// The peer's certificate does not allow what it asks.
    async fn forbid(&self, open: StreamOpen, send: &mut SendHalf, connection: &Connection) {
        let peer = connection.peer();
        tracing::warn!(?peer, "a stream that its role may not open");
        let error = OperationError::new(
            ErrorKind::PermissionDenied,
            format!("a {:?} may not send this; use a certificate of the right role", peer.role),
        );
        match open {
            StreamOpen::Request { .. } => send_last(send, &encode(&ClientResponse::Error(error))).await,
            StreamOpen::PutBlob { .. } | StreamOpen::GetBlob { .. } | StreamOpen::GetBlobPart { .. } => {
                send_last(send, &encode(&BlobReply::Refused(error))).await;
            }
            StreamOpen::NodeControl(_)
            | StreamOpen::Generate(_)
            | StreamOpen::Collective { .. }
            | StreamOpen::Figures
            | StreamOpen::Trust(_)
            | StreamOpen::Renew { .. } => {}
        }
    }

    /// One request and its answer.
    async fn request(&self, connection: Connection, call: Call, request: ClientRequest, stream: Stream) {
        let Stream { mut send, recv } = stream;
        let presigned = matches!(request, ClientRequest::CheckpointFiles { presigned: true, .. });
        let mut response = match self.missing_blob(&request).await {
            Some(error) => ClientResponse::Error(error),
            None if is_of_the_keeper(&request) && connection.peer().role != Role::Client => {
                let problem = "only a client's own certificate may ask this, not a gateway's";
                ClientResponse::Error(OperationError::new(ErrorKind::PermissionDenied, problem))
            }
            None if request == ClientRequest::BackUp => self.back_up().await,
            None => {
                let request = match request {
                    ClientRequest::RotateCa { finish } => {
                        match self.doorkeeper.rotate(finish, &self.actor).await {
                            Ok(()) => ClientRequest::ClusterStatus,
                            Err(error) => {
                                return send_last(&mut send, &encode(&ClientResponse::Error(error))).await;
                            }
                        }
                    }
                    request => request,
                };
                match self.answer(connection, call, request, recv).await {
                    Some(response) => response,
                    None => return,
                }
            }
        };
        if let (ClientResponse::CheckpointFiles(page), true) = (&mut response, presigned) {
            self.blobs.presign(&mut page.presigned_urls).await;
        }
        let mut frame = encode(&response);
        if frame.len() > MAX_MESSAGE {
            let problem = format!("the answer of {} bytes is over the limit of {MAX_MESSAGE}", frame.len());
            frame =
                encode(&ClientResponse::Error(OperationError::new(ErrorKind::ResourceExhausted, problem)));
        }
        send_last(&mut send, &frame).await;
    }

    async fn back_up(&self) -> ClientResponse {
        self.backup.take().await.map_or_else(ClientResponse::Error, ClientResponse::Blob)
    }

    /// Asks the actor; `None` when nobody waits any more.
    async fn answer(
        &self,
        connection: Connection,
        call: Call,
        request: ClientRequest,
        mut recv: RecvHalf,
    ) -> Option<ClientResponse> {
        let waiter = WaiterId(self.next_waiter.fetch_add(1, Ordering::Relaxed));
        let (reply, answered) = oneshot::channel();
        self.actor.send(Ask { waiter, call, request, reply }).await.ok()?;
        let gone = async {
            // The end of the request is no news; a reset of it, or a lost connection, is.
            if let Ok(None) = recv.recv_frame(0).await {
                connection.closed().await;
            }
        };
        tokio::select! {
            // A dropped sender: the coordinator is stopping, and the client asks the next one.
            response = answered => response.ok(),
            () = gone => {
                self.actor.send(Gone { waiter }).await.ok()?;
                None
            }
            () = tokio::time::sleep(self.answer_deadline) => {
                self.actor.send(Gone { waiter }).await.ok()?;
                let late = format!("no answer within {} s", self.answer_deadline.as_secs());
                Some(ClientResponse::Error(OperationError::new(ErrorKind::DeadlineExceeded, late)))
            }
        }
    }

    /// A blob must be durable before the operation that names it is accepted.
    async fn missing_blob(&self, request: &ClientRequest) -> Option<OperationError> {
        let ClientRequest::Submit(submit) = request else { return None };
        match &submit.operation {
            Operation::Forward { data: Payload::Blob(blob), .. }
            | Operation::ForwardBackward { data: Payload::Blob(blob), .. } => {
                self.blobs.missing("data", blob).await
            }
            Operation::LoadState { path, .. } => {
                self.blobs.missing("path", &BlobRef::from_load_path(path)?).await
            }
            _ => None,
        }
    }

    /// A node's control stream, both ways, for as long as it lasts.
    async fn node(&self, connection: Connection, hello: NodeHello, stream: Stream) {
        if hello.name != connection.peer().name {
            tracing::warn!(peer = ?connection.peer(), "it calls itself {:?}", hello.name);
            return connection.close("a node's name must be the one of its certificate");
        }
        let Ok(_permit) = self.nodes.try_acquire() else {
            return connection.close("the cluster has as many nodes as it can");
        };
        let Stream { send, mut recv } = stream;
        let node = NodeId(self.next_node.fetch_add(1, Ordering::Relaxed));
        let (control, queue) = mpsc::channel(CONTROL_QUEUE);
        let link = Link { control, connection: connection.clone() };
        let writer = tokio::spawn(write_control(send, queue));
        if self.actor.send(Join { node, hello, link }).await.is_err() {
            return;
        }
        let reason = tokio::select! {
            reason = self.read_control(node, &mut recv) => reason,
            written = writer => written.unwrap_or_else(|e| Err(e.to_string())).err()
                .unwrap_or_else(|| "its control stream was closed".to_owned()),
        };
        self.tell(Event::NodeLost { node, reason }).await;
        // Long enough open for what is still on its way; the node hangs up or has done so.
        let _ = tokio::time::timeout(FAREWELL, connection.closed()).await;
        connection.close("its control stream ended");
    }

    /// Hands on what a node says until it says no more; returns why.
    async fn read_control(&self, node: NodeId, recv: &mut RecvHalf) -> String {
        loop {
            let frame = match recv.recv_frame(MAX_MESSAGE).await {
                Ok(Some(frame)) => frame,
                Ok(None) => return "it closed its control stream".to_owned(),
                Err(reason) => return reason.to_string(),
            };
            match decode::<NodeMessage>("node's message", &frame, MAX_MESSAGE) {
                Ok(message) => self.tell(Event::NodeMessage { node, message }).await,
                Err(error) => return error.to_string(),
            }
        }
    }

    /// Tells the actor, waiting for room. That it is gone is seen where its end is awaited.
    async fn tell(&self, event: Event) {
        let _ = self.actor.send(Happened(event)).await;
    }
}

/// Whether everything of everyone hangs on it, so that only whoever keeps the service may ask.
fn is_of_the_keeper(request: &ClientRequest) -> bool {
    matches!(request, ClientRequest::BackUp | ClientRequest::Revoke { .. } | ClientRequest::RotateCa { .. })
}

/// Writes what is queued for a node until the queue is closed.
async fn write_control(
    mut send: SendHalf,
    mut queue: mpsc::Receiver<CoordinatorMessage>,
) -> Result<(), String> {
    while let Some(message) = queue.recv().await {
        let frame = encode(&message);
        match tokio::time::timeout(SEND_DEADLINE, send.send_frame(&frame)).await {
            Ok(sent) => sent.map_err(|e| e.to_string())?,
            Err(_) => return Err(format!("it took no message for {} s", SEND_DEADLINE.as_secs())),
        }
    }
    send.finish().await.map_err(|e| e.to_string())
}

/// The last frame of a stream. If it can't be sent, nobody is there to be told.
pub(super) async fn send_last(send: &mut SendHalf, frame: &[u8]) {
    let sent = tokio::time::timeout(SEND_DEADLINE, async {
        send.send_frame(frame).await?;
        send.finish().await
    });
    match sent.await {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => tracing::debug!("an answer was not taken: {reason}"),
        Err(_) => tracing::debug!("an answer was not taken for {} s", SEND_DEADLINE.as_secs()),
    }
}

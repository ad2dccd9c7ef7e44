//! One connection to the coordinator, from the hello to its end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::Addr;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    collective, join,
    model::Library,
    protocol::{
        CoordinatorMessage, Epoch, MAX_MESSAGE, ModelOffer, NodeHello, NodeId, NodeMessage, Numerics,
        PROTOCOL_VERSION, StreamOpen, decode, encode,
    },
    transport::{Connection, Endpoint, RecvHalf, Role, SendHalf, Stream},
};

use super::{
    AbortOnDrop, NodeConfig, NodeError,
    actor::{Connected, NodeActor, Notice, Uplink},
    blobs::BlobClient,
    generate, gpu_seat,
    memory::Memory,
    peers::Peers,
    state::{Event, SessionNumber},
};

/// For a handshake.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// From the handshake to the welcome: tokenizers are stored in between.
const HELLO_DEADLINE: Duration = Duration::from_secs(60);

/// Reports that may wait for the control stream.
const OUTBOX: usize = 1024;

/// Between two attempts to reach the coordinator: doubles from the first to the last. A
/// coordinator on the same machine is back within a second.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);

/// What every connection of a node starts from.
pub(super) struct Sessions {
    config: NodeConfig,
    endpoint: Endpoint,
    library: Arc<Library>,
    blobs: BlobClient,
    peers: Peers,
    node: Addr<NodeActor>,
    tickets: generate::Tickets,
    /// Connections so far.
    count: u64,
}

/// Why a connection ended, and whether it had begun.
enum Ended {
    BeforeWelcome(String),
    AfterWelcome(String),
    /// The coordinator said `Shutdown` before it hung up; the node is stopping.
    ToldToGo,
}

/// A connection whose coordinator has said welcome.
struct Welcomed {
    send: SendHalf,
    recv: RecvHalf,
    node: NodeId,
    epoch: Epoch,
}

impl Sessions {
    pub(super) fn new(
        config: NodeConfig,
        endpoint: Endpoint,
        library: Arc<Library>,
        blobs: BlobClient,
        peers: Peers,
        node: Addr<NodeActor>,
    ) -> Self {
        Self {
            config,
            endpoint,
            library,
            blobs,
            peers,
            node,
            tickets: generate::Tickets::default(),
            count: 0,
        }
    }

    /// Keeps a connection to the coordinator, whatever happens to it. Returns only when another
    /// attempt is no use. Dropping the future closes the connection.
    pub(super) async fn keep(mut self) -> NodeError {
        let mut backoff = BACKOFF_FIRST;
        loop {
            match self.serve_one().await {
                Ok(Ended::BeforeWelcome(reason)) => {
                    tracing::info!(%reason, retry_in = ?backoff, "the coordinator is away");
                }
                Ok(Ended::AfterWelcome(reason)) => {
                    tracing::warn!(%reason, "lost the coordinator");
                    backoff = BACKOFF_FIRST;
                }
                Ok(Ended::ToldToGo) => tracing::debug!("the coordinator has hung up"),
                Err(error) => return error,
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_LAST);
        }
    }

    async fn serve_one(&mut self) -> Result<Ended, NodeError> {
        let address = &self.config.coordinator;
        let connection = match self.endpoint.connect(address, Role::Coordinator, CONNECT_DEADLINE).await {
            Ok(connection) => connection,
            Err(e) if e.is_retryable() => return Ok(Ended::BeforeWelcome(e.to_string())),
            Err(source) => return Err(NodeError::Join { coordinator: address.clone(), source }),
        };
        self.blobs.connect(Some(connection.clone()));
        let _closing = CloseOnDrop { connection: &connection, blobs: &self.blobs };
        let Welcomed { send, recv, node, epoch } =
            match tokio::time::timeout(HELLO_DEADLINE, self.greet(&connection)).await {
                Ok(Ok(welcomed)) => welcomed,
                Ok(Err(reason)) => return Ok(Ended::BeforeWelcome(reason)),
                Err(_) => return Ok(Ended::BeforeWelcome(format!("no welcome within {HELLO_DEADLINE:?}"))),
            };
        tracing::info!(node = %self.config.name, id = node.0, epoch = epoch.0, "joined the coordinator at {address}");

        self.count += 1;
        let session = SessionNumber(self.count);
        let (outbox, reports) = mpsc::channel(OUTBOX);
        let uplink = Uplink { connection: connection.clone(), outbox };
        // A node that has stopped ends this future, too.
        let _ = self.node.send(Connected(Event::Connected { session, node, epoch }, uplink)).await;
        let _fresh = AbortOnDrop(tokio::spawn(join::keep_fresh(connection.clone(), self.endpoint.clone())));
        let requests = generate::accept(connection.clone(), self.node.clone(), self.tickets.clone());
        let _accepting = AbortOnDrop(tokio::spawn(requests));
        let told_to_go = AtomicBool::new(false);
        let reason = tokio::select! {
            reason = read(recv, session, &self.node, &self.peers, &told_to_go) => reason,
            reason = write(send, reports) => reason,
            reason = connection.closed() => reason.to_string(),
        };
        let _ = self.node.send(Notice(Event::Disconnected { session })).await;
        Ok(match told_to_go.into_inner() {
            true => Ended::ToldToGo,
            false => Ended::AfterWelcome(reason),
        })
    }

    /// Introduces the node. An error is a sentence for the log: whatever it is, a later attempt
    /// may go well.
    async fn greet(&self, connection: &Connection) -> Result<Welcomed, String> {
        let hello = self.hello().await?;
        let mut control = connection.open_stream().await.map_err(|e| e.to_string())?;
        let opening = encode(&StreamOpen::NodeControl(hello));
        control.send.send_frame(&opening).await.map_err(|e| e.to_string())?;
        let Stream { send, mut recv } = control;
        match receive(&mut recv).await? {
            CoordinatorMessage::Welcome { node, epoch } => Ok(Welcomed { send, recv, node, epoch }),
            other => Err(format!("{other:?} came before a welcome")),
        }
    }

    async fn hello(&self) -> Result<NodeHello, String> {
        let mut models = Vec::new();
        for (source, config, digest) in self.library.offers() {
            let text = self.library.text(&source.name).map_err(|e| e.to_string())?;
            let json = Bytes::copy_from_slice(text.tokenizer_json().as_bytes());
            let tokenizer = self.blobs.store(json).await.map_err(|e| e.to_string())?;
            models.push(ModelOffer {
                footprint: self.library.footprint(&source.name).map_err(|e| e.to_string())?,
                gpu_footprint: self.library.gpu_footprint(&source.name).map_err(|e| e.to_string())?,
                name: source.name,
                aliases: source.aliases,
                digest,
                context: config.max_position_embeddings as u32,
                vocab: config.vocab_size as u32,
                tokenizer: tokenizer.digest,
                tokenizer_size: tokenizer.size,
                lora_rank_max: config.lora_rank_max(),
            });
        }
        let Memory { host, gpu, .. } = Memory::of_node(self.library.gpu(), self.config.samplers);
        Ok(NodeHello {
            protocol_version: PROTOCOL_VERSION,
            name: self.config.name.clone(),
            pid: std::process::id(),
            trainers: self.config.trainers,
            samplers: self.config.samplers,
            models,
            numerics: Numerics {
                build: env!("CARGO_PKG_VERSION").to_owned(),
                kernels: self.library.engine().to_owned(),
                dtype: self.config.compute.dtype.to_string(),
                // Others add up in one order, whatever they were told.
                reduction: gpu_seat(&self.library).map(|seat| seat.reduction).unwrap_or_default().to_string(),
            },
            address: self.config.advertise.clone().unwrap_or_else(|| self.endpoint.local_address()),
            host: collective::host_id(),
            memory: host,
            gpu_memory: gpu,
        })
    }
}

/// Ends a connection with the session that it belongs to, and what waits for its blobs.
struct CloseOnDrop<'a> {
    connection: &'a Connection,
    blobs: &'a BlobClient,
}

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.blobs.connect(None);
        self.connection.close("the node goes away");
    }
}

/// Hands the coordinator's messages to the node, in order; returns why there are no more.
async fn read(
    mut recv: RecvHalf,
    session: SessionNumber,
    node: &Addr<NodeActor>,
    peers: &Peers,
    told_to_go: &AtomicBool,
) -> String {
    loop {
        match receive(&mut recv).await {
            Ok(CoordinatorMessage::Revoked { nodes }) => peers.refuse(nodes),
            Ok(message) => {
                told_to_go.fetch_or(message == CoordinatorMessage::Shutdown, Ordering::Relaxed);
                // Waits for room in the mailbox, so that a coordinator that sends faster than
                // the node reads is slowed down by its stream.
                if node.send(Notice(Event::Coordinator { session, message })).await.is_err() {
                    return "the node has stopped".to_owned();
                }
            }
            Err(reason) => return reason,
        }
    }
}

/// Writes the node's messages, in order; returns why it can't go on.
async fn write(mut send: SendHalf, mut reports: mpsc::Receiver<NodeMessage>) -> String {
    while let Some(message) = reports.recv().await {
        if let Err(e) = send.send_frame(&encode(&message)).await {
            return e.to_string();
        }
    }
    "the node closed the connection".to_owned()
}

async fn receive(recv: &mut RecvHalf) -> Result<CoordinatorMessage, String> {
    let frame = recv.recv_frame(MAX_MESSAGE).await.map_err(|e| e.to_string())?;
    let frame = frame.ok_or("the coordinator finished the control stream")?;
    decode("control message", &frame, MAX_MESSAGE).map_err(|e| e.to_string())
}

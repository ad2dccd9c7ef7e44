//! One client's connection to the coordinator: requests, blobs, reconnection.

use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::Mutex;

use crate::{
    join,
    protocol::{
        ALPN, BlobRef, BlobReply, Call, ClientRequest, ClientResponse, CodecError, Figures, MAX_BLOB,
        MAX_MESSAGE, StreamOpen, decode, encode,
    },
    transport::{Connection, Endpoint, Identity, Role, Stream, TransportError},
    types::Digest,
};

use super::ClientError;

/// How long one attempt to connect may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// How long a client waits for a service that has gone away (its supervisor restarts it within
/// seconds; recovery replays a few operations) before a call fails.
const RETRY_FOR: Duration = Duration::from_secs(600);

/// Pause before the first and between later attempts.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Longest that one request may take: a generation to the end of a long context on a CPU.
const REQUEST_DEADLINE: Duration = Duration::from_secs(3600);

/// Name of the identity that `lockstep up` leaves for local clients in `DATA/identity`.
pub const CLIENT_IDENTITY: &str = "client";

/// File of a data directory in which the coordinator writes its address.
pub const ENDPOINT_FILE: &str = "endpoint";

/// What to connect to.
pub enum ConnectTarget {
    /// The data directory of a service on this machine: its `endpoint` file and client
    /// certificate.
    DataDirectory(PathBuf),
    /// An address, and a directory that holds `client.*` certificate files:
    /// `lockstep://HOST:PORT?identity=DIR`.
    Address { address: String, identity: PathBuf },
    /// A cluster inside this process.
    Local(Connector),
}

/// A way to reach a cluster inside this process; made by `Cluster::connector`.
#[derive(Clone)]
pub struct Connector {
    endpoint: Endpoint,
    address: String,
}

impl Connector {
    pub(crate) fn new(endpoint: Endpoint, address: String) -> Self {
        Self { endpoint, address }
    }
}

impl From<&str> for ConnectTarget {
    fn from(target: &str) -> Self {
        match target.strip_prefix("lockstep://") {
            None => Self::DataDirectory(target.into()),
            Some(rest) => {
                let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
                let identity = query.strip_prefix("identity=").unwrap_or_default();
                Self::Address { address: address.trim_end_matches('/').into(), identity: identity.into() }
            }
        }
    }
}

impl From<&std::path::Path> for ConnectTarget {
    fn from(directory: &std::path::Path) -> Self {
        Self::DataDirectory(directory.into())
    }
}

impl From<&PathBuf> for ConnectTarget {
    fn from(directory: &PathBuf) -> Self {
        Self::DataDirectory(directory.clone())
    }
}

impl From<Connector> for ConnectTarget {
    fn from(connector: Connector) -> Self {
        Self::Local(connector)
    }
}

/// Where the coordinator is; a restarted service may have moved.
enum Address {
    Fixed(String),
    Written(PathBuf),
}

/// A connection that comes back.
pub struct Link {
    endpoint: Endpoint,
    address: Address,
    connection: Mutex<Option<Kept>>,
}

/// A connection, and the task that renews this end's certificate over it.
struct Kept {
    connection: Connection,
    fresh: tokio::task::AbortHandle,
}

impl Drop for Kept {
    fn drop(&mut self) {
        // It holds the connection, which would outlive us.
        self.fresh.abort();
    }
}

/// What goes out on one stream.
enum Exchange {
    Request(Call, ClientRequest),
    Put(BlobRef, Bytes),
    Get(BlobRef),
    /// So many bytes from there on.
    GetPart(Digest, Range<u64>),
    Figures,
}

/// What came back on it.
enum Answer {
    Response(Box<ClientResponse>),
    Stored,
    Bytes(Vec<u8>),
    Figures(Figures),
}

/// Why one attempt failed.
enum Attempt {
    /// The connection; another attempt may succeed.
    Transport(TransportError),
    /// Repeating it would not help.
    Final(ClientError),
}

impl Link {
    /// Prepares the way to `target` and connects. Must run on the client's runtime.
    pub async fn open(target: ConnectTarget) -> Result<Self, ClientError> {
        let (endpoint, address) = match target {
            ConnectTarget::Local(connector) => (connector.endpoint, Address::Fixed(connector.address)),
            ConnectTarget::DataDirectory(directory) => {
                let endpoint = quic_endpoint(&directory.join("identity")).map_err(|e| {
                    ClientError::NoService { directory: directory.clone(), reason: e.to_string() }
                })?;
                (endpoint, Address::Written(directory))
            }
            ConnectTarget::Address { address, identity } => {
                let endpoint = quic_endpoint(&identity).map_err(|e| ClientError::Address {
                    target: format!("lockstep://{address}?identity={}", identity.display()),
                    reason: e.to_string(),
                })?;
                (endpoint, Address::Fixed(address))
            }
        };
        let link = Self { endpoint, address, connection: Mutex::new(None) };
        match link.connection().await {
            Ok(_) => Ok(link),
            Err(Attempt::Final(error)) => Err(error),
            Err(Attempt::Transport(error)) => Err(link.unreachable(error.to_string())),
        }
    }

    /// Sends a request that may be repeated, and waits for its answer; while the service is
    /// away, waits for it to come back.
    pub async fn request(&self, request: ClientRequest) -> Result<ClientResponse, ClientError> {
        self.call(Call::default(), request).await
    }

    /// The same with what accompanies it.
    pub async fn call(&self, call: Call, request: ClientRequest) -> Result<ClientResponse, ClientError> {
        match self.exchange(&Exchange::Request(call, request)).await? {
            Answer::Response(response) => match *response {
                ClientResponse::Error(error) => Err(error.into()),
                response => Ok(response),
            },
            _ => Err(unexpected("a blob for a request")),
        }
    }

    /// What the coordinator has counted since it started.
    pub async fn figures(&self) -> Result<Figures, ClientError> {
        match self.exchange(&Exchange::Figures).await? {
            Answer::Figures(figures) => Ok(figures),
            _ => Err(unexpected("no figures")),
        }
    }

    /// Stores bytes in the service and returns their name.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<BlobRef, ClientError> {
        let blob = BlobRef { digest: Digest::of(&bytes), size: bytes.len() as u64 };
        match self.exchange(&Exchange::Put(blob, bytes)).await? {
            Answer::Stored => Ok(blob),
            _ => Err(unexpected("no `Stored` for a blob that was sent")),
        }
    }

    /// Reads a blob and checks that it is what its name says.
    pub async fn get_blob(&self, blob: BlobRef) -> Result<Vec<u8>, ClientError> {
        match self.exchange(&Exchange::Get(blob)).await? {
            Answer::Bytes(bytes) if Digest::of(&bytes) == blob.digest => Ok(bytes),
            _ => Err(unexpected(&format!("blob {} arrived with other bytes", blob.digest.short()))),
        }
    }

    /// Reads some bytes of a blob, which only whoever has all of them can check.
    pub async fn get_part(&self, digest: Digest, part: Range<u64>) -> Result<Vec<u8>, ClientError> {
        match self.exchange(&Exchange::GetPart(digest, part)).await? {
            Answer::Bytes(bytes) => Ok(bytes),
            _ => Err(unexpected("no part of a blob")),
        }
    }

    /// One exchange on a stream of its own, again on a fresh connection while the service is
    /// away.
    async fn exchange(&self, exchange: &Exchange) -> Result<Answer, ClientError> {
        let give_up = Instant::now() + RETRY_FOR;
        let mut pause = BACK_OFF.0;
        loop {
            let failed = match tokio::time::timeout(REQUEST_DEADLINE, self.attempt(exchange)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Attempt::Final(error))) => return Err(error),
                Ok(Err(Attempt::Transport(error))) => error.to_string(),
                Err(_) => return Err(self.unreachable(format!("no answer within {REQUEST_DEADLINE:?}"))),
            };
            if Instant::now() >= give_up {
                return Err(self.unreachable(failed));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACK_OFF.1);
        }
    }

    async fn attempt(&self, exchange: &Exchange) -> Result<Answer, Attempt> {
        let mut stream = self.stream().await?;
        match exchange {
            Exchange::Request(call, request) => {
                let open = StreamOpen::Request { call: *call, request: request.clone() };
                stream.send.send_frame(&encode(&open)).await?;
                // The sending half stays open: a reset of it says that nobody waits any more.
                let frame = answer_frame(&mut stream).await?;
                let response = decode("response", &frame, MAX_MESSAGE).map_err(ClientError::from)?;
                Ok(Answer::Response(Box::new(response)))
            }
            Exchange::GetPart(digest, part) => {
                let (offset, length) = (part.start, part.end - part.start);
                let open = StreamOpen::GetBlobPart { digest: *digest, offset, length };
                stream.send.send_frame(&encode(&open)).await?;
                stream.send.finish().await?;
                match blob_reply(&mut stream).await? {
                    BlobReply::Found { size } if size == length => {
                        Ok(Answer::Bytes(stream.recv.recv_bytes(size).await?))
                    }
                    other => Err(refused(other)),
                }
            }
            Exchange::Figures => {
                stream.send.send_frame(&encode(&StreamOpen::Figures)).await?;
                stream.send.finish().await?;
                let frame = answer_frame(&mut stream).await?;
                let figures = decode("figures", &frame, MAX_MESSAGE).map_err(ClientError::from)?;
                Ok(Answer::Figures(figures))
            }
            Exchange::Put(blob, bytes) => {
                let open = StreamOpen::PutBlob { digest: blob.digest, size: blob.size };
                stream.send.send_frame(&encode(&open)).await?;
                stream.send.send_bytes(bytes).await?;
                stream.send.finish().await?;
                match blob_reply(&mut stream).await? {
                    BlobReply::Stored => Ok(Answer::Stored),
                    other => Err(refused(other)),
                }
            }
            Exchange::Get(blob) => {
                stream.send.send_frame(&encode(&StreamOpen::GetBlob { digest: blob.digest })).await?;
                stream.send.finish().await?;
                match blob_reply(&mut stream).await? {
                    BlobReply::Found { size } if size == blob.size && size <= MAX_BLOB => {
                        Ok(Answer::Bytes(stream.recv.recv_bytes(size).await?))
                    }
                    other => Err(refused(other)),
                }
            }
        }
    }

    /// A stream of the present connection, or of a new one if that has gone.
    async fn stream(&self) -> Result<Stream, Attempt> {
        let connection = self.connection().await?;
        match connection.open_stream().await {
            Ok(stream) => Ok(stream),
            Err(_) => {
                *self.connection.lock().await = None;
                Ok(self.connection().await?.open_stream().await?)
            }
        }
    }

    /// The present connection, or a new one.
    async fn connection(&self) -> Result<Connection, Attempt> {
        let mut slot = self.connection.lock().await;
        if let Some(kept) = slot.as_ref() {
            return Ok(kept.connection.clone());
        }
        let address = match &self.address {
            Address::Fixed(address) => address.clone(),
            Address::Written(directory) => read_endpoint(directory)?,
        };
        let connection = self.endpoint.connect(&address, Role::Coordinator, CONNECT_DEADLINE).await?;
        let fresh = tokio::spawn(join::keep_fresh(connection.clone(), self.endpoint.clone())).abort_handle();
        *slot = Some(Kept { connection: connection.clone(), fresh });
        Ok(connection)
    }

    fn unreachable(&self, reason: String) -> ClientError {
        let address = match &self.address {
            Address::Fixed(address) => address.clone(),
            Address::Written(directory) => directory.display().to_string(),
        };
        ClientError::Unreachable { address, reason }
    }
}

impl From<TransportError> for Attempt {
    fn from(error: TransportError) -> Self {
        match error {
            // Whoever is put out of the cluster, or was never in it, is so the next time.
            TransportError::ShutOut { .. } => Self::Final(ClientError::ShutOut { reason: error.to_string() }),
            error => Self::Transport(error),
        }
    }
}

impl From<ClientError> for Attempt {
    fn from(error: ClientError) -> Self {
        Self::Final(error)
    }
}

async fn answer_frame(stream: &mut Stream) -> Result<Vec<u8>, Attempt> {
    let frame = stream.recv.recv_frame(MAX_MESSAGE).await?;
    frame.ok_or_else(|| Attempt::Final(unexpected("the stream ended without an answer")))
}

async fn blob_reply(stream: &mut Stream) -> Result<BlobReply, Attempt> {
    let frame = answer_frame(stream).await?;
    Ok(decode("blob reply", &frame, MAX_MESSAGE).map_err(ClientError::from)?)
}

fn refused(reply: BlobReply) -> Attempt {
    Attempt::Final(match reply {
        BlobReply::Refused(error) => error.into(),
        other => unexpected(&format!("{other:?}")),
    })
}

fn unexpected(what: &str) -> ClientError {
    ClientError::Protocol(what.into())
}

impl From<CodecError> for ClientError {
    fn from(error: CodecError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// An endpoint on any free port with the client identity of a directory.
fn quic_endpoint(identity: &Path) -> Result<Endpoint, TransportError> {
    let identity = Identity::load(identity, CLIENT_IDENTITY)?;
    Endpoint::quic(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), identity, ALPN)
}

/// The address that the coordinator of a data directory listens on.
pub fn read_endpoint(directory: &Path) -> Result<String, ClientError> {
    let text =
        std::fs::read_to_string(directory.join(ENDPOINT_FILE)).map_err(|e| ClientError::NoService {
            directory: directory.into(),
            reason: format!("can't read its `{ENDPOINT_FILE}` file ({e})"),
        })?;
    Ok(text.lines().next().unwrap_or_default().trim().into())
}

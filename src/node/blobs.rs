//! A node's way to the coordinator's blobs: streams, digests checked, recent ones kept.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::OnceCell;

use crate::{
    protocol::{BlobRef, BlobReply, CodecError, MAX_BLOB, MAX_MESSAGE, StreamOpen, decode, encode},
    trainer::Blobs,
    transport::{Connection, TransportError},
    types::{Digest, ErrorKind, OperationError},
};

/// Recent blobs kept in memory: an adapter that rank 0 has just stored is then staged without
/// a transfer, and the ranks of a node fetch a payload once.
const CACHE_BYTES: u64 = 256 << 20;

/// For one blob, there or back. A snapshot of 1 GiB takes 10 s on loopback, 80 s on 100 Mbit/s.
const DEADLINE: Duration = Duration::from_secs(300);

/// Transfers of a blob before what comes damaged each time is called so. The coordinator asks again later.
const TRANSFERS: u32 = 3;

/// Why a blob can't be fetched or stored.
#[derive(Debug, thiserror::Error)]
#[error("blob {}: {problem}", .digest.short())]
pub(super) struct BlobError {
    digest: Digest,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("not connected to the coordinator")]
    NotConnected,
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Refused(#[from] OperationError),
    #[error("the coordinator gave no answer, or that of another question")]
    NoAnswer,
    #[error("not done within {DEADLINE:?}")]
    Deadline,
    #[error("the store has {got} bytes of it instead of {size} (and at most {MAX_BLOB})")]
    Size { size: u64, got: u64 },
    #[error("what came hashes to {}", .got.short())]
    Digest { got: Digest },
}

/// Fetches and stores blobs over whichever connection the node has at the moment.
#[derive(Clone)]
pub(super) struct BlobClient {
    shared: Arc<Mutex<Shared>>,
    /// Runs what the blocking calls of compute threads wait for.
    control: tokio::runtime::Handle,
}

#[derive(Default)]
struct Shared {
    connection: Option<Connection>,
    /// One fetch per blob, however many want it.
    fetching: HashMap<Digest, Arc<OnceCell<Bytes>>>,
    /// Oldest first.
    recent: VecDeque<(Digest, Bytes)>,
    recent_bytes: u64,
}

impl BlobClient {
    pub(super) fn new(control: tokio::runtime::Handle) -> Self {
        Self { shared: Arc::default(), control }
    }

    /// Uses `connection` from now on; `None`: there is none, and every call fails at once.
    pub(super) fn connect(&self, connection: Option<Connection>) {
        self.lock().connection = connection;
    }

    /// The bytes of a blob, checked against its digest.
    pub(super) async fn fetch(&self, blob: BlobRef) -> Result<Bytes, BlobError> {
        let cell = {
            let mut shared = self.lock();
            if let Some((_, bytes)) = shared.recent.iter().find(|(digest, _)| *digest == blob.digest) {
                return Ok(bytes.clone());
            }
            shared.fetching.entry(blob.digest).or_default().clone()
        };
        let fetched = cell.get_or_try_init(|| within_deadline(blob.digest, self.transfer_whole(blob))).await;
        let mut shared = self.lock();
        shared.fetching.remove(&blob.digest);
        let bytes = fetched?.clone();
        shared.keep(blob.digest, bytes.clone());
        Ok(bytes)
    }

    /// Returns once the coordinator holds the bytes durably.
    pub(super) async fn store(&self, bytes: Bytes) -> Result<BlobRef, BlobError> {
        let (bytes, digest) = hash(bytes).await;
        within_deadline(digest, self.send(digest, &bytes)).await?;
        let size = bytes.len() as u64;
        self.lock().keep(digest, bytes);
        Ok(BlobRef { digest, size })
    }

    /// Transfers once more what did not hash to its name. TLS sees what happens on the wire, and the store
    /// reads nothing that is damaged on its disk: what gets here is memory that forgets.
    async fn transfer_whole(&self, blob: BlobRef) -> Result<Bytes, Problem> {
        for attempt in 1..TRANSFERS {
            match self.transfer(blob).await {
                Err(Problem::Digest { got }) => {
                    let (digest, got) = (blob.digest.short(), got.short());
                    tracing::warn!(%digest, %got, attempt, "a blob came damaged: fetching it again");
                }
                other => return other,
            }
        }
        self.transfer(blob).await
    }

    async fn transfer(&self, BlobRef { digest, size }: BlobRef) -> Result<Bytes, Problem> {
        let mut stream = self.connection()?.open_stream().await?;
        stream.send.send_frame(&encode(&StreamOpen::GetBlob { digest })).await?;
        stream.send.finish().await?;
        match read_reply(stream.recv.recv_frame(MAX_MESSAGE).await?)? {
            BlobReply::Found { size: got } if got != size || got > MAX_BLOB => {
                Err(Problem::Size { size, got })
            }
            BlobReply::Found { size } => {
                let bytes = stream.recv.recv_bytes(size).await?;
                match hash(Bytes::from(bytes)).await {
                    (bytes, got) if got == digest => Ok(bytes),
                    (_, got) => Err(Problem::Digest { got }),
                }
            }
            BlobReply::Refused(error) => Err(error.into()),
            BlobReply::Stored => Err(Problem::NoAnswer),
        }
    }

    async fn send(&self, digest: Digest, bytes: &[u8]) -> Result<(), Problem> {
        let size = bytes.len() as u64;
        let mut stream = self.connection()?.open_stream().await?;
        stream.send.send_frame(&encode(&StreamOpen::PutBlob { digest, size })).await?;
        stream.send.send_bytes(bytes).await?;
        stream.send.finish().await?;
        match read_reply(stream.recv.recv_frame(MAX_MESSAGE).await?)? {
            BlobReply::Stored => Ok(()),
            BlobReply::Refused(error) => Err(error.into()),
            BlobReply::Found { .. } => Err(Problem::NoAnswer),
        }
    }

    fn connection(&self) -> Result<Connection, Problem> {
        self.lock().connection.clone().ok_or(Problem::NotConnected)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // What is under the lock is whole after every statement.
        self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Blobs for BlobClient {
    fn get(&self, blob: BlobRef) -> Result<Bytes, OperationError> {
        Ok(self.control.block_on(self.fetch(blob))?)
    }

    fn put(&self, bytes: Bytes) -> Result<BlobRef, OperationError> {
        Ok(self.control.block_on(self.store(bytes))?)
    }
}

impl Shared {
    fn keep(&mut self, digest: Digest, bytes: Bytes) {
        if self.recent.iter().any(|(kept, _)| *kept == digest) || bytes.len() as u64 > CACHE_BYTES {
            return;
        }
        self.recent_bytes += bytes.len() as u64;
        self.recent.push_back((digest, bytes));
        while self.recent_bytes > CACHE_BYTES
            && let Some((_, dropped)) = self.recent.pop_front()
        {
            self.recent_bytes -= dropped.len() as u64;
        }
    }
}

impl From<BlobError> for OperationError {
    fn from(error: BlobError) -> Self {
        let kind = match &error.problem {
            Problem::NotConnected | Problem::Transport(_) | Problem::NoAnswer | Problem::Digest { .. } => {
                ErrorKind::Unavailable
            }
            Problem::Deadline => ErrorKind::DeadlineExceeded,
            Problem::Refused(refusal) => refusal.kind,
            Problem::Codec(_) | Problem::Size { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

fn read_reply(frame: Option<Vec<u8>>) -> Result<BlobReply, Problem> {
    Ok(decode("answer about a blob", &frame.ok_or(Problem::NoAnswer)?, MAX_MESSAGE)?)
}

async fn within_deadline<T>(
    digest: Digest,
    work: impl Future<Output = Result<T, Problem>>,
) -> Result<T, BlobError> {
    let result = tokio::time::timeout(DEADLINE, work).await.unwrap_or(Err(Problem::Deadline));
    result.map_err(|problem| BlobError { digest, problem })
}

/// Hashes off the control threads: 100 MB take a good part of a second without SHA instructions.
async fn hash(bytes: Bytes) -> (Bytes, Digest) {
    let same = bytes.clone();
    match tokio::task::spawn_blocking(move || Digest::of(&same)).await {
        Ok(digest) => (bytes, digest),
        // The runtime is shutting down; nobody waits for this any more, but it must be right.
        Err(_) => {
            let digest = Digest::of(&bytes);
            (bytes, digest)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Endpoint, MemoryNetwork, Role};

    /// A coordinator that has one blob, and sends it with a byte flipped so many times.
    async fn serve_damaged(endpoint: Endpoint, blob: Vec<u8>, damaged: usize) {
        let connection = endpoint.accept().await.unwrap();
        for transfer in 0.. {
            let Ok(mut stream) = connection.accept_stream().await else { return };
            let asked = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
            let asked: StreamOpen = decode("question", &asked, MAX_MESSAGE).unwrap();
            assert_eq!(asked, StreamOpen::GetBlob { digest: Digest::of(&blob) });
            let mut bytes = blob.clone();
            if transfer < damaged {
                bytes[blob.len() / 2] ^= 1;
            }
            let found = BlobReply::Found { size: blob.len() as u64 };
            stream.send.send_frame(&encode(&found)).await.unwrap();
            stream.send.send_bytes(&bytes).await.unwrap();
            stream.send.finish().await.unwrap();
        }
    }

    /// What a node gets of a blob of 300 kB that comes damaged so many times.
    async fn fetch_damaged(damaged: usize) -> Result<Bytes, BlobError> {
        let network = MemoryNetwork::default();
        let coordinator = Endpoint::memory(&network, Role::Coordinator, "c").unwrap();
        let node = Endpoint::memory(&network, Role::Node, "n").unwrap();
        let blob: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        let asked = BlobRef { digest: Digest::of(&blob), size: blob.len() as u64 };
        let address = coordinator.local_address();
        let serving = tokio::spawn(serve_damaged(coordinator, blob, damaged));
        let connection = node.connect(&address, Role::Coordinator, DEADLINE).await.unwrap();
        let client = BlobClient::new(tokio::runtime::Handle::current());
        client.connect(Some(connection));
        let fetched = client.fetch(asked).await;
        serving.abort();
        fetched
    }

    #[tokio::test]
    async fn a_blob_that_comes_damaged_is_fetched_again() {
        let blob: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        for damaged in 0..TRANSFERS as usize {
            assert_eq!(fetch_damaged(damaged).await.unwrap(), blob, "damaged {damaged} times");
        }
        let error = fetch_damaged(TRANSFERS as usize).await.unwrap_err();
        assert!(matches!(error.problem, Problem::Digest { .. }), "{error}");
    }

    #[test]
    fn the_cache_drops_the_oldest_past_its_bound() {
        let mut shared = Shared::default();
        let half = Bytes::from(vec![0; CACHE_BYTES as usize / 2]);
        for name in [b"a", b"b", b"c"] {
            shared.keep(Digest::of(name), half.clone());
        }
        let kept: Vec<Digest> = shared.recent.iter().map(|(digest, _)| *digest).collect();
        assert_eq!(kept, [Digest::of(b"b"), Digest::of(b"c")]);
        assert_eq!(shared.recent_bytes, CACHE_BYTES);
    }

    #[test]
    fn a_blob_over_the_bound_is_not_kept() {
        let mut shared = Shared::default();
        shared.keep(Digest::of(b"a"), Bytes::from_static(b"a"));
        shared.keep(Digest::of(b"b"), Bytes::from(vec![0; CACHE_BYTES as usize + 1]));
        assert_eq!((shared.recent.len(), shared.recent_bytes), (1, 1));
    }
}

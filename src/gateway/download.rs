//! Blobs as bodies: read part by part as the caller takes them, so that a file of any size costs the memory
//! of two parts.

use std::{ops::Range, sync::Arc, time::Duration};

use actix_web::body::SizedStream;
use bytes::Bytes;
use futures::stream;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::protocol::BlobRef;

use super::{refusal::Refused, upstream::Upstream};

/// Bytes that are asked for at once.
const PART: u64 = 4 << 20;

/// Downloads at a time.
const DOWNLOADS_MAX: usize = 64;

/// How long one more waits for its turn.
const TURN_DEADLINE: Duration = Duration::from_secs(120);

/// The downloads of a gateway.
pub struct Downloads {
    turns: Arc<Semaphore>,
}

impl Default for Downloads {
    fn default() -> Self {
        Self { turns: Arc::new(Semaphore::new(DOWNLOADS_MAX)) }
    }
}

impl Downloads {
    /// Waits for a turn, which is over when it is dropped.
    pub async fn turn(&self) -> Result<OwnedSemaphorePermit, Refused> {
        tokio::time::timeout(TURN_DEADLINE, self.turns.clone().acquire_owned())
            .await
            .map_err(|_| Refused::away("too many files are being read; try again"))?
            // The semaphore is never closed.
            .map_err(|e| Refused::fault(e.to_string()))
    }
}

/// What is left of a download.
struct Download {
    upstream: Upstream,
    blob: BlobRef,
    left: Range<u64>,
    /// Of a whole blob: its last part goes out only if all of it is what its name says.
    hash: Option<Sha256>,
    _turn: OwnedSemaphorePermit,
}

/// Some bytes of a blob as a body. One that breaks off was not whole.
pub fn body(
    upstream: Upstream,
    blob: BlobRef,
    range: Range<u64>,
    turn: OwnedSemaphorePermit,
) -> SizedStream<impl stream::Stream<Item = Result<Bytes, Refused>>> {
    let size = range.end - range.start;
    let hash = (size == blob.size).then(Sha256::new);
    let download = Download { upstream, blob, left: range, hash, _turn: turn };
    SizedStream::new(size, stream::try_unfold(download, next))
}

/// The next part, and what is left then.
async fn next(mut download: Download) -> Result<Option<(Bytes, Download)>, Refused> {
    let Range { start, end } = download.left;
    if start == end {
        return Ok(None);
    }
    let part = start..end.min(start + PART);
    let bytes = download.upstream.part(download.blob, part.clone()).await?;
    if let Some(hash) = &mut download.hash {
        hash.update(&bytes);
        if part.end == end && hash.clone().finalize()[..] != download.blob.digest.0 {
            tracing::error!(digest = %download.blob.digest, "a blob is damaged; its download breaks off");
            return Err(Refused::fault("the file is damaged"));
        }
    }
    download.left.start = part.end;
    Ok(Some((bytes.into(), download)))
}

//! Blobs as bodies: read part by part as the caller takes them, so that a file of any size costs the memory
//! of two parts.

use std::{ops::Range, sync::Arc, time::Duration};

use actix_web::body::SizedStream;
use bytes::Bytes;
use futures::{Stream, stream};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{protocol::BlobRef, types::Digest};

use super::refusal::Refused;

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
struct Download<F> {
    read: F,
    digest: Digest,
    left: Range<u64>,
    /// Of a whole blob: its last part goes out only if all of it is what its name says.
    hash: Option<Sha256>,
    _turn: OwnedSemaphorePermit,
}

/// Some bytes of a blob, which `read` reads, as a body. One that breaks off was not whole.
pub fn body<F, R>(
    blob: BlobRef,
    range: Range<u64>,
    turn: OwnedSemaphorePermit,
    read: F,
) -> SizedStream<impl Stream<Item = Result<Bytes, Refused>>>
where
    F: Fn(Range<u64>) -> R,
    R: Future<Output = Result<Vec<u8>, Refused>>,
{
    let size = range.end - range.start;
    let hash = (size == blob.size).then(Sha256::new);
    let download = Download { read, digest: blob.digest, left: range, hash, _turn: turn };
    SizedStream::new(size, stream::try_unfold(download, next))
}

/// The next part, and what is left then.
async fn next<F, R>(mut download: Download<F>) -> Result<Option<(Bytes, Download<F>)>, Refused>
where
    F: Fn(Range<u64>) -> R,
    R: Future<Output = Result<Vec<u8>, Refused>>,
{
    let Range { start, end } = download.left;
    if start == end {
        return Ok(None);
    }
    let part = start..end.min(start + PART);
    let bytes = (download.read)(part.clone()).await?;
    if let Some(hash) = &mut download.hash {
        hash.update(&bytes);
        if part.end == end && hash.clone().finalize()[..] != download.digest.0 {
            tracing::error!(digest = %download.digest, "a blob is damaged; its download breaks off");
            return Err(Refused::fault("the file is damaged"));
        }
    }
    download.left.start = part.end;
    Ok(Some((bytes.into(), download)))
}

#[cfg(test)]
mod tests {
    use actix_web::body::{MessageBody, to_bytes};

    use super::*;

    fn bytes() -> Vec<u8> {
        (0..2 * PART as u32 + 5).map(|n| (n % 251) as u8).collect()
    }

    async fn turn() -> OwnedSemaphorePermit {
        Downloads::default().turn().await.unwrap()
    }

    #[actix_web::test]
    async fn a_file_of_several_parts_arrives_whole() {
        let file = bytes();
        let blob = BlobRef { digest: Digest::of(&file), size: file.len() as u64 };
        for range in [0..blob.size, 3..blob.size, PART - 1..PART + 1, 7..7] {
            let expected = &file[range.start as usize..range.end as usize];
            let read = |part: Range<u64>| {
                assert!(part.end - part.start <= PART);
                let part = file[part.start as usize..part.end as usize].to_vec();
                async { Ok(part) }
            };
            let body = body(blob, range, turn().await, read);
            assert_eq!(body.size(), actix_web::body::BodySize::Sized(expected.len() as u64));
            assert!(to_bytes(body).await.unwrap() == expected);
        }
    }

    #[actix_web::test]
    async fn a_damaged_file_breaks_off_before_its_end() {
        let file = bytes();
        let blob = BlobRef { digest: Digest::of(b"what it was"), size: file.len() as u64 };
        let read = async |part: Range<u64>| Ok(file[part.start as usize..part.end as usize].to_vec());
        assert!(to_bytes(body(blob, 0..blob.size, turn().await, read)).await.is_err());
    }
}

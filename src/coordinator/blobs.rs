//! Payloads in and out of the store, each on a stream of its own, within one budget of bytes.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{
    protocol::{BlobRef, BlobReply, MAX_BLOB, MAX_BLOB_PART, encode},
    store::BlobStore,
    transport::{RecvHalf, SendHalf},
    types::{CheckpointFile, Digest, ErrorKind, OperationError},
};

use super::serve::send_last;

/// Bytes of blobs in memory at once, in KiB. A larger blob has the budget to itself.
const BUDGET_KIB: u32 = 1 << 20;

/// How long a transfer may wait for its share of the budget.
const BUDGET_WAIT: Duration = Duration::from_secs(60);

/// Time that a transfer may take beside its bytes.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(60);

/// Slowest transfer that is waited for, in bytes per second.
const SLOWEST: u64 = 1 << 20;

/// The store behind its budget.
pub(super) struct Blobs {
    store: BlobStore,
    budget: Semaphore,
}

impl Blobs {
    pub(super) fn new(store: BlobStore) -> Self {
        Self { store, budget: Semaphore::new(BUDGET_KIB as usize) }
    }

    /// Receives a blob; `Stored` means durable and named rightly.
    pub(super) async fn put(&self, recv: &mut RecvHalf, blob: BlobRef) -> BlobReply {
        self.try_put(recv, blob).await.map_or_else(BlobReply::Refused, |()| BlobReply::Stored)
    }

    async fn try_put(&self, recv: &mut RecvHalf, blob: BlobRef) -> Result<(), OperationError> {
        if blob.size > MAX_BLOB {
            let problem = format!("a blob of {} bytes is over the limit of {MAX_BLOB}", blob.size);
            return Err(OperationError::new(ErrorKind::ResourceExhausted, problem));
        }
        let _share = self.share(blob.size).await?;
        let received = tokio::time::timeout(transfer_deadline(blob.size), recv.recv_bytes(blob.size));
        let bytes = match received.await {
            Ok(Ok(bytes)) => Bytes::from(bytes),
            Ok(Err(reason)) => {
                let problem = format!("a blob of {} bytes did not arrive: {reason}", blob.size);
                return Err(OperationError::new(ErrorKind::InvalidInput, problem));
            }
            Err(_) => {
                let problem = format!("a blob of {} bytes did not arrive in time", blob.size);
                return Err(OperationError::new(ErrorKind::DeadlineExceeded, problem));
            }
        };
        // Before it is stored: a wrong name must leave nothing behind.
        let hashed = bytes.clone();
        let named = tokio::task::spawn_blocking(move || Digest::of(&hashed)).await.map_err(internal)?;
        if named != blob.digest {
            let problem = format!("the bytes sent as {} hash to {named}", blob.digest);
            return Err(OperationError::new(ErrorKind::InvalidInput, problem));
        }
        Ok(self.store.put(bytes).await.map(drop)?)
    }

    /// Sends a blob, or why not.
    pub(super) async fn get(&self, send: &mut SendHalf, digest: Digest) {
        let found = self.find(digest).await;
        self.send(send, digest, found).await;
    }

    /// Sends some bytes of a blob, or why not.
    pub(super) async fn get_part(&self, send: &mut SendHalf, digest: Digest, offset: u64, length: u64) {
        let found = self.find_part(digest, offset, length).await;
        self.send(send, digest, found).await;
    }

    async fn send(
        &self,
        send: &mut SendHalf,
        digest: Digest,
        found: Result<(Bytes, SemaphorePermit<'_>), OperationError>,
    ) {
        let (bytes, _share) = match found {
            Ok(found) => found,
            Err(error) => return send_last(send, &encode(&BlobReply::Refused(error))).await,
        };
        let size = bytes.len() as u64;
        let sent = tokio::time::timeout(transfer_deadline(size), async {
            send.send_frame(&encode(&BlobReply::Found { size })).await?;
            send.send_bytes(&bytes).await?;
            send.finish().await
        });
        match sent.await {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => tracing::debug!(%digest, "a blob was not taken: {reason}"),
            Err(_) => tracing::warn!(%digest, "a blob was not taken in time"),
        }
    }

    async fn find(&self, digest: Digest) -> Result<(Bytes, SemaphorePermit<'_>), OperationError> {
        let absent =
            || OperationError::new(ErrorKind::NotFound, format!("there is no blob {digest} in the store"));
        let size = self.store.size(&digest).await.map_err(internal)?.ok_or_else(absent)?;
        let share = self.share(size).await?;
        let bytes = self.store.get(&digest).await.map_err(internal)?.ok_or_else(absent)?;
        Ok((bytes, share))
    }

    async fn find_part(
        &self,
        digest: Digest,
        offset: u64,
        length: u64,
    ) -> Result<(Bytes, SemaphorePermit<'_>), OperationError> {
        if length > MAX_BLOB_PART {
            let problem = format!("a part of {length} bytes is over the limit of {MAX_BLOB_PART}");
            return Err(OperationError::new(ErrorKind::InvalidInput, problem));
        }
        let absent = || {
            let problem = format!("there is no blob {digest} with {length} bytes from {offset} on");
            OperationError::new(ErrorKind::NotFound, problem)
        };
        let end = offset.checked_add(length).ok_or_else(absent)?;
        let share = self.share(length).await?;
        let bytes = self.store.part(&digest, offset..end).await.map_err(internal)?.ok_or_else(absent)?;
        Ok((bytes, share))
    }

    /// Why an operation whose `field` names `blob` can't be accepted. It is not swept before it can be
    /// journaled.
    pub(super) async fn missing(&self, field: &str, blob: &BlobRef) -> Option<OperationError> {
        let problem = match self.store.renew(&blob.digest).await {
            Ok(Some(size)) if size == blob.size => return None,
            Ok(Some(size)) => format!("blob {} has {size} bytes, not {}", blob.digest, blob.size),
            Ok(None) => format!("blob {} is not in the store; put it first", blob.digest),
            Err(error) => return Some(internal(error)),
        };
        Some(OperationError::new(ErrorKind::InvalidInput, format!("`{field}`: {problem}")))
    }

    /// Gives files the URLs of the bucket that holds them. What it can't sign keeps its own, which
    /// leads through this coordinator.
    pub(super) async fn presign(&self, files: &mut [CheckpointFile]) {
        for file in files {
            let Some(digest) = file.digest() else { continue };
            match self.store.presign(&digest).await {
                Ok(Some(url)) => file.url = url,
                Ok(None) => return,
                Err(reason) => return tracing::warn!("files are served through the gateway: {reason}"),
            }
        }
    }

    /// A transfer's share of the budget.
    async fn share(&self, size: u64) -> Result<SemaphorePermit<'_>, OperationError> {
        let kib = u32::try_from(size.div_ceil(1 << 10)).unwrap_or(BUDGET_KIB).min(BUDGET_KIB);
        match tokio::time::timeout(BUDGET_WAIT, self.budget.acquire_many(kib)).await {
            Ok(share) => share.map_err(internal),
            Err(_) => {
                let problem = "too many bytes are in flight; try again when some have arrived";
                Err(OperationError::new(ErrorKind::ResourceExhausted, problem))
            }
        }
    }
}

fn transfer_deadline(size: u64) -> Duration {
    TRANSFER_DEADLINE + Duration::from_secs(size / SLOWEST)
}

fn internal(error: impl std::fmt::Display) -> OperationError {
    OperationError::new(ErrorKind::Internal, error.to_string())
}

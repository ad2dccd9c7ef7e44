//! Removes from the store what no row names and nobody is about to name: payloads of forgotten
//! operations, snapshots and checkpoints that others have replaced, uploads that came to nothing.
//!
//! ```text
//!   a folder's old blobs ─► journal: named by no row? ─► actor: not counted on? ─► store: still old?
//!                                                                                  ─► removed
//! ```
//!
//! The order matters. A blob is put, or renewed, before the row that names it is written; so one
//! that is old and unnamed can become needed only by being renewed, which the store sees last.

use std::{sync::Arc, time::Duration};

use actix::Addr;
use tokio::sync::Mutex;

use crate::{journal::Journal, store::BlobStore, types::Digest};

use super::actor::{Coordinator, Unneeded};

/// Pause before the first pass: a service that starts has better things to do.
const FIRST_AFTER: Duration = Duration::from_secs(30);

/// Pause between two passes.
const EVERY: Duration = Duration::from_secs(300);

/// The same in a bucket, where a pass is 256 requests that cost.
const EVERY_IN_BUCKET: Duration = Duration::from_secs(3_600);

/// Pause between two folders, so that a pass over a large store disturbs nobody.
const BREATH: Duration = Duration::from_millis(20);

/// Younger blobs stay: longer than from an upload, or from a rank's file, to the row that names it,
/// an interruption of the coordinator included.
const YOUNG: Duration = Duration::from_secs(900);

/// Blobs that are asked about at once.
const PIECE: usize = 1_024;

/// Sweeps for as long as it is polled, while it holds `sweeping`.
pub(super) async fn sweep(
    store: BlobStore,
    journal: Journal,
    actor: Addr<Coordinator>,
    sweeping: Arc<Mutex<()>>,
) {
    let every = if store.is_bucket() { EVERY_IN_BUCKET } else { EVERY };
    tokio::time::sleep(FIRST_AFTER).await;
    loop {
        let alone = sweeping.lock().await;
        match sweep_once(&store, &journal, &actor, YOUNG).await {
            Ok(0) => {}
            Ok(swept) => tracing::info!("{swept} blobs that nothing needs were removed"),
            Err(problem) => tracing::warn!("blobs that nothing needs stay for now: {problem}"),
        }
        store.forget_renewals(YOUNG);
        drop(alone);
        tokio::time::sleep(every).await;
    }
}

/// One pass over all folders; how many blobs went.
pub(super) async fn sweep_once(
    store: &BlobStore,
    journal: &Journal,
    actor: &Addr<Coordinator>,
    young: Duration,
) -> Result<usize, String> {
    let mut swept = 0;
    for first_byte in 0..=u8::MAX {
        let old = store.old(first_byte, young).await.map_err(|e| e.to_string())?;
        for piece in old.chunks(PIECE) {
            let unnamed = unnamed(journal, piece.to_vec()).await?;
            let unneeded = actor.send(Unneeded(unnamed)).await.map_err(|e| e.to_string())?;
            for digest in unneeded {
                swept += usize::from(store.delete_old(&digest, young).await.map_err(|e| e.to_string())?);
            }
        }
        if !old.is_empty() {
            tokio::time::sleep(BREATH).await;
        }
    }
    Ok(swept)
}

async fn unnamed(journal: &Journal, digests: Vec<Digest>) -> Result<Vec<Digest>, String> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    // Nobody listens any more only if the service stops.
    journal.unnamed(digests, move |unnamed| drop(answer.send(unnamed)));
    answered.await.map_err(|_| "the journal is closed".to_owned())?.map_err(|e| e.to_string())
}

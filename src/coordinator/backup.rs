//! A copy of the journal while it is written, with everything that it names.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::Mutex;

use crate::{
    journal::{self, Journal, JournalError},
    protocol::BlobRef,
    store::BlobStore,
    types::{ErrorKind, OperationError},
};

/// Name of the copy in the data directory while it is made.
const COPY: &str = "backup.new";

/// How long to wait for the end of a sweep, or of another copy.
const SWEEP_WAIT: Duration = Duration::from_secs(120);

/// Makes one copy at a time.
pub(super) struct Backup {
    copy: PathBuf,
    journal: Journal,
    store: BlobStore,
    /// Held while blobs are swept.
    sweeping: Arc<Mutex<()>>,
}

impl Backup {
    pub(super) fn new(data_dir: &Path, journal: Journal, store: BlobStore, sweeping: Arc<Mutex<()>>) -> Self {
        Self { copy: data_dir.join(COPY), journal, store, sweeping }
    }

    /// Stores a copy of the journal as it is at one moment between two of its commits. The copy, and all
    /// blobs that it names, are there for as long as a blob that was just put.
    pub(super) async fn take(&self) -> Result<BlobRef, OperationError> {
        // What the copy names can't go before it is renewed.
        let Ok(_still) = tokio::time::timeout(SWEEP_WAIT, self.sweeping.lock()).await else {
            let problem = "another backup is being taken, or blobs are being swept; try again in a minute";
            return Err(OperationError::new(ErrorKind::Unavailable, problem));
        };
        let taken = self.copy_and_renew().await;
        // What can't be removed is overwritten by the next one.
        let _ = remove(&self.copy);
        taken
    }

    async fn copy_and_renew(&self) -> Result<BlobRef, OperationError> {
        remove(&self.copy).map_err(failed)?;
        let (done, copied) = tokio::sync::oneshot::channel();
        self.journal.copy(&self.copy, move |result| drop(done.send(result)));
        copied.await.map_err(|_| JournalError::Closed)??;
        let copy = self.copy.clone();
        let read = tokio::task::spawn_blocking(move || {
            let named = journal::named_blobs(&copy)?;
            let bytes = fs::read(&copy).map_err(failed)?;
            Ok::<_, OperationError>((named, bytes))
        });
        let (named, bytes) = read.await.map_err(failed)??;
        for blob in named {
            if self.store.renew(&blob.digest).await?.is_none() {
                let problem = format!("the journal names blob {}, which is not in the store", blob.digest);
                return Err(OperationError::new(ErrorKind::Internal, problem));
            }
        }
        let size = bytes.len() as u64;
        Ok(BlobRef { digest: self.store.put(Bytes::from(bytes)).await?, size })
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn failed(error: impl std::fmt::Display) -> OperationError {
    OperationError::new(ErrorKind::Internal, format!("the journal can't be copied: {error}"))
}

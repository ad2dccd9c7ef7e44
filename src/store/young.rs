use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::types::Digest;

/// When blobs were last put or renewed by this process. By the clock that never jumps: the times
/// in the file system follow the wall clock. Holds what the disk takes between two calls of
/// [`forget`](Young::forget), 100 bytes a blob.
#[derive(Default)]
pub(super) struct Young(Mutex<HashMap<Digest, Instant>>);

impl Young {
    pub(super) fn mark(&self, digest: Digest) {
        self.lock().insert(digest, Instant::now());
    }

    /// Whether the blob was marked within `age`.
    pub(super) fn is_within(&self, digest: Digest, age: Duration) -> bool {
        self.lock().get(&digest).is_some_and(|marked| marked.elapsed() < age)
    }

    /// Drops the marks that are older than `age`.
    pub(super) fn forget(&self, age: Duration) {
        self.lock().retain(|_, marked| marked.elapsed() < age);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Instant>> {
        // A panic under this lock leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

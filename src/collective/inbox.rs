use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::{
    protocol::{Epoch, Generation, RankIndex, StreamOpen},
    transport::Stream,
    types::RunId,
};

/// Which two ranks a stream joins, and of which rank set: what `StreamOpen::Collective` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamKey {
    pub run: RunId,
    pub epoch: Epoch,
    pub generation: Generation,
    pub from: RankIndex,
    pub to: RankIndex,
}

/// Where a node puts the streams that other nodes open for collectives, and its ranks fetch them:
/// either may come first.
///
/// Only what other *nodes* open belongs here: the caller has checked the peer's role.
#[derive(Clone, Default)]
pub struct CollectiveInbox(Arc<Mutex<HashMap<StreamKey, Entry>>>);

enum Entry {
    Arrived(Stream, Instant),
    Awaited(oneshot::Sender<Stream>),
}

/// Streams that wait for their rank: a rank set of 64 ranks on a node of 8, twice.
const MAX_ARRIVED: usize = 1024;

/// How long one waits. Its opener waits about as long for the others to join.
const ARRIVED_PATIENCE: Duration = Duration::from_secs(300);

impl StreamKey {
    /// The first frame of the stream.
    pub(super) fn stream_open(self) -> StreamOpen {
        let Self { run, epoch, generation, from, to } = self;
        StreamOpen::Collective { run, epoch, generation, from, to }
    }
}

impl CollectiveInbox {
    /// Takes a stream of which the [`StreamOpen`] frame has been read. One that nobody fetches in
    /// time, or for which there is no room, is dropped, which its opener sees; a second one for the
    /// same key replaces the first.
    pub fn deliver(&self, key: StreamKey, stream: Stream) {
        let mut entries = self.lock();
        let stream = match entries.remove(&key) {
            Some(Entry::Awaited(waiter)) => match waiter.send(stream) {
                Ok(()) => return,
                // It has given up meanwhile.
                Err(stream) => stream,
            },
            _ => stream,
        };
        let now = Instant::now();
        entries.retain(|_, entry| match entry {
            Entry::Arrived(_, since) => now.duration_since(*since) < ARRIVED_PATIENCE,
            Entry::Awaited(waiter) => !waiter.is_closed(),
        });
        if entries.len() >= MAX_ARRIVED {
            tracing::warn!(?key, "too many streams wait for their ranks: dropping one");
            return;
        }
        entries.insert(key, Entry::Arrived(stream, now));
    }

    /// The stream for `key`, when it comes; `None` if another call waits for the same one instead.
    pub(super) async fn fetch(&self, key: StreamKey) -> Option<Stream> {
        let waiting = {
            let mut entries = self.lock();
            if let Some(Entry::Arrived(stream, _)) = entries.remove(&key) {
                return Some(stream);
            }
            let (sender, receiver) = oneshot::channel();
            entries.insert(key, Entry::Awaited(sender));
            receiver
        };
        waiting.await.ok()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<StreamKey, Entry>> {
        // Its critical sections leave a whole map behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

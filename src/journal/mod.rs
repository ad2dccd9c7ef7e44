//! What must survive: sessions, runs, operations, outcomes, snapshots, checkpoints and slots,
//! in SQLite (WAL, `synchronous=FULL`, exclusive lock). Knows rows and digests, never a tensor
//! and never HTTP.
//!
//! ```text
//!   append(records, done) ──► bounded queue ──► writer thread ── one transaction ──► disk
//!   append(records, done) ──►               ──►      │           for all that queued
//!                       done(Ok | Err) ◄─────────────┘           in the order of the calls
//! ```
//!
//! # What survives what
//!
//! An append whose `done` got `Ok` survives everything but the loss of the disk: the end of the
//! process at any instruction, and a power cut (the log is synced before `done` is called). An
//! append whose `done` was not called yet is there wholly or not at all, and only if those
//! before it are there. After that:
//!
//! | table | a row says | leaves by |
//! | --- | --- | --- |
//! | `leader` | the epoch, raised at each open before anything else | never |
//! | `session` | this session id was given out, and to whom | never |
//! | `run` | what the run is, with every default | never |
//! | `operation` | it was accepted; with its idempotency key, so a retry finds it | `Prune` |
//! | `outcome` | it ended, and how; without one it is run (again) after a restart | `Prune`; `PublishFailed` replaces it |
//! | `snapshot` | this blob is the run's state after that operation | `Prune` |
//! | `checkpoint` | this name means these files; one row, so replacing it is atomic | a later save of the name; `DropCheckpoint` |
//! | `slot` | this policy is the run's live one, or that of version 0 | a later publish; `DropSlots` |
//! | `drained` | a node of this name gets nothing new | being given work again |
//! | `certificate` | a process has this certificate | a later one of its name; its end |
//! | `revocation` | what was issued to this name up to then is refused | a later one of the name |
//! | `blob_ref` | this row needs that blob | with its row; an operation's when replay can't reach it |
//!
//! A row names a blob only after the blob is durable in `store/`; a crash between the two leaves
//! a blob that no row names (see [`Journal::unnamed`]), never a row without its blob.

mod error;
mod record;

mod blobs;
mod copy;
mod database;
mod recover;
mod rows;
mod way;
mod writer;

#[cfg(test)]
mod tests;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle, ThreadId},
};

pub use blobs::{blobs_of_operation, blobs_of_result};
pub use copy::named_blobs;
pub use database::FILE;
pub use error::JournalError;
pub use record::{
    KnownCertificate, Outcome, Record, Recovered, RecoveredOperation, RecoveredRun, RecoveredSnapshot,
    SavedCheckpoint, Standing,
};
pub use way::{Goal, Way};

use crate::types::{Digest, RunId};

use database::Database;
use writer::{Append, Command, Question};

/// Appends that may wait for the disk. At the 8 ms of a commit they are gone in a few groups;
/// with payloads of 64 KiB they are 256 MiB.
const QUEUE_APPENDS: usize = 4096;

/// Handle to the journal's one writer thread; cheap to clone. When the last handle goes, what
/// has queued is written and the file is closed.
#[derive(Clone)]
pub struct Journal(Arc<Writer>);

struct Writer {
    queue: SyncSender<Command>,
    id: ThreadId,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Journal {
    /// Opens or makes `DIR/journal.sqlite`, takes its lock, raises the epoch, reads everything.
    /// Refuses a directory of another version or one that another coordinator holds.
    pub fn open(directory: &Path) -> Result<(Self, Recovered), JournalError> {
        let (database, recovered) = Database::open(directory)?;
        let (queue, commands) = sync_channel(QUEUE_APPENDS);
        let thread = thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer::run(database, commands))
            .map_err(|e| JournalError::Open { path: directory.to_owned(), reason: e.to_string() })?;
        let (id, thread) = (thread.thread().id(), Mutex::new(Some(thread)));
        Ok((Self(Arc::new(Writer { queue, id, thread })), recovered))
    }

    /// Queues facts and never blocks. Facts are written in the order of the calls; what has
    /// queued is one commit.
    ///
    /// `done` is called exactly once: on the writer thread, in the order of the calls, when the
    /// facts are durable or why not is known; on this thread with [`JournalError::Full`] or
    /// [`JournalError::Closed`] when they can't be queued. It should hand on and return: the next
    /// commit waits for it. An append without records is a barrier.
    ///
    /// A refused append leaves no trace, and later ones are still written: whoever appends what
    /// builds on an earlier append whose `done` hasn't been called undoes both if that one fails.
    pub fn append(&self, records: Vec<Record>, done: Box<dyn FnOnce(Result<(), JournalError>) + Send>) {
        let append = Command::Append(Append::new(records, done));
        match self.0.queue.try_send(append) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {} // a dropped append says `Closed`
            Err(TrySendError::Full(Command::Append(append))) => {
                append.finish(Err(JournalError::Full { limit: QUEUE_APPENDS }));
            }
            Err(TrySendError::Full(_)) => {} // not what was sent
        }
    }

    /// Asks which of `digests` no row names, in the order of the calls: appends that were queued
    /// before are seen. `done` is called like that of [`append`](Self::append), or dropped with the
    /// journal. Meant for what can wait: a full queue refuses it.
    pub fn unnamed(
        &self,
        digests: Vec<Digest>,
        done: impl FnOnce(Result<Vec<Digest>, JournalError>) + Send + 'static,
    ) {
        self.ask(|database| database.unnamed(digests), done);
    }

    /// Asks for the operations that lead a run to a step; otherwise as [`unnamed`](Self::unnamed).
    pub fn way_to(
        &self,
        run: RunId,
        goal: Goal,
        done: impl FnOnce(Result<Way, JournalError>) + Send + 'static,
    ) {
        self.ask(move |database| database.way_to(run, goal), done);
    }

    /// Writes a whole journal with what is durable now into a new file; otherwise as
    /// [`unnamed`](Self::unnamed). Appends wait meanwhile: a second for some 100 MB.
    pub fn copy(&self, to: &Path, done: impl FnOnce(Result<(), JournalError>) + Send + 'static) {
        let to = to.to_owned();
        self.ask(move |database| database.copy(&to), done);
    }

    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Database) -> Result<T, JournalError> + Send + 'static,
        done: impl FnOnce(Result<T, JournalError>) + Send + 'static,
    ) {
        let question = Command::Ask(Question::new(question, done));
        if let Err(TrySendError::Full(Command::Ask(question))) = self.0.queue.try_send(question) {
            question.answer(Err(JournalError::Full { limit: QUEUE_APPENDS }));
        }
    }

    /// Waits until everything queued is durable, then closes; appends through other handles get
    /// [`JournalError::Closed`] from then on. Blocks for about a commit: not for an actor.
    pub fn close(self) {
        self.0.close();
    }
}

#[cfg(test)]
impl Journal {
    /// One whose disk fails: every append gets `error`.
    pub(crate) fn failing(error: JournalError) -> Self {
        let (queue, commands) = sync_channel(QUEUE_APPENDS);
        let thread = thread::spawn(move || {
            while let Ok(Command::Append(append)) = commands.recv() {
                append.finish(Err(error.clone()));
            }
        });
        let (id, thread) = (thread.thread().id(), Mutex::new(Some(thread)));
        Self(Arc::new(Writer { queue, id, thread }))
    }
}

impl Writer {
    fn close(&self) {
        // A `done` that held the last handle: the thread can't wait for itself, and ends because
        // its queue has no sender any more.
        if self.id == thread::current().id() {
            return;
        }
        // Held to the end, so that a second closer waits as well.
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(thread) = thread.take() else { return };
        // Waits for room if the queue is full; fails only if the thread is gone already.
        let _ = self.queue.send(Command::Close);
        if thread.join().is_err() {
            tracing::error!("the journal's thread panicked; what it had not written is not durable");
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

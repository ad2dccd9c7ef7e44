//! What must survive: sessions, runs, operations, outcomes, snapshots, checkpoints and slots,
//! in SQLite (WAL, `synchronous=FULL`, exclusive lock).

use std::path::Path;

use crate::{
    protocol::{
        BlobRef, CreateRun, Epoch, Generation, Operation, OperationKey, OperationResult, OperationSeq,
        SavedFile,
    },
    types::{Checkpoint, Digest, OperationError, PolicyId, RunId, SessionId},
};

/// Why the journal can't be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{0}")]
    Placeholder(String),
}

/// One fact. Facts of one `append` become durable together or not at all.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    Session {
        session: SessionId,
        created_at_ms: u64,
    },
    /// `create` with every default filled in.
    Run {
        run: RunId,
        create: CreateRun,
        model_digest: Digest,
        created_at_ms: u64,
    },
    /// An accepted operation; blobs that it names are durable already. A second record of the
    /// same (run, seq) replaces the first: a `LoadState` is journaled again, with the source it
    /// was resolved to, in the append that holds its outcome.
    Operation {
        run: RunId,
        seq: OperationSeq,
        key: OperationKey,
        incarnation: u32,
        operation: Operation,
    },
    /// What became of it.
    Outcome {
        run: RunId,
        seq: OperationSeq,
        outcome: Outcome,
    },
    /// The run's state after `seq`.
    Snapshot {
        run: RunId,
        seq: OperationSeq,
        snapshot: BlobRef,
    },
    /// A checkpoint and its files: name, blob, size. One (run, target, name) is one checkpoint:
    /// a later one replaces the earlier. `policy`: identity of a sampler checkpoint's weights, by
    /// which replicas verify them.
    Checkpoint {
        checkpoint: Checkpoint,
        files: Vec<SavedFile>,
        policy: Option<PolicyId>,
    },
    /// The live policy of a run.
    Slot {
        policy: PolicyId,
        base_model: String,
        adapter: BlobRef,
    },
}

/// The end of an operation, as it was journaled.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// `state`: digest of the run's state after it.
    Done { result: OperationResult, state: Digest, step: u64 },
    /// Skipped by replay: the run is as it was before.
    Failed { error: OperationError },
}

/// One operation of a recovered run.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveredOperation {
    pub seq: OperationSeq,
    pub key: OperationKey,
    pub incarnation: u32,
    pub operation: Operation,
    pub outcome: Option<Outcome>,
}

/// A run as the journal has it.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveredRun {
    pub run: RunId,
    pub create: CreateRun,
    pub model_digest: Digest,
    pub created_at_ms: u64,
    /// The newest.
    pub snapshot: Option<(OperationSeq, BlobRef)>,
    /// In order.
    pub operations: Vec<RecoveredOperation>,
    pub slot: Option<(PolicyId, BlobRef)>,
}

/// Everything that a starting coordinator needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Recovered {
    /// One higher than at the last start, already durable.
    pub epoch: Epoch,
    pub sessions: Vec<SessionId>,
    pub runs: Vec<RecoveredRun>,
    pub checkpoints: Vec<(Checkpoint, Vec<SavedFile>, Option<PolicyId>)>,
}

/// Handle to the journal's one writer thread; cheap to clone.
#[derive(Clone)]
pub struct Journal {}

impl Journal {
    /// Opens or makes `DIR/journal.sqlite`, takes its lock, raises the epoch, reads everything.
    /// Refuses a directory of another version or one that another coordinator holds.
    pub fn open(directory: &Path) -> Result<(Self, Recovered), JournalError> {
        let _ = directory;
        todo!()
    }

    /// Queues facts; `done` is called on the writer thread once they are durable, or with why
    /// not. Facts are written in the order of the calls; what has queued is one commit.
    pub fn append(&self, records: Vec<Record>, done: Box<dyn FnOnce(Result<(), JournalError>) + Send>) {
        let _ = (records, done);
        todo!()
    }

    /// Waits until everything queued is durable, then closes.
    pub fn close(self) {
        todo!()
    }
}

#[allow(dead_code)]
type Unused = Generation;

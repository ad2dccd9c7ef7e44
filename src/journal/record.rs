use std::fmt;

use crate::{
    protocol::{
        BlobRef, CreateRun, Epoch, Operation, OperationKey, OperationResult, OperationSeq, SavedFile,
    },
    types::{Checkpoint, Digest, OperationError, PolicyId, RunId, SessionId},
};

/// One fact. Facts of one `append` become durable together or not at all.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A session was opened. Its id is new.
    Session { session: SessionId, created_at_ms: u64 },
    /// `create` with every default filled in. The run's id is new, its session is journaled.
    Run { run: RunId, create: CreateRun, model_digest: Digest, created_at_ms: u64 },
    /// An accepted operation; blobs that it names are durable already. Its run is journaled and
    /// its key new in the run. A second record of the same (run, seq), with the same key and
    /// kind, replaces the first: a `LoadState` is journaled again, with the source it
    /// was resolved to, in the append that holds its outcome.
    Operation { run: RunId, seq: OperationSeq, key: OperationKey, incarnation: u32, operation: Operation },
    /// What became of it; once.
    Outcome { run: RunId, seq: OperationSeq, outcome: Outcome },
    /// The run's state after `seq`.
    Snapshot { run: RunId, seq: OperationSeq, snapshot: BlobRef },
    /// A checkpoint and its files: name, blob, size. One (run, target, name) is one checkpoint:
    /// a later one replaces the earlier. `policy`: identity of a sampler checkpoint's weights, by
    /// which replicas verify them.
    Checkpoint { checkpoint: Checkpoint, files: Vec<SavedFile>, policy: Option<PolicyId> },
    /// A published policy of a run. Version 0 has a slot of its own; one of a later version
    /// replaces the one before.
    Slot { policy: PolicyId, base_model: String, adapter: BlobRef },
    /// Forgets what replay no longer needs: a run's operations and outcomes up to and including
    /// `upto`, and its snapshots before it. There is a snapshot at `upto`. Idempotency keys are
    /// forgotten with their operations, so prune only what nobody submits again.
    Prune { run: RunId, upto: OperationSeq },
    /// Both slots of a run are empty: it begins anew.
    DropSlots { run: RunId },
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
    /// Absent: it was accepted and not finished.
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
    /// In order. Without those that were pruned.
    pub operations: Vec<RecoveredOperation>,
    /// Published policies: of version 0, then the live one.
    pub slots: Vec<(PolicyId, BlobRef)>,
}

/// Everything that a starting coordinator needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Recovered {
    /// One higher than at the last start, already durable.
    pub epoch: Epoch,
    /// By id.
    pub sessions: Vec<SessionId>,
    /// By id.
    pub runs: Vec<RecoveredRun>,
    /// By id, that is in the order of saving.
    pub checkpoints: Vec<(Checkpoint, Vec<SavedFile>, Option<PolicyId>)>,
    /// Every blob that a row names, once, by digest. What else is in the store is left over
    /// from uploads and operations that were never journaled.
    pub live_blobs: Vec<BlobRef>,
}

/// As it is named in an error.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Session { session, .. } => write!(f, "{session}"),
            Self::Run { run, .. } => write!(f, "{run}"),
            Self::Operation { run, seq, .. } => write!(f, "operation {} of {run}", seq.0),
            Self::Outcome { run, seq, .. } => write!(f, "the outcome of operation {} of {run}", seq.0),
            Self::Snapshot { run, seq, .. } => write!(f, "the snapshot after operation {} of {run}", seq.0),
            Self::Checkpoint { checkpoint, .. } => write!(f, "{}", checkpoint.id),
            Self::Slot { policy, .. } => write!(f, "the slot of {policy}"),
            Self::DropSlots { run } => write!(f, "dropping the slots of {run}"),
            Self::Prune { run, upto } => write!(f, "pruning {run} up to operation {}", upto.0),
        }
    }
}

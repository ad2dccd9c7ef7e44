use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::{
    protocol::{
        BlobRef, CreateRun, Epoch, Operation, OperationKey, OperationResult, OperationSeq, SavedFile,
    },
    transport::Role,
    types::{Checkpoint, CheckpointId, Digest, LoraConfig, OperationError, PolicyId, RunId, SessionId},
};

/// One fact. Facts of one `append` become durable together or not at all.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A session was opened. Its id is new. `owner`: whose runs its runs are.
    Session { session: SessionId, owner: Option<String>, created_at_ms: u64 },
    /// `create` with every default filled in. The run's id is new, its session is journaled.
    /// `key`: new in the session, if there is one.
    Run { run: RunId, create: CreateRun, model_digest: Digest, key: Option<OperationKey>, created_at_ms: u64 },
    /// An accepted operation; blobs that it names are durable already. Its run is journaled and
    /// its key new in the run. A second record of the same (run, seq), with the same key and
    /// kind, replaces the first: a `LoadState` is journaled again, with the source it
    /// was resolved to, in the append that holds its outcome.
    Operation { run: RunId, seq: OperationSeq, key: OperationKey, incarnation: u32, operation: Operation },
    /// What became of it; once.
    Outcome { run: RunId, seq: OperationSeq, outcome: Outcome },
    /// The run's state after `seq`.
    Snapshot { run: RunId, seq: OperationSeq, snapshot: BlobRef, standing: Standing },
    /// A checkpoint and its files. One (run, target, name) is one checkpoint: a later one replaces
    /// the earlier.
    Checkpoint(SavedCheckpoint),
    /// A publish that was journaled as done has failed after all: that is the operation's outcome now,
    /// and the policy is in no slot. Its checkpoint stays.
    PublishFailed { run: RunId, seq: OperationSeq, policy: PolicyId, error: OperationError },
    /// A published policy of a run. Version 0 has a slot of its own; one of a later version
    /// replaces the one before.
    Slot { policy: PolicyId, base_model: String, adapter: BlobRef },
    /// From now on replay of the run reaches back to its snapshot at `base`: earlier snapshots are
    /// forgotten, and so is the data of the operations up to it. Of these, those up to and
    /// including `upto` are forgotten wholly, with outcomes and idempotency keys: prune so only
    /// what nobody submits or waits for again. `upto` is at most `base`.
    Prune { run: RunId, base: OperationSeq, upto: OperationSeq },
    /// A checkpoint is no longer there; if it has been replaced since, nothing happens.
    DropCheckpoint { checkpoint: CheckpointId },
    /// A run is gone, with its operations, snapshots, slots and checkpoints. No later one gets its number.
    DropRun { run: RunId },
    /// Both slots of a run are empty: it begins anew.
    DropSlots { run: RunId },
    /// A node of this name gets nothing new, or is given work again.
    Drained { node: String, drained: bool },
    /// A process has shown this certificate, or is known to have it; it replaces what is known of its name.
    Certificate(KnownCertificate),
    /// What the CA has said of a name is forgotten, as it is over. A revocation stays.
    ForgetCertificate { role: Role, name: String },
    /// What was issued to this name up to then (seconds since the Unix epoch) is refused. A later one
    /// replaces the earlier.
    Revoked { role: Role, name: String, upto: u64 },
}

/// A certificate by what is remembered of it. Times are in seconds since the Unix epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownCertificate {
    pub role: Role,
    pub name: String,
    /// Of the certificate of the CA that signed it.
    pub ca: Digest,
    pub issued_at: u64,
    pub expires_at: u64,
}

/// Where a run stands after an operation: what a snapshot's tensors don't say, so that operations
/// before it can be forgotten.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// Of the last operation that was done.
    pub incarnation: u32,
    /// Optimiser steps.
    pub step: u64,
    /// Configuration of the adapter.
    pub lora: LoraConfig,
}

/// A checkpoint as it is journaled.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedCheckpoint {
    pub checkpoint: Checkpoint,
    /// Name, blob, size.
    pub files: Vec<SavedFile>,
    /// Identity of a sampler checkpoint's weights, by which replicas verify them.
    pub policy: Option<PolicyId>,
    /// Saved in order to be served, not to be kept: the run's later ones push it out.
    pub published: bool,
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
    /// Absent: the pass is in a snapshot, so its data is of no use any more.
    pub operation: Option<Operation>,
    /// Of the operation's bytes.
    pub digest: Digest,
    /// Absent: it was accepted and not finished.
    pub outcome: Option<Outcome>,
}

/// One snapshot of a recovered run.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveredSnapshot {
    pub seq: OperationSeq,
    pub blob: BlobRef,
    pub standing: Standing,
    /// Bytes of the blobs that operations since the snapshot before it hold.
    pub payload_bytes: u64,
}

/// A run as the journal has it.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveredRun {
    pub run: RunId,
    pub create: CreateRun,
    pub model_digest: Digest,
    /// Under which its session asked for it.
    pub key: Option<OperationKey>,
    pub created_at_ms: u64,
    /// Oldest first.
    pub snapshots: Vec<RecoveredSnapshot>,
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
    /// Of the sessions that have one.
    pub owners: BTreeMap<SessionId, String>,
    /// Those that are left, by id.
    pub runs: Vec<RecoveredRun>,
    /// The highest number that a run ever had.
    pub last_run: u64,
    /// By id, that is in the order of saving.
    pub checkpoints: Vec<SavedCheckpoint>,
    /// Names of nodes.
    pub drained: BTreeSet<String>,
    /// The newest of each process that has one.
    pub certificates: Vec<KnownCertificate>,
    /// Up to when what was issued to a name is refused.
    pub revoked: BTreeMap<(Role, String), u64>,
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
            Self::Checkpoint(saved) => write!(f, "{}", saved.checkpoint.id),
            Self::DropCheckpoint { checkpoint } => write!(f, "dropping {checkpoint}"),
            Self::Slot { policy, .. } => write!(f, "the slot of {policy}"),
            Self::PublishFailed { seq, policy, .. } => {
                write!(f, "the failure of operation {} to publish {policy}", seq.0)
            }
            Self::DropRun { run } => write!(f, "dropping {run}"),
            Self::DropSlots { run } => write!(f, "dropping the slots of {run}"),
            Self::Drained { node, .. } => write!(f, "whether node {node} is drained"),
            Self::Certificate(KnownCertificate { role, name, .. }) => {
                write!(f, "the certificate of {role} {name}")
            }
            Self::ForgetCertificate { role, name } => {
                write!(f, "forgetting the certificate of {role} {name}")
            }
            Self::Revoked { role, name, .. } => write!(f, "the revocation of {role} {name}"),
            Self::Prune { run, base, upto } => {
                write!(f, "pruning {run} up to the snapshot after {} and operation {}", base.0, upto.0)
            }
        }
    }
}

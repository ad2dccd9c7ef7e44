use bincode::{Decode, Encode};

use crate::types::{
    Checkpoint, CheckpointFilesResponse, CheckpointId, LoraConfig, ModelInput, OperationError, PolicyId,
    RunId, SampleFlags, SampleResult, SamplingParams, ServerCapabilities, SessionId,
};

use super::{
    ids::{OperationKey, OperationSeq},
    operation::{BlobRef, Operation, OperationResult},
};

/// What a client (or the gateway) asks of the coordinator; each on a stream of its own.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum ClientRequest {
    /// → `Session`.
    CreateSession,
    /// → `Capabilities`.
    Capabilities,
    /// → `Run`, once the run is durable. Its ranks are formed in the background; operations
    /// may be submitted at once.
    CreateRun(CreateRun),
    /// → `Accepted`, once the operation is durable.
    Submit(SubmitOperation),
    /// → `Operation`: waits up to `hold_ms` for the outcome.
    WaitOperation { run: RunId, seq: OperationSeq, hold_ms: u32 },
    /// → `Sample`.
    Sample(SampleRequest),
    /// → `Run`.
    RunInfo { run: RunId },
    /// → `Checkpoints`: of one run, or of all.
    ListCheckpoints { run: Option<RunId> },
    /// → `CheckpointFiles`: over the URLs of the bucket that holds them if `presigned` and there is one,
    /// or else as blobs to be fetched with `GetBlob`.
    CheckpointFiles { checkpoint: CheckpointId, page_size: u32, page_token: u64, presigned: bool },
    /// → `Blob`: the tokenizer.json of a model, to be fetched with `GetBlob`.
    Tokenizer { base_model: String },
    /// → `Cluster`.
    ClusterStatus,
    /// → `Run`: the newest of this display name.
    FindRun { name: String },
    /// → `Session`: one that belongs to somebody, as its runs then do.
    CreateSessionFor { owner: String },
    /// → `SessionOwner`.
    SessionOwner { session: SessionId },
    /// → `Deleted`, once that is durable. What is loaded or served of it stays.
    DeleteCheckpoint { checkpoint: CheckpointId },
    /// → `Deleted`, once that is durable: the run, its operations and its checkpoints. What waits for it fails.
    DeleteRun { run: RunId },
    /// → `Run`: a new one that stands where `run` stood after `step`, as far back as history reaches.
    ForkRun { run: RunId, step: u64, name: Option<String> },
    /// → `Replayed`, once what led `run` to `step` has been repeated.
    ReplayRun { run: RunId, step: u64 },
    /// → `Blob`: a copy of the journal. It, and all blobs that it names, are there for a quarter of an hour.
    BackUp,
    /// → `Cluster`, once it is durable: no rank and no replica of the node is given anything new; or it is
    /// again.
    DrainNode { name: String, drain: bool },
    /// → `Cluster`, once it is durable: what has been issued to this name is refused. Absent `role`: the one that
    /// is known of the name.
    Revoke { role: Option<String>, name: String },
    /// → `Cluster`: a new CA signs, and the former one is trusted until every process has a certificate of the new
    /// one; or, with `finish`, no longer.
    RotateCa { finish: bool },
}

/// A run to create.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct CreateRun {
    pub session: SessionId,
    pub base_model: String,
    pub lora: LoraConfig,
    /// Data-parallel ranks; absent: all that the cluster has whenever ranks are formed.
    pub replicas: Option<u32>,
    /// Longest sequence; absent: the model's context.
    pub max_seq_len: Option<u32>,
    /// Tokens of a micro-batch; absent: 1,024.
    pub micro_batch_tokens: Option<u32>,
    /// Display name; absent: the base model.
    pub name: Option<String>,
}

/// An operation for a run's queue. Operations execute in the order in which they are accepted.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct SubmitOperation {
    pub run: RunId,
    pub key: OperationKey,
    pub operation: Operation,
}

/// Which weights a sample is drawn from.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum SampleTarget {
    /// A base model without adapter.
    Base { base_model: String },
    /// The live policy of a run; held until its version is at least `min_version`. With 0 also
    /// what it published at version 0.
    Live { run: RunId, min_version: u64 },
    /// Exactly these weights.
    Policy(PolicyId),
    /// A sampler checkpoint, `bt://loops:<run>/sampler_weights/<name>`.
    Checkpoint { path: String },
    /// What a run published at version 0, or else its base model: never anything later.
    Initial { run: RunId },
    /// The live policy of a run if its version is at least `min_version`, or else, without
    /// waiting, a sampler checkpoint.
    LiveOrCheckpoint { run: RunId, min_version: u64, path: String },
}

/// One `sample` call.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct SampleRequest {
    pub target: SampleTarget,
    pub prompt: ModelInput,
    pub num_samples: u32,
    pub params: SamplingParams,
    pub flags: SampleFlags,
}

/// Answer to a [`ClientRequest`].
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum ClientResponse {
    /// The session exists and is durable.
    Session(SessionId),
    /// What can be trained and sampled now.
    Capabilities(ServerCapabilities),
    /// The run as it stands.
    Run(RunInfo),
    /// The operation is durable and has its place in the run's order; the same place again for a
    /// key that was seen before.
    Accepted { seq: OperationSeq },
    /// `Pending` after `hold_ms` without an outcome.
    Operation(OperationStatus),
    /// What was sampled, and from which weights; no policy: the base model.
    Sample { result: SampleResult, policy: Option<PolicyId> },
    /// Newest first.
    Checkpoints(Vec<Checkpoint>),
    /// One page.
    CheckpointFiles(CheckpointFilesResponse),
    /// Stored, and to be fetched with `GetBlob`.
    Blob(BlobRef),
    /// Everything, for people.
    Cluster(ClusterStatus),
    /// The request was refused or failed.
    Error(OperationError),
    /// Nobody: the session belongs to whoever reaches the service.
    SessionOwner(Option<String>),
    /// It is not listed any more.
    Deleted,
    /// What a replay found.
    Replayed(Replayed),
}

/// A part of a run's history, computed again and compared with the journal.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Replayed {
    /// Of the snapshot from which it began; 0 also from the beginning.
    pub from_step: u64,
    pub to_step: u64,
    /// Operations that changed the state.
    pub operations: u32,
    /// The first that came out otherwise, in a sentence; absent: all are equal.
    pub difference: Option<String>,
}

/// State of a submitted operation.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum OperationStatus {
    /// Queued or executing.
    Pending,
    /// Its outcome is durable and committed.
    Done(OperationResult),
    /// It ended without effect; asked again, it says the same.
    Failed(OperationError),
}

/// What a run is and where it stands.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct RunInfo {
    pub run: RunId,
    pub session: SessionId,
    /// Of the session.
    pub owner: Option<String>,
    pub name: String,
    pub base_model: String,
    pub lora: LoraConfig,
    pub replicas: u32,
    pub max_seq_len: u32,
    /// Token ids of the base model are below it; absent while no node offers the model.
    pub vocab_size: Option<u32>,
    pub micro_batch_tokens: u32,
    pub incarnation: u32,
    /// Optimiser steps applied: the trainer's policy version.
    pub step: u64,
    /// The policy that samplers serve, if one was published after the first step.
    pub live: Option<PolicyId>,
    /// Since when, in milliseconds since the Unix epoch; 0 without one.
    pub live_since_ms: u64,
    /// What was published at step 0. It stays beside later ones, as a reference for them.
    pub initial: Option<PolicyId>,
    /// Number of the last accepted operation; 0 without one.
    pub accepted: u64,
    /// Operations accepted and not finished.
    pub queued: u32,
    /// `forming`, `ready`, `executing`, `waiting for nodes` …, for people.
    pub phase: String,
}

/// What a cluster looks like, for people.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct ClusterStatus {
    pub nodes: Vec<NodeStatus>,
    /// Nodes that are drained and not there.
    pub drained_away: Vec<String>,
    pub trust: TrustStatus,
    pub runs: Vec<RunInfo>,
}

/// Who is trusted, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct TrustStatus {
    /// While the CA is being changed: the processes that have no certificate of the new one.
    pub rotation: Option<Vec<String>>,
    /// Processes of which certificates were revoked: role and name.
    pub revoked: Vec<String>,
}

/// One node, for people.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct NodeStatus {
    pub name: String,
    pub pid: u32,
    pub trainers: u32,
    pub samplers: u32,
    pub numerics: String,
    /// Until when its certificate is good, in seconds since the Unix epoch; absent where nobody has one.
    pub certified_until: Option<u64>,
    /// Absent: it takes work.
    pub drain: Option<NodeDrain>,
}

/// What a node that is drained still has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct NodeDrain {
    /// Runs with a rank on it.
    pub runs: u32,
    /// Sample requests on its replicas.
    pub samples: u32,
}

impl NodeDrain {
    /// Whether it can stop and nobody notices.
    pub fn is_over(&self) -> bool {
        self.runs == 0 && self.samples == 0
    }
}

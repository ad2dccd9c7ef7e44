use std::collections::BTreeMap;

use bincode::{Decode, Encode};

use crate::{
    model::{Footprint, GpuFootprint},
    types::{
        DatumOutput, Digest, LoraConfig, OperationError, PolicyId, RunId, SampleFlags, SampleResult,
        SamplingParams,
    },
};

use super::{
    ids::{Epoch, Generation, NodeId, OpToken, RankIndex, RequestId},
    operation::{BlobRef, Operation, OperationResult, Saved},
};

/// What decides a run's bits beside its operations: all ranks of a run share it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Numerics {
    /// Version of this program.
    pub build: String,
    /// Whose bits: `amx_bf16`, `avx512`, `avx2`, `neon`, … or a GPU's name.
    pub kernels: String,
    /// Type of the base weights: `f32`.
    pub dtype: String,
    /// How ranks add up their gradients: `deterministic`, or `fast` where they are on GPUs.
    pub reduction: String,
}

/// A base model that a node has on disk.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ModelOffer {
    pub name: String,
    /// Other names it answers to.
    pub aliases: Vec<String>,
    /// Digest of the files it is loaded from.
    pub digest: Digest,
    pub context: u32,
    pub vocab: u32,
    /// tokenizer.json, as a blob that the node has put into the store.
    pub tokenizer: Digest,
    pub tokenizer_size: u64,
    /// What it takes of a node's memory.
    pub footprint: Footprint,
    /// And of the memory of its GPU, if one computes.
    pub gpu_footprint: Option<GpuFootprint>,
    /// Largest rank of an adapter on each of [`LoraTarget::ALL`](crate::types::LoraTarget::ALL).
    pub lora_rank_max: [u32; 8],
}

/// Memory that a node may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct NodeMemory {
    /// Bytes of the machine, or of the limit that the node was given.
    pub machine_bytes: u64,
    /// Bytes that the cache of each of its replicas may take; 0 if it is on a GPU.
    pub cache_bytes: u64,
}

/// Memory of the GPU on which a node computes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GpuMemory {
    /// Tells GPUs of a machine apart: two nodes may share one.
    pub gpu: String,
    /// Bytes that arrays may take.
    pub bytes: u64,
    /// Bytes of them that the cache of each replica may take.
    pub cache_bytes: u64,
}

/// A node introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NodeHello {
    pub protocol_version: u32,
    /// Chosen by whoever launched it; a later hello with the same name replaces the earlier.
    pub name: String,
    pub pid: u32,
    /// Ranks that it can hold.
    pub trainers: u32,
    /// Replicas that it runs.
    pub samplers: u32,
    pub models: Vec<ModelOffer>,
    pub numerics: Numerics,
    /// Where other nodes reach its QUIC listener.
    pub address: String,
    /// Machine and boot: ranks with the same one share memory.
    pub host: String,
    /// Absent: not known.
    pub memory: Option<NodeMemory>,
    /// Absent: no GPU computes.
    pub gpu_memory: Option<GpuMemory>,
}

/// What a rank must know of a run to hold its state.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct RunSpec {
    pub run: RunId,
    pub base_model: String,
    pub max_seq_len: u32,
    pub micro_batch_tokens: u32,
    /// The adapter that an `Init` without one of its own restores; sizes the buffers.
    pub lora: LoraConfig,
}

/// Where one rank of a run sits.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RankSeat {
    pub rank: RankIndex,
    pub node: NodeId,
    /// Which of the node's rank threads, from 0.
    pub slot: u32,
    pub host: String,
    pub address: String,
}

/// Coordinator → node, in order.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum CoordinatorMessage {
    /// First: the node is in.
    Welcome { node: NodeId, epoch: Epoch },
    /// Takes (or takes over) the ranks of a run that `roster` seats on this node, with the state
    /// of `restore` (a `TrainState`), or the fresh adapter of `spec.lora`. → `RanksReady` or `RanksFailed`.
    FormRanks {
        spec: RunSpec,
        epoch: Epoch,
        generation: Generation,
        roster: Vec<RankSeat>,
        restore: Option<BlobRef>,
    },
    /// Drops a run's ranks of this and any earlier generation.
    ReleaseRanks { run: RunId, generation: Generation },
    /// Every rank of the run computes the operation into its second buffer.
    /// → `Prepared` or `OperationFailed`, one per rank.
    Execute { token: OpToken, operation: Operation },
    /// The outcome is durable: what was prepared under `token` becomes the state.
    Commit { token: OpToken },
    /// What was prepared under `token` is dropped.
    Discard { token: OpToken },
    /// Rank 0 writes the committed state as a blob. → `SnapshotTaken`. `token.seq` is the last
    /// operation with an outcome. The state is taken in the order of the messages: an `Execute`
    /// or `Commit` behind this one may be handled before the blob is stored, but isn't in it.
    TakeSnapshot { token: OpToken },
    /// Every replica of the node fetches, verifies and holds an adapter without serving it.
    /// → `Staged` or `StageFailed`, once per node.
    Stage { policy: PolicyId, base_model: String, adapter: BlobRef },
    /// New requests for this policy are served from now on. → `Activated`.
    Activate { policy: PolicyId },
    /// The policy leaves memory when its last sequence has ended.
    Retire { policy: PolicyId },
    /// → `Pong`.
    Ping { nonce: u64 },
    /// Finish what runs and exit.
    Shutdown,
    /// Certificates of these nodes that were issued up to then (seconds since the Unix epoch) are refused; all
    /// that there are.
    Revoked { nodes: Vec<(String, u64)> },
}

/// Node → coordinator, in order.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum NodeMessage {
    /// The node's ranks of the run hold the state that `FormRanks` asked for.
    RanksReady { run: RunId, generation: Generation },
    /// They don't, and hold nothing of this generation.
    RanksFailed { run: RunId, generation: Generation, error: OperationError, blame: Blame },
    /// One rank has computed the operation.
    Prepared {
        token: OpToken,
        rank: RankIndex,
        /// Over the state that a commit would leave; equal on all ranks.
        state: Digest,
        /// Equal on all ranks. Blobs that it names are stored before this is sent.
        result: OperationResult,
        /// What a save left: its blobs are stored by rank 0 before this is sent.
        saved: Option<Saved>,
        /// Optimiser steps after the operation.
        step: u64,
    },
    /// The operation is refused by the data itself (every rank says so), or by this rank.
    ///
    /// An `OptimStep` refused as `NotFinite` still clears the accumulated gradient, by the
    /// `Discard` that follows at the latest. Replay therefore executes it again, and expects
    /// this answer again; no other failed operation is executed on replay.
    OperationFailed { token: OpToken, rank: RankIndex, error: OperationError, blame: Blame },
    /// The blob is stored.
    SnapshotTaken { token: OpToken, snapshot: BlobRef },
    /// The run goes on without it; the earlier snapshot stays.
    SnapshotFailed { token: OpToken, error: OperationError },
    /// Every replica of the node holds the policy, verified by its digest.
    Staged { policy: PolicyId },
    /// Some replica doesn't; the others drop it at `Retire`.
    StageFailed { policy: PolicyId, error: OperationError },
    /// Every replica of the node serves it to new requests.
    Activated { policy: PolicyId },
    /// The node's control thread is alive.
    Pong { nonce: u64 },
    /// The operation is not done but under way: so many of this rank's micro-batches are computed.
    /// At most one a second and rank.
    Progress { token: OpToken, rank: RankIndex, done: u32, of: u32 },
}

/// Why an operation did not get prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Blame {
    /// Its inputs or the numbers: it would fail again, on every rank.
    Operation,
    /// A lost peer, a deadline, no memory: another rank set might do it.
    Environment,
    /// This rank of the set did not answer, or could not be met.
    Peer(RankIndex),
}

/// What one rank adds to a `Forward` or `ForwardBackward`: gathered by all ranks of the run, so
/// that each builds the same result and hears of a failure at once.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum RankPart {
    /// The consecutive micro-batches from number `first`; may be none.
    Computed { first: u32, micro_batches: Vec<MicroBatchPart> },
    /// This rank gave up; so do all.
    Failed { error: OperationError, blame: Blame },
}

/// What one micro-batch adds to a result.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct MicroBatchPart {
    pub loss_sum: f64,
    /// Active positions.
    pub active: u64,
    /// Further sums over active positions, by name.
    pub sums: BTreeMap<String, f64>,
    /// Largest values over active positions, by name.
    pub maxima: BTreeMap<String, f64>,
    /// One per datum, in order.
    pub outputs: Vec<DatumOutput>,
}

/// One sample request on its way to a replica.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Generate {
    pub request: RequestId,
    pub base_model: String,
    /// Absent: the base model.
    pub policy: Option<PolicyId>,
    pub prompt: Vec<u32>,
    pub num_samples: u32,
    pub params: SamplingParams,
    /// Minted by the coordinator when the caller gave none: a retry elsewhere draws the same.
    pub seed: u64,
    pub flags: SampleFlags,
}

/// What a replica answers.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum GenerateReply {
    /// All `num_samples` sequences.
    Done(SampleResult),
    /// None of them.
    Failed(OperationError),
}

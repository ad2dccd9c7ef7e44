//! What reaches the state machine and what it wants done.

use crate::{
    journal::{Goal, JournalError, KnownCertificate, Record, Way},
    protocol::{
        Call, ClientRequest, ClientResponse, CoordinatorMessage, Generate, GenerateReply, NodeHello, NodeId,
        NodeMessage, OperationSeq, RequestId, Trace,
    },
    transport::Revocation,
    types::{Digest, ErrorKind, RunId},
};

/// A request whose answer somebody waits for; numbered by whoever feeds the state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaiterId(pub u64);

/// One append to the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AppendId(pub u64);

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A client or gateway asks. Blobs that `request` names are in the store. `entropy` is
    /// fresh: a sample without a seed gets it as its own.
    Request { waiter: WaiterId, call: Call, request: ClientRequest, entropy: u64 },
    /// Nobody waits any more: a sample is cancelled, an operation goes on.
    RequestGone { waiter: WaiterId },
    /// A control stream opened. `node` was never used before in this epoch, and rises.
    NodeJoined { node: NodeId, hello: NodeHello },
    /// In the order in which the node sent them.
    NodeMessage { node: NodeId, message: NodeMessage },
    /// Its control stream is gone, or its queue is full.
    NodeLost { node: NodeId, reason: String },
    /// The answer to one [`Effect::Append`]; in the order of the appends.
    /// Only errors that leave the journal usable: the others end the coordinator.
    Appended { append: AppendId, result: Result<(), JournalError> },
    /// The answer to one [`Effect::Generate`]; `Err`: the stream broke.
    Generated { request: RequestId, attempt: u32, reply: Result<GenerateReply, String> },
    /// The answer to one [`Effect::Recall`].
    Recalled { waiter: WaiterId, way: Result<Way, JournalError> },
    /// The end of one [`Effect::Revoked`]: whoever it concerns is refused, this machine's processes can show others.
    ShutOut { waiter: WaiterId },
    /// A process has shown this certificate, or says that it has it.
    Certified(KnownCertificate),
    /// Which CA signs, by the SHA-256 of its certificate, and whether a former one is trusted beside it. At the
    /// start, and after each change; never where nobody has certificates.
    Ca { ca: Digest, rotating: bool },
    /// Every [`TICK_MS`](super::TICK_MS): deadlines are looked at here only.
    Tick,
    /// Shut down: finish what executes, take snapshots, let the nodes go.
    Drain,
}

/// What the end of an operation is counted by.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    pub run: RunId,
    pub seq: OperationSeq,
    /// As in the journal.
    pub operation: &'static str,
    /// Absent: it was done.
    pub error: Option<ErrorKind>,
    /// Since it was accepted, or since the coordinator started.
    pub took_ms: u64,
    /// Tokens that an optimiser step was over.
    pub trained_tokens: u64,
    pub trace: Option<Trace>,
}

/// Something to do. Effects are performed in order; each of one kind to one receiver stays in
/// order, which is what makes the order of operations the same on every rank.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Make durable together or not at all → [`Event::Appended`].
    Append { append: AppendId, records: Vec<Record> },
    /// To the node's control stream. If its queue is full → [`Event::NodeLost`].
    Send { node: NodeId, message: CoordinatorMessage },
    /// Close the node's connection, telling it why; it is forgotten already.
    Dismiss { node: NodeId, reason: String },
    /// Answer a request; at most once each. Nobody may be left to hear it.
    Respond { waiter: WaiterId, response: ClientResponse },
    /// On a stream of its own → [`Event::Generated`] with the same `attempt`.
    Generate { node: NodeId, attempt: u32, generate: Generate },
    /// Drop the stream of a request that is being generated; no answer is wanted.
    CancelGenerate { request: RequestId },
    /// An operation has its durable outcome: count it, and tell the log.
    Ended(Ended),
    /// Look up how a run came to a step, after the appends before → [`Event::Recalled`].
    Recall { waiter: WaiterId, run: RunId, goal: Goal },
    /// Refuse these and no others from now on → [`Event::ShutOut`]; then end the connections that they concern.
    Revoked { revocations: Vec<Revocation>, waiter: WaiterId },
    /// Trust the former CA no more → [`Event::Ca`].
    FinishRotation,
    /// Everything is durable and told: close the journal and end. The last effect ever.
    Stop,
}

//! Every message between processes, its size limit and its encoding: the only user of
//! bincode.
//!
//! ```text
//!   client ──Request──────────────► coordinator ◄──NodeControl── node      (long-lived, ordered)
//!      │                               │  ▲
//!      ├──PutBlob / GetBlob───────────►│  └──PutBlob / GetBlob──── node   (payloads by digest)
//!                                      └──Generate──────────────► node    (one stream a request)
//!                                node ◄──Collective──► node                (one stream a peer)
//! ```
//!
//! Beside them, a process without a certificate asks for one at the doorway: [`JoinRequest`], [`JoinReply`].
//!
//! A stream is opened with one [`StreamOpen`] frame that says what it carries. Control stays
//! small; whatever may be large (datums, results, adapters, snapshots) is a blob on a stream
//! of its own, named by its digest, and a message carries the digest.
//!
//! Variants are only ever appended: their number is the wire format.

mod codec;
mod encode;

mod call;
mod client;
mod figures;
mod ids;
mod join;
mod node;
mod operation;
mod stream;

pub use call::{Call, Quota, Trace};
pub use client::{
    ClientRequest, ClientResponse, ClusterStatus, CreateRun, NodeDrain, NodeStatus, OperationStatus,
    Replayed, RunInfo, SampleRequest, SampleTarget, SubmitOperation, TrustStatus,
};
pub use codec::{CodecError, decode, decode_compressed, encode, encode_compressed};
pub use figures::{EndedOperations, Figures};
pub use ids::{Epoch, Generation, NodeId, OpToken, OperationKey, OperationSeq, RankIndex, RequestId};
pub use join::{HeldCertificate, JOIN_ALPN, JoinReply, JoinRequest, MAX_JOIN_MESSAGE, TrustReply};
pub use node::{
    Blame, CoordinatorMessage, Generate, GenerateReply, GpuMemory, MicroBatchPart, ModelOffer, NodeHello,
    NodeMemory, NodeMessage, Numerics, RankPart, RankSeat, RunSpec,
};
pub use operation::{
    ADAPTER_FILE, BLOB_PATH, BlobRef, LoadSource, MAX_INLINE_PAYLOAD, Operation, OperationResult, Payload,
    STATE_FILE, Saved, SavedFile,
};
pub use stream::{BlobReply, StreamOpen};

/// Version of these messages: part of the ALPN name and of every hello.
pub const PROTOCOL_VERSION: u32 = 4;

/// ALPN name under which endpoints speak this protocol.
pub const ALPN: &[u8] = b"lockstep/4";

const _: () =
    assert!(ALPN[ALPN.len() - 1] == b'0' + PROTOCOL_VERSION as u8, "the ALPN name ends in the version");

/// Largest control message. The largest legitimate one is a `Generate` with a prompt of
/// 128 Ki tokens (512 KiB) or its reply with 20 alternatives for each of 32 Ki positions.
pub const MAX_MESSAGE: usize = 8 << 20;

/// Largest blob that a peer may offer: a snapshot of a large adapter with its moments.
pub const MAX_BLOB: u64 = 8 << 30;

/// Most bytes of a blob that are asked for as a part of it.
pub const MAX_BLOB_PART: u64 = 16 << 20;

#[cfg(test)]
mod tests;

use bincode::{Decode, Encode};

use crate::types::{Digest, OperationError, RunId};

use super::{
    call::Call,
    client::ClientRequest,
    ids::{Epoch, Generation, RankIndex},
    join::HeldCertificate,
    node::{Generate, NodeHello},
};

/// First frame of every stream: what the stream carries.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum StreamOpen {
    /// Node → coordinator. Then frames both ways until one side goes:
    /// [`NodeMessage`](super::NodeMessage) up, [`CoordinatorMessage`](super::CoordinatorMessage) down.
    NodeControl(NodeHello),
    /// Client or gateway → coordinator. One [`ClientResponse`](super::ClientResponse) frame answers.
    Request { call: Call, request: ClientRequest },
    /// Anyone → coordinator: `size` raw bytes follow; one [`BlobReply`] frame answers once
    /// they are durable and hash to `digest`.
    PutBlob { digest: Digest, size: u64 },
    /// Anyone → coordinator: one [`BlobReply`] frame answers; on `Found`, raw bytes follow.
    GetBlob { digest: Digest },
    /// Coordinator → node: one [`GenerateReply`](super::GenerateReply) frame answers.
    Generate(Generate),
    /// Rank → rank: frames of the collective follow, defined in `collective/`.
    Collective { run: RunId, epoch: Epoch, generation: Generation, from: RankIndex, to: RankIndex },
    /// Client or gateway → coordinator: `length` bytes of a blob from `offset` on, answered like `GetBlob`. At most
    /// [`MAX_BLOB_PART`](super::MAX_BLOB_PART) of them.
    GetBlobPart { digest: Digest, offset: u64, length: u64 },
    /// Client or gateway → coordinator: one [`Figures`](super::Figures) frame answers.
    Figures,
    /// Node, client or gateway → coordinator: one [`TrustReply`](super::TrustReply) frame answers.
    Trust(HeldCertificate),
    /// Node, client or gateway → coordinator: a certificate of the same name and role for this key, an
    /// uncompressed point on P-256. One [`JoinReply`](super::JoinReply) frame answers.
    Renew { public_key: Vec<u8> },
}

/// Answer to `PutBlob` and `GetBlob`.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum BlobReply {
    /// The blob is durable.
    Stored,
    /// `size` raw bytes follow.
    Found { size: u64 },
    /// No such blob, a digest that does not match, no room.
    Refused(OperationError),
}

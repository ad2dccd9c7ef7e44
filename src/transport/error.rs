use std::{io, path::PathBuf, time::Duration};

/// Why an identity, an endpoint, a connection or a stream can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    // What the caller gave.
    /// A name that can't stand in a certificate.
    #[error(
        "`{name}` is no process name: 1 to {limit} characters of a-z, 0-9 and `-`, not beginning or ending with `-`"
    )]
    InvalidName { name: String, limit: usize },
    /// An address that this kind of endpoint can't use.
    #[error("can't use the address {address}: {reason}")]
    InvalidAddress { address: String, reason: String },

    // Files and sockets of this machine.
    /// A file of the CA or of an identity could not be read or written.
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    /// A file of the CA or of an identity is not what it should be.
    #[error("{} is damaged: {problem}", .path.display())]
    Damaged { path: PathBuf, problem: String },
    /// A certificate or key could not be made or used.
    #[error("certificate: {0}")]
    Certificate(String),
    /// A certificate's time is over.
    #[error(
        "the certificate of {who} expired {ago}, and nothing renewed it; it needs a new token (`lockstep token create`)"
    )]
    Expired { who: String, ago: String },
    /// Another process has the port, or another endpoint the in-memory name.
    #[error("{address} is in use by another process: stop it or choose another port (0: any)")]
    AddressInUse { address: String },
    /// The socket could not be bound.
    #[error("can't listen on {address}: {source}")]
    Bind { address: String, source: io::Error },

    // Connecting.
    /// The address has no route, or its name no address.
    #[error("{address} can't be reached: {reason}")]
    Unreachable { address: String, reason: String },
    /// The other end is not who it should be: another cluster, or another role.
    #[error("{address} is not the expected {role}: {reason}")]
    Untrusted { address: String, role: &'static str, reason: String },
    /// The other end does not accept our certificate or our protocol version.
    #[error("{address} refused the connection: {reason}")]
    Refused { address: String, reason: String },
    /// The other end has too many handshakes or connections waiting.
    #[error("{address} takes no connection at the moment")]
    Busy { address: String },
    /// The cluster has put this process out.
    #[error("put out of the cluster: {reason}")]
    ShutOut { reason: String },
    /// Nobody answered within the deadline.
    #[error("{address} did not answer within {deadline:?}")]
    ConnectTimeout { address: String, deadline: Duration },

    // A connection that was established.
    /// The other end closed it.
    #[error("closed by the other end: {}", or_no_reason(.reason))]
    ClosedByPeer { reason: String },
    /// This end closed it.
    #[error("closed by this process")]
    ClosedLocally,
    /// The other end has not been heard for the idle timeout.
    #[error("the other end has fallen silent")]
    TimedOut,
    /// The connection broke: the other end restarted, or broke the rules.
    #[error("connection lost: {reason}")]
    Lost { reason: String },
    /// The endpoint was closed.
    #[error("the endpoint is closed")]
    EndpointClosed,

    // A stream.
    /// The other end dropped its sending half before it had finished (code 0), or reset it with a
    /// code that says why.
    #[error("the other end gave up the stream before its end (code {code})")]
    Reset { code: u32 },
    /// The other end dropped its receiving half.
    #[error("the other end reads the stream no further")]
    Stopped,
    /// This half has finished, or an earlier call on it was cancelled half-way.
    #[error("the stream can't be written any more: {reason}")]
    NotWritable { reason: &'static str },
    /// A frame longer than its reader takes (or than a `u32` can say).
    #[error("frame of {size} bytes is over the limit of {limit}")]
    FrameTooLarge { size: usize, limit: usize },
    /// The stream ended inside a frame, or before the promised number of bytes.
    #[error("stream ended after {got} of {expected} bytes")]
    Truncated { got: u64, expected: u64 },
}

impl TransportError {
    /// Whether the same attempt, on a new connection, may go well later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Busy { .. }
            | Self::ConnectTimeout { .. }
            | Self::ClosedByPeer { .. }
            | Self::TimedOut
            | Self::Lost { .. }
            | Self::Reset { .. }
            | Self::Stopped => true,
            Self::InvalidName { .. }
            | Self::InvalidAddress { .. }
            | Self::File { .. }
            | Self::Damaged { .. }
            | Self::Certificate(_)
            | Self::Expired { .. }
            | Self::ShutOut { .. }
            | Self::AddressInUse { .. }
            | Self::Bind { .. }
            | Self::Untrusted { .. }
            | Self::Refused { .. }
            | Self::ClosedLocally
            | Self::EndpointClosed
            | Self::NotWritable { .. }
            | Self::FrameTooLarge { .. }
            | Self::Truncated { .. } => false,
        }
    }
}

fn or_no_reason(reason: &str) -> &str {
    if reason.is_empty() { "no reason given" } else { reason }
}

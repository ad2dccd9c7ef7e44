use std::fmt;

use bincode::{Decode, Encode};

use super::ids::OperationKey;

/// What accompanies a [`ClientRequest`](super::ClientRequest): who is served within which bounds, and where
/// the request came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Call {
    /// What whoever asks may have at once.
    pub quota: Quota,
    /// Where the request came from, for the log.
    pub trace: Option<Trace>,
    /// A `CreateRun` or `ForkRun` of one session under a key that was seen before is the run that it made then.
    pub key: Option<OperationKey>,
}

/// What the runs of one owner may take together; absent: no bound of their own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Quota {
    /// Runs that are not deleted.
    pub runs: Option<u32>,
    /// Operations that are accepted and not finished.
    pub queued_operations: Option<u32>,
    /// Bytes of saved checkpoints.
    pub checkpoint_bytes: Option<u64>,
}

/// A request's place in a W3C trace context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Trace {
    /// Shared by all that one cause leads to.
    pub trace_id: [u8; 16],
    /// Of this request alone.
    pub request_id: [u8; 8],
}

/// `TRACE_ID/REQUEST_ID` in hexadecimal digits.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = |f: &mut fmt::Formatter<'_>, bytes: &[u8]| {
            bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        };
        hex(f, &self.trace_id)?;
        f.write_str("/")?;
        hex(f, &self.request_id)
    }
}

use super::TreeError;
use crate::protocol::{OpToken, RankIndex};

/// Why a collective did not complete. None of them is the operation's own fault: another rank set
/// may do it. The collective that returned one is used up.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CollectiveError {
    #[error("{operation} of {token}: rank {} did not answer within its deadline", .missing.0)]
    Deadline { operation: &'static str, token: OpToken, missing: RankIndex },
    #[error("{operation} of {token}: rank {} is gone: {reason}", .missing.0)]
    Lost { operation: &'static str, token: OpToken, missing: RankIndex, reason: String },
    /// What a rank contributed belongs to another call, or does not fit the others.
    #[error("{operation} of {token}: what rank {} contributed does not fit: {problem}", .rank.0)]
    Mismatch { operation: &'static str, token: OpToken, rank: RankIndex, problem: String },
    /// Together the ranks do not hold each leaf once.
    #[error("{operation} of {token}: {error}")]
    NoTree { operation: &'static str, token: OpToken, error: TreeError },
    /// The abort handle was used.
    #[error("{operation} of {token}: called off")]
    Aborted { operation: &'static str, token: OpToken },
    /// An earlier call failed.
    #[error("{operation} of {token}: an earlier collective of this generation failed; form the ranks anew")]
    UsedUp { operation: &'static str, token: OpToken },
    /// This machine could not do its part.
    #[error("{operation} of {token}: {problem}")]
    System { operation: &'static str, token: OpToken, problem: String },
}

impl CollectiveError {
    /// The rank that kept the call from completing, if it was another one.
    pub fn missing(&self) -> Option<RankIndex> {
        match self {
            Self::Deadline { missing, .. } | Self::Lost { missing, .. } => Some(*missing),
            Self::Mismatch { .. }
            | Self::NoTree { .. }
            | Self::Aborted { .. }
            | Self::UsedUp { .. }
            | Self::System { .. } => None,
        }
    }
}

//! Why the coordinator refuses a request, and why it can't go on itself.

use crate::{
    journal::JournalError,
    store::StoreError,
    transport::TransportError,
    types::{CheckpointId, ErrorKind, InvalidInput, OperationError, PolicyId, RunId, SessionId},
};

/// What ends [`serve`](super::serve) before its shutdown was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// Another coordinator holds the directory, or it can't be read.
    #[error("the journal of this data directory can't be used: {0}")]
    Journal(#[from] JournalError),
    #[error("the blobs of this data directory can't be used: {0}")]
    Store(#[from] StoreError),
    #[error("the coordinator no longer hears the network: {0}")]
    Transport(#[from] TransportError),
    /// A handler panicked: state and journal may differ, so nothing more is decided.
    #[error("the coordinator's actor died; restart it to go on from the journal")]
    ActorDied,
    /// Nobody accepts connections any more, though no shutdown was asked for.
    #[error("the endpoint was closed under the coordinator")]
    EndpointClosed,
}

impl CoordinatorError {
    /// Whether starting the coordinator again would end the same way.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Journal(error) => matches!(
                error,
                JournalError::Held { .. }
                    | JournalError::Version { .. }
                    | JournalError::Foreign { .. }
                    | JournalError::Corrupt { .. }
                    | JournalError::Open { .. }
            ),
            Self::Store(error) => error.is_final(),
            Self::Transport(_) | Self::ActorDied | Self::EndpointClosed => false,
        }
    }
}

/// A request that is not carried out, and whose fault that is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Invalid(#[from] InvalidInput),
    #[error("`session`: {0} does not exist; make one with create_session")]
    UnknownSession(SessionId),
    #[error("{0} does not exist")]
    UnknownRun(RunId),
    #[error("`step`: history doesn't lead {run} to step {step}; {}", reach_of(.reach))]
    BeyondHistory { run: RunId, step: u64, reach: Option<(u64, u64)> },
    #[error("`name`: no node is called {name:?}; there: {there}")]
    UnknownNode { name: String, there: String },
    #[error("no run is called {0:?}")]
    NoRunNamed(String),
    #[error("{run} has no operation {seq}, or its result is no longer kept")]
    UnknownOperation { run: RunId, seq: u64 },
    #[error("`base_model`: {name:?} is not offered; offered: {offered}")]
    UnknownModel { name: String, offered: String },
    #[error("no node has joined, so no model is offered yet; `lockstep cluster` shows the nodes")]
    NoNode,
    #[error("there is no checkpoint {0}")]
    UnknownCheckpoint(String),
    #[error("{0} does not exist")]
    UnknownCheckpointId(CheckpointId),
    #[error("policy {0} is not kept; publish or save it under a name of its own")]
    UnknownPolicy(PolicyId),
    /// More data-parallel ranks than there ever were trainer slots.
    #[error(
        "`replicas`: {asked} asked for, but the cluster has had at most {most} trainer slots that offer {model:?}"
    )]
    TooManyReplicas { asked: u32, most: u32, model: String },
    #[error("{run} has {bound} operations that are not finished; wait for one before submitting more")]
    QueueFull { run: RunId, bound: usize },
    /// Waits for its own.
    #[error("`quota`: {bound} operations of all your runs are not finished, the most at once; wait for one")]
    TooManyQueued { bound: u32 },
    #[error("`quota`: you have {bound} runs, the most that you may; delete one to make another")]
    TooManyRuns { bound: u32 },
    #[error(
        "`quota`: your checkpoints take {used} bytes{}, of {bound} that they may; delete some, or let them expire",
        match .more { 0 => String::new(), more => format!(", this one {more} more") }
    )]
    DiskQuota { used: u64, more: u64, bound: u64 },
    #[error("{bound} {what} are in flight; try again when some have finished")]
    Overloaded { what: &'static str, bound: usize },
    /// Disk full, most likely.
    #[error("nothing can be made durable now, so nothing is accepted: {0}")]
    NotDurable(String),
    #[error("the service is shutting down; try again when it is back")]
    Draining,
    /// Its ranks disagreed, or its state can't be brought back.
    #[error("{run} takes no more operations: {reason}")]
    Broken { run: RunId, reason: String },
    #[error("no node that can serve {model:?} for {waited_ms} ms")]
    NoSampler { model: String, waited_ms: u64 },
    #[error("gave up after {tries} tries on different replicas; the last said: {last}")]
    TriesExhausted { tries: u32, last: String },
    #[error("the live version of {run} is {}, behind the {floor} that was asked for",
        .live.map_or("none".to_owned(), |v| v.to_string()))]
    VersionBehind { run: RunId, live: Option<u64>, floor: u64 },
    #[error("no answer from the replica for {waited_ms} ms")]
    GenerateDeadline { waited_ms: u64 },
    /// A fault of Lockstep, caught before anyone saw a wrong answer.
    #[error("{0}")]
    Fault(String),
}

impl Refusal {
    /// Who is at fault.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) | Self::UnknownSession(_) | Self::TooManyReplicas { .. } => {
                ErrorKind::InvalidInput
            }
            Self::BeyondHistory { .. } => ErrorKind::InvalidInput,
            Self::UnknownNode { .. }
            | Self::UnknownRun(_)
            | Self::NoRunNamed(_)
            | Self::UnknownOperation { .. }
            | Self::UnknownModel { .. }
            | Self::UnknownCheckpoint(_)
            | Self::UnknownCheckpointId(_)
            | Self::UnknownPolicy(_) => ErrorKind::NotFound,
            Self::QueueFull { .. }
            | Self::TooManyQueued { .. }
            | Self::Overloaded { .. }
            | Self::NotDurable(_) => ErrorKind::ResourceExhausted,
            // Waiting would not help, so it is not "too much at once".
            Self::TooManyRuns { .. } | Self::DiskQuota { .. } => ErrorKind::PermissionDenied,
            Self::Draining | Self::NoNode | Self::NoSampler { .. } | Self::TriesExhausted { .. } => {
                ErrorKind::Unavailable
            }
            Self::VersionBehind { .. } | Self::GenerateDeadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Broken { .. } | Self::Fault(_) => ErrorKind::Internal,
        }
    }
}

/// How far history goes, and how it goes further.
fn reach_of(reach: &Option<(u64, u64)>) -> String {
    match reach {
        None => "there is none yet".to_owned(),
        Some((oldest, newest)) => format!(
            "the oldest step that it reaches is {oldest}, the newest {newest} (`--history` keeps more snapshots)"
        ),
    }
}

impl From<Refusal> for OperationError {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.kind(), refusal.to_string())
    }
}

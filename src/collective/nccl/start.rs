//! The start of the ranks' communicators: in the end all of them have one, or none has.
//!
//! ```text
//!   control:  can each rank begin? rank 0 adds the identifier        if not, none begins
//!   NCCL:     the communicators meet under it                        each rank waits for its own
//!   control:  is each rank's there?                                  if not, none goes on with it
//! ```
//!
//! Both times a rank hears from every other one or its generation is lost. So whoever goes on has heard the same as
//! the rest, and no set is split, some ranks with NCCL and some without. A rank that is gone is no failure of NCCL:
//! it is named, as everywhere.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    Fault, Link,
    failures::StartFailures,
    link::{Ended, wait},
    rounds::{IDENTIFIER, VERDICT, tell},
};
use crate::{
    collective::{CollectiveError, contribution::Call, exchange::Exchange},
    protocol::RankIndex,
};

/// How a rank opens its link.
pub(super) struct Opening<'a, I, O> {
    /// What this process remembers.
    pub failures: &'a StartFailures,
    /// How long the communicators may take to meet.
    pub patience: Duration,
    /// Makes the identifier; called on rank 0.
    pub make_id: I,
    /// Begins to make the link with it.
    pub open: O,
}

/// What became of it, on every rank the same.
pub(super) enum Started<C, L> {
    Linked(C, L),
    /// `control` is as good as it was.
    Refused(C, Refusal),
}

/// Why there is no link: what one of the ranks said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub rank: RankIndex,
    pub cause: Cause,
    /// The call, and what it answered.
    pub why: String,
}

/// If several ranks can't go on, the first of these is what is told: the rest follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Cause {
    /// A call of CUDA or NCCL failed.
    Failed,
    /// The communicator was not there in time.
    Late,
    /// These GPUs failed lately, and were not tried.
    Remembered,
}

/// What keeps a rank from going on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Obstacle {
    cause: Cause,
    why: String,
}

/// How long communicators may take to meet. It is seconds, more for the first of a process; NCCL itself may try for
/// ever to reach an address that a firewall swallows.
#[cfg(feature = "nccl")]
pub(super) const START_PATIENCE: Duration = Duration::from_secs(60);

/// How long a rank may take beyond that to say how it went: it may have to abort first, which is bounded
/// (`device`).
const VERDICT_GRACE: Duration = Duration::from_secs(25);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}: {}", self.rank.0, self.why)
    }
}

impl From<Fault> for Obstacle {
    fn from(fault: Fault) -> Self {
        Self { cause: Cause::Failed, why: fault.to_string() }
    }
}

/// Makes the ranks' communicators meet under an identifier that rank 0 makes. It goes from rank to rank over
/// `control`, which is this generation's and, between hosts, mutually authenticated.
///
/// `remembered`: why this rank won't try. Takes as long as the others need to come to it (`call`'s deadline), and
/// then `opening.patience` and a grace at most.
pub(super) fn start<C: Exchange, L: Link>(
    mut control: C,
    call: &Call,
    remembered: Option<String>,
    opening: Opening<'_, impl FnOnce() -> Result<Vec<u8>, Fault>, impl FnOnce(&[u8]) -> Result<L, Fault>>,
) -> Result<Started<C, L>, CollectiveError> {
    let Opening { patience, make_id, open, .. } = opening;
    let mine = match remembered {
        Some(why) => Err(Obstacle { cause: Cause::Remembered, why }),
        None if control.rank() == RankIndex(0) => make_id().map_err(Obstacle::from),
        None => Ok(Vec::new()),
    };
    let id = match agree(&mut control, call, IDENTIFIER, &mine)? {
        Ok(mut said) => said.swap_remove(0),
        Err(refusal) => return Ok(Started::Refused(control, refusal)),
    };
    let deadline = Instant::now() + patience;
    let opened = open(&id).map_err(Obstacle::from).and_then(|link| until_there(link, deadline, patience));
    let (link, mine) = match opened {
        Ok(link) => (Some(link), Ok(Vec::new())),
        Err(obstacle) => (None, Err(obstacle)),
    };
    let call = Call { deadline: deadline + VERDICT_GRACE, ..*call };
    let verdict = match (agree(&mut control, &call, VERDICT, &mine), link) {
        (Ok(Ok(_)), Some(link)) => return Ok(Started::Linked(control, link)),
        (verdict, None) => verdict,
        (verdict, Some(mut link)) => {
            // It has nobody left to talk with.
            link.abort();
            verdict
        }
    };
    match verdict? {
        Err(refusal) => Ok(Started::Refused(control, refusal)),
        Ok(_) => Err(call.mismatch(control.rank(), "its communicator is not there, and it said that it was")),
    }
}

/// Waits until a communicator is there, and ends one that is not.
fn until_there<L: Link>(mut link: L, deadline: Instant, patience: Duration) -> Result<L, Obstacle> {
    // Nobody has got a handle to abort with yet.
    let obstacle = match wait(&mut link, L::is_queued, || false, deadline) {
        Ok(()) => return Ok(link),
        Err(Ended::Fault(fault)) => fault.into(),
        Err(Ended::Deadline | Ended::Aborted) => {
            let why = format!(
                "ncclCommInitRankConfig: no communicator within {patience:?}, though every rank is there"
            );
            Obstacle { cause: Cause::Late, why }
        }
    };
    link.abort();
    Err(obstacle)
}

/// Tells every rank whether this one can go on, and hears it from each: what they said, or why none goes on.
fn agree<C: Exchange>(
    control: &mut C,
    call: &Call,
    round: u64,
    mine: &Result<Vec<u8>, Obstacle>,
) -> Result<Result<Vec<Vec<u8>>, Refusal>, CollectiveError> {
    let said: Vec<Result<Vec<u8>, Obstacle>> = tell(control, call, round, mine)?;
    let obstacles =
        said.iter().zip(0..).filter_map(|(said, rank)| Some((said.as_ref().err()?, RankIndex(rank))));
    if let Some((Obstacle { cause, why }, rank)) = obstacles.min_by_key(|(obstacle, _)| obstacle.cause) {
        return Ok(Err(Refusal { rank, cause: *cause, why: why.clone() }));
    }
    Ok(Ok(said.into_iter().flatten().collect()))
}

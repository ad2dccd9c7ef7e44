//! What a rank slot decides: which runs it holds, what each has prepared, which messages are
//! stale, and the one order in which its compute thread works.
//!
//! ```text
//!   Form ──► Forming ──Formed──► Idle ──Execute──► Executing ──┬─► Prepared ──Commit──► Idle
//!                                  ▲                           └─► Refused ───Discard─► Idle
//!                                  └──────────── Discard, from any of the three ◄──────┘
//! ```
//!
//! The thread does one job at a time; what waits for it waits here, so that releasing a run
//! also takes back what it had queued. At most one operation, one commit or discard and one
//! snapshot of each run wait, so [`MAX_RUNS`] bounds the queue.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    protocol::{
        Blame, BlobRef, Epoch, Generation, NodeMessage, OpToken, Operation, OperationSeq, RankIndex,
        RankSeat, RunSpec,
    },
    types::{ErrorKind, OperationError, RunId},
};

use super::{Failure, Prepared, RankReport};

/// Most runs whose state one slot holds: each costs four vectors of its adapter's size.
pub const MAX_RUNS: usize = 64;

/// Released runs whose generation is remembered, so that a late message of an older one is
/// still refused. The lowest run numbers are forgotten first.
const MAX_FENCES: usize = 4096;

/// What reaches a slot.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Hold a rank of this run. Replaces the run's earlier generation.
    Form(Formation),
    /// Drop the run's rank of this and any earlier generation.
    Release { run: RunId, generation: Generation },
    /// Compute into the second buffer.
    Execute { token: OpToken, operation: Operation },
    /// What is prepared under `token` becomes the state.
    Commit { token: OpToken },
    /// What is prepared under `token`, or still computed, is dropped.
    Discard { token: OpToken },
    /// Store the committed state, if this is the run's rank 0.
    TakeSnapshot { token: OpToken },
    /// The coordinator is gone: whatever it asked for is void.
    Disconnected,
    /// The compute thread is so far with an operation; may be left out.
    Progress { token: OpToken, done: u32, of: u32 },
    /// The compute thread finished the job it was given.
    Done(Done),
    /// A snapshot that it took is stored, or can't be.
    SnapshotStored { token: OpToken, result: Result<BlobRef, OperationError> },
}

/// One rank of a run, as the slot is to hold it.
#[derive(Debug, Clone, PartialEq)]
pub struct Formation {
    pub spec: RunSpec,
    pub epoch: Epoch,
    pub generation: Generation,
    /// This slot's rank.
    pub rank: RankIndex,
    pub roster: Vec<RankSeat>,
    /// A `TrainState`; absent: the fresh adapter of `spec.lora`.
    pub restore: Option<BlobRef>,
}

/// One thing for the compute thread to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Job {
    Form(Formation),
    Execute { token: OpToken, operation: Operation },
    Commit { token: OpToken },
    Discard { token: OpToken },
    Snapshot { token: OpToken },
    Drop { run: RunId, generation: Generation },
}

/// What came of a [`Job`].
#[derive(Debug, Clone, PartialEq)]
pub enum Done {
    Formed {
        run: RunId,
        epoch: Epoch,
        generation: Generation,
        result: Result<(), Failure>,
    },
    Executed {
        token: OpToken,
        result: Result<Prepared, Failure>,
    },
    /// Taken, and being stored beside what follows: → [`Event::SnapshotStored`]. Or it can't be.
    Snapshot {
        token: OpToken,
        result: Result<(), OperationError>,
    },
    /// A commit, discard or drop; none can fail.
    Applied,
}

/// What the actor does for its state.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Gives the compute thread its next job. Only while it is idle: never two at once.
    Run(Job),
    /// Makes the run's collective calls, in progress or later, fail at once.
    Abort { run: RunId, generation: Generation },
    /// Tells the node.
    Report(RankReport),
    /// Nothing was done, and why: for the log.
    Ignore(Ignored),
}

/// Why a message had no effect.
#[derive(Debug, Clone, PartialEq)]
pub enum Ignored {
    /// Of an older coordinator, generation, incarnation or operation than one seen.
    Stale { what: &'static str, token: OpToken },
    /// A formation older than one seen.
    StaleFormation { run: RunId, epoch: Epoch, generation: Generation },
    /// Neither prepared nor being computed here.
    NotPending { what: &'static str, token: OpToken },
    /// A snapshot is rank 0's to take.
    NotRankZero { token: OpToken },
}

/// The state of one slot.
#[derive(Debug, Default)]
pub struct RankState {
    runs: BTreeMap<RunId, HeldRank>,
    /// Newest (epoch, generation) of each run that was here, held or not.
    fences: BTreeMap<RunId, (Epoch, Generation)>,
    /// Newest coordinator seen; outlives a connection.
    epoch: Option<Epoch>,
    queue: VecDeque<Job>,
    busy: bool,
}

/// One run's rank in this slot.
#[derive(Debug)]
struct HeldRank {
    epoch: Epoch,
    generation: Generation,
    rank: RankIndex,
    /// Highest incarnation and operation that were accepted for execution.
    incarnation: u32,
    seq: OperationSeq,
    storing_snapshot: bool,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Forming,
    Idle,
    Executing(OpToken),
    Prepared(OpToken),
    /// Failed here; the coordinator has yet to say what becomes of it.
    Refused(OpToken),
}

impl RankState {
    /// Applies one event and says what follows from it.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = match event {
            Event::Form(formation) => self.form(formation),
            Event::Release { run, generation } => self.release(run, generation),
            Event::Execute { token, operation } => self.execute(token, operation),
            Event::Commit { token } => self.commit(token),
            Event::Discard { token } => self.discard(token),
            Event::TakeSnapshot { token } => self.take_snapshot(token),
            Event::Disconnected => self.disconnected(),
            Event::Progress { token, done, of } => self.progress(token, done, of),
            Event::Done(done) => self.done(done),
            Event::SnapshotStored { token, result } => self.snapshot_stored(token, result),
        };
        if !self.busy
            && let Some(job) = self.queue.pop_front()
        {
            self.busy = true;
            effects.push(Effect::Run(job));
        }
        effects
    }

    fn form(&mut self, formation: Formation) -> Vec<Effect> {
        let (run, epoch, generation) = (formation.spec.run, formation.epoch, formation.generation);
        let newest = self.fences.get(&run).is_none_or(|&fence| (epoch, generation) > fence);
        if !newest || self.epoch.is_some_and(|seen| epoch < seen) {
            return vec![Effect::Ignore(Ignored::StaleFormation { run, epoch, generation })];
        }
        let mut effects = self.drop_run(run);
        self.epoch = Some(epoch);
        self.fence(run, epoch, generation);
        if self.runs.len() >= MAX_RUNS {
            let full = format!("a rank slot holds at most {MAX_RUNS} runs; release one first");
            let error = OperationError::new(ErrorKind::ResourceExhausted, full);
            effects.push(Effect::Report(RankReport::Formed { run, generation, result: Err(error.into()) }));
            return effects;
        }
        self.runs.insert(
            run,
            HeldRank {
                epoch,
                generation,
                rank: formation.rank,
                incarnation: 0,
                seq: OperationSeq(0),
                storing_snapshot: false,
                phase: Phase::Forming,
            },
        );
        self.queue.push_back(Job::Form(formation));
        effects
    }

    fn release(&mut self, run: RunId, generation: Generation) -> Vec<Effect> {
        match self.runs.get(&run) {
            Some(held) if held.generation <= generation => self.drop_run(run),
            _ => Vec::new(),
        }
    }

    fn execute(&mut self, token: OpToken, operation: Operation) -> Vec<Effect> {
        let fenced = self.is_fenced(token);
        let run = match self.runs.get_mut(&token.run) {
            Some(run) if run.is_of(token) => run,
            _ if fenced => return stale("execute", token),
            // Of a rank set that was never formed here: whoever waits for it must hear so.
            _ => return vec![refuse(token, RankIndex(0), "this node holds no such rank")],
        };
        if token.seq <= run.seq || token.incarnation < run.incarnation {
            return stale("execute", token);
        }
        match run.phase {
            Phase::Forming => return vec![refuse(token, run.rank, "the rank is still being formed")],
            Phase::Executing(other) => {
                return vec![refuse(token, run.rank, &format!("the rank still computes {other}"))];
            }
            // The coordinator went on without saying what becomes of the last one: it is dropped.
            Phase::Prepared(last) | Phase::Refused(last) => {
                self.queue.push_back(Job::Discard { token: last });
            }
            Phase::Idle => {}
        }
        run.seq = token.seq;
        run.incarnation = token.incarnation;
        run.phase = Phase::Executing(token);
        self.queue.push_back(Job::Execute { token, operation });
        Vec::new()
    }

    fn progress(&self, token: OpToken, done: u32, of: u32) -> Vec<Effect> {
        match self.runs.get(&token.run) {
            Some(run) if run.phase == Phase::Executing(token) => {
                vec![message(NodeMessage::Progress { token, rank: run.rank, done, of })]
            }
            // Called off meanwhile.
            _ => Vec::new(),
        }
    }

    fn commit(&mut self, token: OpToken) -> Vec<Effect> {
        match self.runs.get_mut(&token.run) {
            Some(run) if run.phase == Phase::Prepared(token) => {
                run.phase = Phase::Idle;
                self.queue.push_back(Job::Commit { token });
                Vec::new()
            }
            Some(run) if run.is_of(token) && token.seq >= run.seq => not_pending("commit", token),
            _ => stale("commit", token),
        }
    }

    fn discard(&mut self, token: OpToken) -> Vec<Effect> {
        let Some(run) = self.runs.get_mut(&token.run).filter(|run| run.is_of(token)) else {
            return stale("discard", token);
        };
        match run.phase {
            // Computing goes on (its peers may wait in the same collective); what it leaves is
            // dropped by the job behind it and reported to nobody.
            Phase::Executing(pending) | Phase::Prepared(pending) | Phase::Refused(pending)
                if pending == token =>
            {
                run.phase = Phase::Idle;
                self.queue.push_back(Job::Discard { token });
                Vec::new()
            }
            _ => not_pending("discard", token),
        }
    }

    fn take_snapshot(&mut self, token: OpToken) -> Vec<Effect> {
        let Some(run) = self.runs.get_mut(&token.run).filter(|run| run.is_of(token)) else {
            return stale("snapshot", token);
        };
        if run.rank != RankIndex(0) {
            return vec![Effect::Ignore(Ignored::NotRankZero { token })];
        }
        let problem = if run.phase == Phase::Forming {
            "the rank is still being formed"
        } else if run.storing_snapshot {
            "another snapshot of the run is being stored"
        } else {
            run.storing_snapshot = true;
            self.queue.push_back(Job::Snapshot { token });
            return Vec::new();
        };
        let error = OperationError::new(ErrorKind::Unavailable, format!("snapshot of {token}: {problem}"));
        vec![message(NodeMessage::SnapshotFailed { token, error })]
    }

    fn disconnected(&mut self) -> Vec<Effect> {
        self.fences.clear();
        let runs: Vec<RunId> = self.runs.keys().copied().collect();
        runs.into_iter().flat_map(|run| self.drop_run(run)).collect()
    }

    fn done(&mut self, done: Done) -> Vec<Effect> {
        self.busy = false;
        match done {
            Done::Formed { run, epoch, generation, result } => self.formed(run, epoch, generation, result),
            Done::Executed { token, result } => self.executed(token, result),
            Done::Snapshot { result: Ok(()), .. } => Vec::new(),
            Done::Snapshot { token, result: Err(error) } => self.snapshot_stored(token, Err(error)),
            Done::Applied => Vec::new(),
        }
    }

    fn formed(
        &mut self,
        run: RunId,
        epoch: Epoch,
        generation: Generation,
        result: Result<(), Failure>,
    ) -> Vec<Effect> {
        let Some(held) = self.runs.get_mut(&run) else { return Vec::new() };
        if (held.epoch, held.generation) != (epoch, generation) {
            return Vec::new();
        }
        let mut effects = Vec::new();
        match result {
            Ok(()) => held.phase = Phase::Idle,
            Err(_) => effects = self.drop_run(run),
        }
        effects.push(Effect::Report(RankReport::Formed { run, generation, result }));
        effects
    }

    fn executed(&mut self, token: OpToken, result: Result<Prepared, Failure>) -> Vec<Effect> {
        let Some(run) = self.runs.get_mut(&token.run) else { return Vec::new() };
        // Released, replaced or discarded meanwhile: nobody waits for this any more.
        if run.phase != Phase::Executing(token) {
            return Vec::new();
        }
        let rank = run.rank;
        match result {
            Ok(Prepared { state, result, saved, step }) => {
                run.phase = Phase::Prepared(token);
                vec![message(NodeMessage::Prepared { token, rank, state, result, saved, step })]
            }
            Err(Failure { error, blame }) => {
                run.phase = Phase::Refused(token);
                vec![message(NodeMessage::OperationFailed { token, rank, error, blame })]
            }
        }
    }

    fn snapshot_stored(&mut self, token: OpToken, result: Result<BlobRef, OperationError>) -> Vec<Effect> {
        let Some(run) = self.runs.get_mut(&token.run).filter(|run| run.is_of(token)) else {
            return Vec::new();
        };
        run.storing_snapshot = false;
        vec![message(match result {
            Ok(snapshot) => NodeMessage::SnapshotTaken { token, snapshot },
            Err(error) => NodeMessage::SnapshotFailed { token, error },
        })]
    }

    /// Forgets a run: takes back what it had queued, breaks what it waits in, frees its memory.
    fn drop_run(&mut self, run: RunId) -> Vec<Effect> {
        let Some(HeldRank { generation, .. }) = self.runs.remove(&run) else { return Vec::new() };
        self.queue.retain(|job| job.run() != run || matches!(job, Job::Drop { .. }));
        self.queue.push_back(Job::Drop { run, generation });
        vec![Effect::Abort { run, generation }]
    }

    fn fence(&mut self, run: RunId, epoch: Epoch, generation: Generation) {
        self.fences.insert(run, (epoch, generation));
        while self.fences.len() > MAX_FENCES {
            self.fences.pop_first();
        }
    }

    fn is_fenced(&self, token: OpToken) -> bool {
        self.epoch.is_some_and(|seen| token.epoch < seen)
            || self.fences.get(&token.run).is_some_and(|&fence| (token.epoch, token.generation) <= fence)
    }
}

impl HeldRank {
    fn is_of(&self, token: OpToken) -> bool {
        (self.epoch, self.generation) == (token.epoch, token.generation)
    }
}

impl Job {
    fn run(&self) -> RunId {
        match self {
            Self::Form(formation) => formation.spec.run,
            Self::Drop { run, .. } => *run,
            Self::Execute { token, .. }
            | Self::Commit { token }
            | Self::Discard { token }
            | Self::Snapshot { token } => token.run,
        }
    }
}

fn message(message: NodeMessage) -> Effect {
    Effect::Report(RankReport::Message(message))
}

fn refuse(token: OpToken, rank: RankIndex, problem: &str) -> Effect {
    let error = OperationError::new(ErrorKind::Unavailable, format!("{token}: {problem}"));
    message(NodeMessage::OperationFailed { token, rank, error, blame: Blame::Environment })
}

fn stale(what: &'static str, token: OpToken) -> Vec<Effect> {
    vec![Effect::Ignore(Ignored::Stale { what, token })]
}

fn not_pending(what: &'static str, token: OpToken) -> Vec<Effect> {
    vec![Effect::Ignore(Ignored::NotPending { what, token })]
}

#[cfg(test)]
mod tests;

//! The coordinator's decisions as a pure state machine: [`State::handle`] takes an event and
//! the time and returns effects. It knows no tokio, no actix, no clock and no randomness; the
//! actor performs its effects, and `tests/simulation.rs` is its second caller.
//!
//! ```text
//!   submit ─► journal ─► queue ─► Execute ─► all Prepared ─► journal ─► Commit ─► visible
//!                                    │                          (a publish also waits for
//!                                    └─ a rank lost: ranks       Stage · Activate on every
//!                                       formed anew, state        sampler node)
//!                                       replayed, executed again
//! ```
//!
//! Where to read: `event` (the interface), `run` (what a run is), `operations` (its queue),
//! `placement` and `execution` (its ranks at work), `history` (what is forgotten), `versions` and `sampling` (the samplers),
//! `invariants` (what holds after every event).

mod admission;
mod checkpoints;
mod deletion;
mod drain;
mod evacuation;
mod event;
mod execution;
mod history;
mod invariants;
mod membership;
mod memory;
mod operations;
mod outcome;
mod placement;
mod quota;
mod recall;
mod recovery;
mod requests;
mod run;
mod sampling;
mod severed;
mod snapshots;
mod trust;
mod unpublished;
mod versions;

use std::collections::{BTreeMap, BTreeSet};

pub use event::{AppendId, Effect, Ended, Event, WaiterId};

use crate::{
    journal::{JournalError, Record, RecoveredRun},
    protocol::{
        BlobRef, Call, ClientRequest, ClientResponse, CoordinatorMessage, CreateRun, Epoch, ModelOffer,
        NodeId, OperationSeq, RequestId,
    },
    transport::Role,
    types::{CheckpointId, OperationError, RunId, SessionId},
};

use self::{
    checkpoints::Checkpoints, drain::Drain, membership::Node, recall::Recall, run::Run, sampling::Sample,
    severed::Severed, trust::Trust, versions::Policies,
};
use super::{Limits, error::Refusal};

/// How often [`Event::Tick`] should come. A tick that comes later than twice this is a slip: the
/// process was starved, and every deadline moves by as much.
pub const TICK_MS: u64 = 250;

/// How long a request that needs a model is held while no node has ever joined: a service that
/// is starting is slow, not wrong. Longer than nodes need to notice that a coordinator was killed and
/// is back, and to read their models' digests.
const STARTING_HOLD_MS: u64 = 60_000;

/// How long after a restart a run that asks for more ranks than there are slots is held: nodes try to
/// reach a coordinator that was away at least every 5 s.
const RETURNING_HOLD_MS: u64 = 20_000;

/// Requests held while the service starts.
const HELD_MAX: usize = 1_024;

/// Everything that the coordinator knows.
pub struct State {
    limits: Limits,
    epoch: Epoch,
    /// Time that deadlines are measured in: the caller's, less all slips.
    now_ms: u64,
    /// The caller's time, for what people read.
    wall_ms: u64,
    slip_ms: u64,
    last_tick_ms: u64,

    /// With the name of whoever each belongs to.
    sessions: BTreeMap<SessionId, Option<String>>,
    runs: BTreeMap<RunId, Run>,
    next_session: u64,
    next_run: u64,

    nodes: BTreeMap<NodeId, Node>,
    /// Models that a node offers or has offered, by name.
    models: BTreeMap<String, ModelOffer>,
    ever_joined: bool,
    /// Most trainer slots that a run on each model could have had at once.
    most_slots: BTreeMap<String, u32>,
    started_ms: u64,
    /// When the last node with samplers for a model left; absent: none has.
    samplers_seen_ms: BTreeMap<String, u64>,
    membership_changed_ms: u64,
    next_ping_ms: u64,
    ping_nonce: u64,

    checkpoints: Checkpoints,
    policies: Policies,
    samples: BTreeMap<RequestId, Sample>,
    /// Samples that wait for a version or a node.
    waiting: BTreeSet<RequestId>,
    next_request: u64,

    held: Vec<Held>,
    appends: BTreeMap<AppendId, Appending>,
    next_append: u64,
    drain: Option<Drain>,
    /// Looks into a run's past that are under way.
    recalls: BTreeMap<WaiterId, Recall>,
    /// Names of the nodes that get nothing new.
    evacuated: BTreeSet<String>,
    /// Pairs of nodes that can't reach each other.
    severed: Severed,
    trust: Trust,
    next_tending_ms: u64,
    effects: Vec<Effect>,
}

/// A request that waits for the first node.
struct Held {
    waiter: WaiterId,
    call: Call,
    request: ClientRequest,
    entropy: u64,
    until_ms: u64,
}

/// What an append was for.
enum Appending {
    Session {
        session: SessionId,
        owner: Option<String>,
        waiter: WaiterId,
    },
    /// `waiters`: whoever asked, and whoever asked again under the same key.
    Run {
        run: Box<Run>,
        waiters: Vec<WaiterId>,
    },
    Operation {
        run: RunId,
        seq: OperationSeq,
    },
    Outcome {
        run: RunId,
        seq: OperationSeq,
    },
    Snapshot {
        run: RunId,
        seq: OperationSeq,
        snapshot: BlobRef,
    },
    Prune {
        run: RunId,
        base: OperationSeq,
        upto: OperationSeq,
    },
    /// `waiter`: whoever asked for it, if somebody did.
    Drop {
        checkpoints: Vec<CheckpointId>,
        waiter: Option<WaiterId>,
    },
    DropRun {
        run: RunId,
        waiter: WaiterId,
    },
    Fork {
        run: Box<RecoveredRun>,
        waiter: WaiterId,
    },
    PublishFailed {
        run: RunId,
        seq: OperationSeq,
        error: OperationError,
    },
    /// What is known of certificates.
    Noted,
    Revoked {
        process: (Role, String),
        upto: u64,
        waiter: WaiterId,
    },
    Drained {
        node: String,
        drained: bool,
        waiter: WaiterId,
    },
}

impl State {
    /// Takes in one event and says what to do; nothing once it has said [`Effect::Stop`]. `now_ms`
    /// never falls.
    pub fn handle(&mut self, event: Event, now_ms: u64) -> Vec<Effect> {
        if self.has_stopped() {
            return Vec::new();
        }
        self.wall_ms = now_ms;
        if matches!(event, Event::Tick) {
            self.notice_slip(now_ms);
        }
        // Behind a slip the first event may not be the tick that shows it: until then time stands.
        let fair_ms = (now_ms - self.slip_ms).min(self.last_tick_ms - self.slip_ms + 2 * TICK_MS);
        self.now_ms = self.now_ms.max(fair_ms);
        match event {
            Event::Request { waiter, call, request, entropy } => self.request(waiter, call, request, entropy),
            Event::RequestGone { waiter } => {
                self.cancel_sample(waiter);
                self.cancel_recall(waiter);
            }
            Event::NodeJoined { node, hello } => self.node_joined(node, hello),
            Event::NodeMessage { node, message } => self.node_message(node, message),
            Event::NodeLost { node, reason } => self.lose_node(node, &reason),
            Event::Appended { append, result } => self.appended(append, result),
            Event::Generated { request, attempt, reply } => self.generated(request, attempt, reply),
            Event::Recalled { waiter, way } => self.recalled(waiter, way),
            Event::ShutOut { waiter } => self.shut_out(waiter),
            Event::Certified(known) => self.certified(known),
            Event::Ca { ca, rotating } => self.ca_is(ca, rotating),
            Event::Tick => self.tick(),
            Event::Drain => self.begin_drain(),
        }
        self.continue_drain();
        #[cfg(debug_assertions)]
        self.check_invariants();
        std::mem::take(&mut self.effects)
    }

    /// A late tick means that this process did not run, not that the others were silent.
    fn notice_slip(&mut self, now_ms: u64) {
        let since_ms = now_ms - std::mem::replace(&mut self.last_tick_ms, now_ms);
        if since_ms > 2 * TICK_MS {
            self.slip_ms += since_ms - TICK_MS;
        }
    }

    /// Everything that time alone decides.
    fn tick(&mut self) {
        self.ping_nodes();
        self.release_held();
        let runs: Vec<RunId> = self.runs.keys().copied().collect();
        for run in runs {
            self.expire_waiters(run);
            self.expire_work(run);
            self.expire_publish(run);
            self.rest_if_idle(run);
            self.advance(run);
        }
        self.expire_severed();
        self.tend_trust();
        self.expire_stages();
        self.expire_samples();
        self.tend_history();
        self.expire_checkpoints();
    }

    fn appended(&mut self, append: AppendId, result: Result<(), JournalError>) {
        let Some(appending) = self.appends.remove(&append) else { return };
        match appending {
            Appending::Session { session, owner, waiter } => {
                self.session_durable(session, owner, waiter, result);
            }
            Appending::Run { run, waiters } => self.run_durable(*run, waiters, result),
            Appending::Operation { run, seq } => self.operation_durable(run, seq, result),
            Appending::Outcome { run, seq } => self.outcome_durable(run, seq, result),
            Appending::Snapshot { run, seq, snapshot } => self.snapshot_durable(run, seq, snapshot, result),
            Appending::Prune { run, base, upto } => self.pruned(run, base, upto, result),
            Appending::Drop { checkpoints, waiter } => self.dropped(checkpoints, waiter, result),
            Appending::Fork { run, waiter } => self.fork_durable(*run, waiter, result),
            Appending::DropRun { run, waiter } => self.run_dropped(run, waiter, result),
            Appending::Noted => self.noted(result),
            Appending::Revoked { process, upto, waiter } => {
                self.revoked_durable(process, upto, waiter, result);
            }
            Appending::Drained { node, drained, waiter } => {
                self.drained_durable(node, drained, waiter, result);
            }
            Appending::PublishFailed { run, seq, error } => self.publish_failed(run, seq, error, result),
        }
    }

    fn append(&mut self, records: Vec<Record>, appending: Appending) {
        let append = AppendId(self.next_append);
        self.next_append += 1;
        self.appends.insert(append, appending);
        self.effects.push(Effect::Append { append, records });
    }

    fn send(&mut self, node: NodeId, message: CoordinatorMessage) {
        self.effects.push(Effect::Send { node, message });
    }

    fn respond(&mut self, waiter: WaiterId, response: ClientResponse) {
        self.effects.push(Effect::Respond { waiter, response });
    }

    fn refuse(&mut self, waiter: WaiterId, refusal: impl Into<OperationError>) {
        self.respond(waiter, ClientResponse::Error(refusal.into()));
    }

    /// Holds a request until a node joins, if none ever has; says whether it did.
    fn hold(&mut self, waiter: WaiterId, call: Call, request: &ClientRequest, entropy: u64) -> bool {
        if self.ever_joined || self.held.len() >= HELD_MAX {
            return false;
        }
        let until_ms = self.now_ms + STARTING_HOLD_MS;
        self.held.push(Held { waiter, call, request: request.clone(), entropy, until_ms });
        true
    }

    /// Holds a run that asks for more ranks than there are slots, while the nodes that had them may
    /// still be on their way back to a coordinator that was started again.
    fn hold_for_nodes(&mut self, waiter: WaiterId, call: Call, create: &CreateRun) -> bool {
        let until_ms = self.started_ms + RETURNING_HOLD_MS;
        let first_start = self.epoch == Epoch(1);
        if first_start || self.now_ms >= until_ms || self.held.len() >= HELD_MAX {
            return false;
        }
        let request = ClientRequest::CreateRun(create.clone());
        self.held.push(Held { waiter, call, request, entropy: 0, until_ms });
        true
    }

    /// Answers held requests: all of them once a node is there, else those held long enough.
    fn release_held(&mut self) {
        let (joined, now_ms) = (self.ever_joined, self.now_ms);
        let due = self.held.extract_if(.., |held| joined || held.until_ms <= now_ms).collect::<Vec<_>>();
        for held in due {
            self.answer(held.waiter, held.call, held.request, held.entropy);
        }
    }
}

/// A duration as the state machine counts time.
fn ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The error of a refusal that happened inside the state machine.
fn fault(message: impl Into<String>) -> OperationError {
    Refusal::Fault(message.into()).into()
}

#[cfg(test)]
pub(super) mod tests;

//! What a node decides: which slot a message is for, when its ranks or replicas have answered
//! together, which replica takes a request.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::{
    protocol::{
        Blame, BlobRef, CoordinatorMessage, Epoch, Generation, NodeId, NodeMessage, OpToken, RankIndex,
        RankSeat, RunSpec,
    },
    trainer::{Event as RankEvent, Failure, Formation, RankReport},
    types::{ErrorKind, OperationError, PolicyId, RunId},
};

/// Sample requests that may be under way at once for each replica: twice what the coordinator gives,
/// because that those are cancelled is noticed here later. One more is refused.
pub(super) const MAX_REQUESTS: usize = 1024;

/// Numbers this node's connections to the coordinator, so that what an earlier one still
/// carried is told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SessionNumber(pub(super) u64);

/// Numbers the sample requests under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Ticket(pub(super) u64);

/// What reaches a node.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Event {
    /// A connection whose coordinator has said welcome.
    Connected {
        session: SessionNumber,
        node: NodeId,
        epoch: Epoch,
    },
    /// It is gone.
    Disconnected {
        session: SessionNumber,
    },
    /// Came over the control stream of `session`.
    Coordinator {
        session: SessionNumber,
        message: CoordinatorMessage,
    },
    /// A slot reports.
    Rank(RankReport),
    /// An adapter to be staged has come, or will not.
    Fetched {
        policy: PolicyId,
        adapter: Result<Bytes, OperationError>,
    },
    Staged {
        replica: u32,
        policy: PolicyId,
    },
    StageFailed {
        replica: u32,
        policy: PolicyId,
        error: OperationError,
    },
    Activated {
        replica: u32,
        policy: PolicyId,
    },
    /// A sample request has come.
    Request {
        ticket: Ticket,
    },
    /// It was answered, or its caller is gone.
    RequestDone {
        ticket: Ticket,
    },
}

/// What the actor does for its state.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Effect {
    Rank {
        slot: u32,
        event: RankEvent,
    },
    Stage {
        replica: u32,
        policy: PolicyId,
        base_model: String,
        adapter: Bytes,
    },
    Activate {
        replica: u32,
        policy: PolicyId,
    },
    Retire {
        replica: u32,
        policy: PolicyId,
    },
    /// → `Fetched`.
    Fetch {
        policy: PolicyId,
        adapter: BlobRef,
    },
    /// Over the present control stream.
    Tell(NodeMessage),
    /// Gives the request to the replica.
    Sample {
        ticket: Ticket,
        replica: u32,
    },
    /// Answers the request itself.
    Refuse {
        ticket: Ticket,
        error: OperationError,
    },
    /// Closes the connection: nothing good can come over it.
    Close {
        reason: &'static str,
    },
    /// The process is to end.
    Stop,
}

/// The state of one node.
#[derive(Debug)]
pub(super) struct NodeState {
    trainers: u32,
    samplers: u32,
    session: Option<(SessionNumber, NodeId)>,
    /// Newest coordinator seen.
    epoch: Option<Epoch>,
    runs: BTreeMap<RunId, SeatedRun>,
    /// Policies that replicas were told of, until they are told to drop them.
    policies: BTreeMap<PolicyId, Policy>,
    /// Which replica answers each request.
    requests: BTreeMap<Ticket, u32>,
}

/// A run with ranks on this node.
#[derive(Debug)]
struct SeatedRun {
    generation: Generation,
    slots: BTreeSet<u32>,
    /// The slot of rank 0, if it is here: the one that writes snapshots.
    rank_zero: Option<u32>,
    /// Slots that have yet to report; 0 once the coordinator was answered.
    unformed: usize,
}

#[derive(Debug)]
struct Policy {
    base_model: String,
    /// Replicas whose answer is awaited; empty once the coordinator was answered.
    staging: BTreeSet<u32>,
    activating: BTreeSet<u32>,
}

impl NodeState {
    pub(super) fn new(trainers: u32, samplers: u32) -> Self {
        Self {
            trainers,
            samplers,
            session: None,
            epoch: None,
            runs: BTreeMap::new(),
            policies: BTreeMap::new(),
            requests: BTreeMap::new(),
        }
    }

    /// Sample requests under way.
    pub(super) fn requests(&self) -> usize {
        self.requests.len()
    }

    /// Applies one event and says what follows from it.
    pub(super) fn handle(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Connected { session, node, epoch } => self.connected(session, node, epoch),
            Event::Disconnected { session } => self.disconnected(session),
            Event::Coordinator { session, message } => match self.session {
                Some((present, node)) if present == session => self.coordinator(node, message),
                _ => Vec::new(),
            },
            Event::Rank(RankReport::Message(message)) => vec![Effect::Tell(message)],
            Event::Rank(RankReport::Formed { run, generation, result }) => {
                self.formed(run, generation, result)
            }
            Event::Fetched { policy, adapter } => self.fetched(policy, adapter),
            Event::Staged { replica, policy } => self.staged(replica, policy),
            Event::StageFailed { replica: _, policy, error } => self.stage_failed(policy, error),
            Event::Activated { replica, policy } => self.activated(replica, policy),
            Event::Request { ticket } => vec![self.request(ticket)],
            Event::RequestDone { ticket } => {
                self.requests.remove(&ticket);
                Vec::new()
            }
        }
    }

    fn connected(&mut self, session: SessionNumber, node: NodeId, epoch: Epoch) -> Vec<Effect> {
        let mut effects = self.drop_everything();
        if self.epoch.is_some_and(|seen| epoch < seen) {
            self.session = None;
            effects.push(Effect::Close { reason: "a newer coordinator was seen" });
            return effects;
        }
        self.epoch = Some(epoch);
        self.session = Some((session, node));
        effects
    }

    fn disconnected(&mut self, session: SessionNumber) -> Vec<Effect> {
        if self.session.is_none_or(|(present, _)| present != session) {
            return Vec::new();
        }
        self.session = None;
        self.drop_everything()
    }

    fn coordinator(&mut self, node: NodeId, message: CoordinatorMessage) -> Vec<Effect> {
        match message {
            // The session took the first one; there is no second.
            CoordinatorMessage::Welcome { .. } => vec![Effect::Close { reason: "a second welcome" }],
            CoordinatorMessage::FormRanks { spec, epoch, generation, roster, restore } => {
                self.form_ranks(node, spec, epoch, generation, roster, restore)
            }
            CoordinatorMessage::ReleaseRanks { run, generation } => self.release(run, generation),
            CoordinatorMessage::Execute { token, operation } => {
                let effects = self.to_ranks(token, RankEvent::Execute { token, operation });
                if effects.is_empty() { vec![not_here(token)] } else { effects }
            }
            CoordinatorMessage::Commit { token } => self.to_ranks(token, RankEvent::Commit { token }),
            CoordinatorMessage::Discard { token } => self.to_ranks(token, RankEvent::Discard { token }),
            CoordinatorMessage::TakeSnapshot { token } => {
                let slot = self.runs.get(&token.run).and_then(|seated| seated.rank_zero);
                slot.map(|slot| to_rank(slot, RankEvent::TakeSnapshot { token })).into_iter().collect()
            }
            CoordinatorMessage::Stage { policy, base_model, adapter } => {
                self.stage(policy, base_model, adapter)
            }
            CoordinatorMessage::Activate { policy } => self.activate(policy),
            CoordinatorMessage::Retire { policy } => self.retire(policy),
            CoordinatorMessage::Ping { nonce } => vec![Effect::Tell(NodeMessage::Pong { nonce })],
            CoordinatorMessage::Shutdown => vec![Effect::Stop],
            // Seen to where connections are.
            CoordinatorMessage::Revoked { .. } => Vec::new(),
        }
    }

    fn form_ranks(
        &mut self,
        node: NodeId,
        spec: RunSpec,
        epoch: Epoch,
        generation: Generation,
        roster: Vec<RankSeat>,
        restore: Option<BlobRef>,
    ) -> Vec<Effect> {
        let run = spec.run;
        let mine: Vec<(u32, RankIndex)> =
            roster.iter().filter(|seat| seat.node == node).map(|seat| (seat.slot, seat.rank)).collect();
        let slots: BTreeSet<u32> = mine.iter().map(|(slot, _)| *slot).collect();
        let problem = if mine.is_empty() {
            Some("the roster seats no rank on this node".to_owned())
        } else if slots.len() < mine.len() {
            Some("the roster seats two ranks in one slot".to_owned())
        } else {
            let beyond = slots.last().filter(|&&slot| slot >= self.trainers);
            beyond.map(|slot| format!("the roster names slot {slot}; this node has {}", self.trainers))
        };
        if let Some(problem) = problem {
            let error = OperationError::new(ErrorKind::Internal, problem);
            let blame = Blame::Environment;
            return vec![Effect::Tell(NodeMessage::RanksFailed { run, generation, error, blame })];
        }
        let mut effects = Vec::new();
        let rank_zero = mine.iter().find(|(_, rank)| *rank == RankIndex(0)).map(|(slot, _)| *slot);
        let seated = SeatedRun { generation, unformed: mine.len(), slots, rank_zero };
        if let Some(before) = self.runs.insert(run, seated) {
            // Slots of the new set replace their rank themselves; the others give theirs up.
            let slots = &self.runs[&run].slots;
            let event = RankEvent::Release { run, generation: before.generation };
            effects.extend(before.slots.difference(slots).map(|&slot| to_rank(slot, event.clone())));
        }
        for (slot, rank) in mine {
            let (spec, roster) = (spec.clone(), roster.clone());
            let formation = Formation { spec, epoch, generation, rank, roster, restore };
            effects.push(to_rank(slot, RankEvent::Form(formation)));
        }
        effects
    }

    fn formed(&mut self, run: RunId, generation: Generation, result: Result<(), Failure>) -> Vec<Effect> {
        let Some(seated) = self.runs.get_mut(&run) else { return Vec::new() };
        if seated.generation != generation || seated.unformed == 0 {
            return Vec::new();
        }
        let message = match result {
            Ok(()) => {
                seated.unformed -= 1;
                if seated.unformed > 0 {
                    return Vec::new();
                }
                NodeMessage::RanksReady { run, generation }
            }
            // The first failure is the node's answer; the slots that did form wait for a release.
            Err(Failure { error, blame }) => {
                seated.unformed = 0;
                NodeMessage::RanksFailed { run, generation, error, blame }
            }
        };
        vec![Effect::Tell(message)]
    }

    fn release(&mut self, run: RunId, generation: Generation) -> Vec<Effect> {
        match self.runs.get(&run) {
            Some(seated) if seated.generation <= generation => {}
            _ => return Vec::new(),
        }
        let slots = self.runs.remove(&run).map(|seated| seated.slots).unwrap_or_default();
        slots.into_iter().map(|slot| to_rank(slot, RankEvent::Release { run, generation })).collect()
    }

    fn to_ranks(&self, token: OpToken, event: RankEvent) -> Vec<Effect> {
        let slots = self.runs.get(&token.run).into_iter().flat_map(|seated| &seated.slots);
        slots.map(|&slot| to_rank(slot, event.clone())).collect()
    }

    fn stage(&mut self, policy: PolicyId, base_model: String, adapter: BlobRef) -> Vec<Effect> {
        if self.samplers == 0 {
            let error = OperationError::new(ErrorKind::Internal, "this node has no sampler replica");
            return vec![Effect::Tell(NodeMessage::StageFailed { policy, error })];
        }
        let staging = (0..self.samplers).collect();
        self.policies.insert(policy, Policy { base_model, staging, activating: BTreeSet::new() });
        vec![Effect::Fetch { policy, adapter }]
    }

    fn fetched(&mut self, policy: PolicyId, adapter: Result<Bytes, OperationError>) -> Vec<Effect> {
        let Some(staged) = self.policies.get(&policy) else { return Vec::new() };
        match adapter {
            Ok(adapter) => (0..self.samplers)
                .map(|replica| {
                    let (base_model, adapter) = (staged.base_model.clone(), adapter.clone());
                    Effect::Stage { replica, policy, base_model, adapter }
                })
                .collect(),
            Err(error) => self.stage_failed(policy, error),
        }
    }

    fn staged(&mut self, replica: u32, policy: PolicyId) -> Vec<Effect> {
        let Some(staged) = self.policies.get_mut(&policy) else { return Vec::new() };
        match staged.staging.remove(&replica) && staged.staging.is_empty() {
            true => vec![Effect::Tell(NodeMessage::Staged { policy })],
            false => Vec::new(),
        }
    }

    fn stage_failed(&mut self, policy: PolicyId, error: OperationError) -> Vec<Effect> {
        match self.policies.get(&policy) {
            Some(staged) if !staged.staging.is_empty() => {}
            _ => return Vec::new(),
        }
        // All of the node's replicas serve a policy or none does.
        let mut effects = self.retire(policy);
        effects.push(Effect::Tell(NodeMessage::StageFailed { policy, error }));
        effects
    }

    fn activate(&mut self, policy: PolicyId) -> Vec<Effect> {
        match self.policies.get_mut(&policy) {
            Some(staged) if staged.staging.is_empty() => {
                staged.activating = (0..self.samplers).collect();
                (0..self.samplers).map(|replica| Effect::Activate { replica, policy }).collect()
            }
            _ => {
                let error = OperationError::new(ErrorKind::Internal, format!("{policy} is not staged here"));
                vec![Effect::Tell(NodeMessage::StageFailed { policy, error })]
            }
        }
    }

    fn activated(&mut self, replica: u32, policy: PolicyId) -> Vec<Effect> {
        let Some(staged) = self.policies.get_mut(&policy) else { return Vec::new() };
        match staged.activating.remove(&replica) && staged.activating.is_empty() {
            true => vec![Effect::Tell(NodeMessage::Activated { policy })],
            false => Vec::new(),
        }
    }

    fn retire(&mut self, policy: PolicyId) -> Vec<Effect> {
        match self.policies.remove(&policy) {
            Some(_) => (0..self.samplers).map(|replica| Effect::Retire { replica, policy }).collect(),
            None => Vec::new(),
        }
    }

    /// The least busy replica: all of a node's replicas serve the same policies.
    fn request(&mut self, ticket: Ticket) -> Effect {
        let refuse =
            |kind, problem: &str| Effect::Refuse { ticket, error: OperationError::new(kind, problem) };
        if self.requests.len() >= MAX_REQUESTS * self.samplers.max(1) as usize {
            return refuse(
                ErrorKind::ResourceExhausted,
                "this node generates for as many requests as it takes",
            );
        }
        let load = |replica: u32| self.requests.values().filter(|&&taken| taken == replica).count();
        match (0..self.samplers).min_by_key(|&replica| load(replica)) {
            Some(replica) => {
                self.requests.insert(ticket, replica);
                Effect::Sample { ticket, replica }
            }
            None => refuse(ErrorKind::Unavailable, "this node has no sampler replica"),
        }
    }

    /// A coordinator that is gone asks for nothing: the next one seats and stages anew.
    fn drop_everything(&mut self) -> Vec<Effect> {
        self.runs.clear();
        let policies: Vec<PolicyId> = self.policies.keys().copied().collect();
        let mut effects: Vec<Effect> =
            (0..self.trainers).map(|slot| to_rank(slot, RankEvent::Disconnected)).collect();
        effects.extend(policies.into_iter().flat_map(|policy| self.retire(policy)));
        effects
    }
}

fn to_rank(slot: u32, event: RankEvent) -> Effect {
    Effect::Rank { slot, event }
}

fn not_here(token: OpToken) -> Effect {
    let error =
        OperationError::new(ErrorKind::Unavailable, format!("{token}: no rank of it is on this node"));
    let blame = Blame::Environment;
    Effect::Tell(NodeMessage::OperationFailed { token, rank: RankIndex(0), error, blame })
}

#[cfg(test)]
mod tests;

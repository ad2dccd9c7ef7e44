//! Which trainer slots hold a run's ranks, and how a rank set comes and goes.
//!
//! Ranks are spread over nodes first, then over the slots of a node that hold the fewest other
//! ranks. All ranks of a run have equal [`Numerics`], so that they compute the same bits.

use std::collections::BTreeSet;

use crate::{
    journal::Outcome,
    protocol::{Blame, CoordinatorMessage, Generation, NodeId, Numerics, OperationSeq, RankIndex, RankSeat},
    types::{Digest, ErrorKind, OperationError, RunId},
};

use super::{
    State, ms,
    run::{RankSet, Ranks, Work},
};

/// Rank sets lost in a row, without an operation done in between, before the one at the head of
/// the queue is given up: it may be what kills them, and its caller must learn why nothing moves.
const SETBACKS_MAX: u32 = 6;

/// First and longest pause before ranks are formed again after a setback.
const RETRY_MS: u64 = 1_000;
const RETRY_MAX_MS: u64 = 30_000;

/// Runs whose state one slot holds; a rank refuses more than 64.
const RUNS_PER_SLOT: usize = 60;

/// A run that nobody has used for this long gives its ranks back. Its next operation forms them
/// again from a snapshot.
const IDLE_MS: u64 = 30 * 60_000;

/// A slot that could take a rank.
pub(super) struct Slot {
    pub node: NodeId,
    index: u32,
    /// Ranks of other runs on it.
    held: usize,
}

impl State {
    /// Trainer slots that share one kind of numerics and offer this model: the most that a run
    /// can get.
    pub(super) fn slots_for(&self, model: &str, digest: Digest) -> u32 {
        self.best_slots(model, digest, None).len() as u32
    }

    /// Seats the run's ranks, if someone needs them and there is room.
    pub(super) fn place(&mut self, id: RunId) {
        let Some(run) = self.runs.get(&id) else { return };
        let now_ms = self.now_ms;
        if !run.wanted || self.drain.is_some() || now_ms < run.retry_ms {
            return;
        }
        let slots = self.best_slots(&run.create.base_model, run.model_digest, Some(id));
        let grace_over = now_ms >= self.membership_changed_ms + ms(self.limits.placement_grace);
        let most = self.most_slots.get(&run.create.base_model).copied().unwrap_or(0);
        let enough = slots.len() >= run.create.replicas.unwrap_or(most) as usize;
        if slots.is_empty() || !(enough || grace_over) {
            return;
        }
        if slots.iter().all(|slot| slot.held >= RUNS_PER_SLOT) {
            return self.make_room();
        }
        let ranks = run.ranks_on(slots.len());
        let roster = self.seat(slots, ranks);
        let deadline_ms = now_ms + ms(self.limits.form_deadline);
        let Some(run) = self.runs.get_mut(&id) else { return };
        run.generation = Generation(run.generation.0 + 1);
        let set = RankSet { roster };
        let (nodes, message) = (
            set.nodes(),
            CoordinatorMessage::FormRanks {
                spec: run.spec(),
                epoch: self.epoch,
                generation: run.generation,
                roster: set.roster.clone(),
                restore: run.snapshot.map(|(_, blob)| blob),
            },
        );
        let restored = run.snapshot.map_or(OperationSeq(0), |(seq, _)| seq);
        run.ranks = Ranks::Forming { set, restored, ready: BTreeSet::new(), deadline_ms };
        run.refill = false;
        for node in nodes {
            self.send(node, message.clone());
        }
    }

    /// The largest group of slots with equal numerics.
    fn best_slots(&self, model: &str, digest: Digest, but: Option<RunId>) -> Vec<Slot> {
        let mut groups: Vec<(&Numerics, Vec<Slot>)> = Vec::new();
        for (id, node) in &self.nodes {
            if !node.offers(model, digest) || self.is_evacuated(*id) {
                continue;
            }
            let slots = (0..node.hello.trainers).map(|index| {
                let held = self.runs.values().filter(|run| Some(run.id) != but);
                let held = held.flat_map(|run| run.roster());
                let held = held.filter(|seat| seat.node == *id && seat.slot == index).count();
                Slot { node: *id, index, held }
            });
            match groups.iter_mut().find(|(numerics, _)| **numerics == node.hello.numerics) {
                Some((_, group)) => group.extend(slots),
                None => groups.push((&node.hello.numerics, slots.collect())),
            }
        }
        // Of equal groups the first, so that the choice does not hang on chance.
        let groups = groups.into_iter().map(|(_, slots)| self.without_severed(slots));
        groups.rev().max_by_key(Vec::len).unwrap_or_default()
    }

    /// Gives ranks 0.. the best slots one by one.
    fn seat(&self, mut slots: Vec<Slot>, ranks: usize) -> Vec<RankSeat> {
        let mut roster: Vec<RankSeat> = Vec::new();
        while roster.len() < ranks && !slots.is_empty() {
            let on = |node| roster.iter().filter(|seat| seat.node == node).count();
            let load = |node| slots.iter().filter(|s| s.node == node).map(|s| s.held).sum::<usize>();
            let best = (0..slots.len()).min_by_key(|&i| {
                let slot = &slots[i];
                (on(slot.node), slot.held, load(slot.node), slot.node, slot.index)
            });
            let Some(best) = best else { break };
            let Slot { node, index, .. } = slots.swap_remove(best);
            let hello = &self.nodes[&node].hello;
            roster.push(RankSeat {
                rank: RankIndex(roster.len() as u32),
                node,
                slot: index,
                host: hello.host.clone(),
                address: hello.address.clone(),
            });
        }
        roster
    }

    /// Every rank that `node` holds of the run is there.
    pub(super) fn ranks_ready(&mut self, node: NodeId, id: RunId, generation: Generation) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Ranks::Forming { set, restored, ready, .. } = &mut run.ranks else { return };
        let nodes = set.nodes();
        if run.generation != generation || !nodes.contains(&node) {
            return;
        }
        ready.insert(node);
        if ready.len() == nodes.len() {
            run.ranks = Ranks::Formed { set: set.clone(), applied: *restored };
            self.advance(id);
        }
    }

    /// A node can't form its ranks, or lost them.
    pub(super) fn ranks_failed(
        &mut self,
        node: NodeId,
        id: RunId,
        generation: Generation,
        (error, blame): (OperationError, Blame),
    ) {
        let Some(run) = self.runs.get(&id) else { return };
        if run.generation != generation || !run.rank_nodes().contains(&node) {
            return;
        }
        self.note_blame(id, node, blame);
        let message = format!("node {} can't hold a rank of {id}: {error}", self.node_name(node));
        self.lose_ranks(id, OperationError::new(error.kind, message));
    }

    /// The deadline of a rank set that is being formed.
    pub(super) fn expire_forming(&mut self, id: RunId) {
        let Some(Ranks::Forming { set, ready, deadline_ms, .. }) = self.runs.get(&id).map(|run| &run.ranks)
        else {
            return;
        };
        if *deadline_ms > self.now_ms {
            return;
        }
        let silent = set.nodes().into_iter().filter(|node| !ready.contains(node));
        let silent = silent.map(|node| self.node_name(node)).collect::<Vec<_>>().join(", ");
        let waited = self.limits.form_deadline.as_secs();
        let message = format!("node {silent} did not form its ranks of {id} within {waited} s");
        self.lose_ranks(id, OperationError::new(ErrorKind::Unavailable, message));
    }

    /// Gives up the run's rank set. What it was executing has no outcome, and the next set executes
    /// it again: a lost node costs its callers time and nothing else. Only after
    /// [`SETBACKS_MAX`] sets, or for want of memory or of a configuration that fits, which the next
    /// set would not have either, the operation at the head of the queue fails with `cause`.
    pub(super) fn lose_ranks(&mut self, id: RunId, cause: OperationError) {
        let now_ms = self.now_ms;
        let Some(run) = self.runs.get_mut(&id) else { return };
        let (nodes, generation) = (run.rank_nodes(), run.generation);
        if nodes.is_empty() {
            return;
        }
        tracing::warn!(run = %id, generation = generation.0, "ranks given up: {cause}");
        let executing = matches!(run.work, Work::Execute(_));
        let at_rest = matches!(run.ranks, Ranks::Formed { .. }) && !executing;
        run.ranks = Ranks::Absent;
        run.snapshotting = None;
        run.setbacks += u32::from(!at_rest);
        run.retry_ms = now_ms + backoff(run.setbacks);
        if executing {
            run.work = Work::Idle;
        }
        let same_everywhere = matches!(cause.kind, ErrorKind::ResourceExhausted | ErrorKind::InvalidInput);
        let hopeless = run.setbacks >= SETBACKS_MAX || same_everywhere;
        if same_everywhere && run.unfinished() == 0 {
            run.wanted = false; // The next operation asks again, and hears why not.
        }
        let idle = matches!(run.work, Work::Idle);
        let given_up = run.head().filter(|_| hopeless && idle && run.broken.is_none());
        let setbacks = run.setbacks;
        if given_up.is_some() {
            run.setbacks = 0; // The next operation gets as many tries.
        }
        for node in nodes {
            if self.nodes.contains_key(&node) {
                self.send(node, CoordinatorMessage::ReleaseRanks { run: id, generation });
            }
        }
        if let Some(run) = self.runs.get(&id).filter(|run| run.replaying.is_some() && run.broken.is_none())
            && hopeless
        {
            let error = run.replay_lost(&cause);
            return self.give_up_replay(id, error);
        }
        let Some(seq) = given_up else { return self.advance(id) };
        let message = format!(
            "operation {} of {id} was given up after {setbacks} rank sets; of the last: {}",
            seq.0, cause.message
        );
        let error = OperationError::new(cause.kind, message);
        self.conclude(id, seq, Outcome::Failed { error }, None, None, None);
    }

    /// Moves a run that has fewer ranks than it asked for to a larger rank set, or off a node that is
    /// drained; says whether it will. The snapshot was taken before, so that the newcomers have little to repeat.
    pub(super) fn move_if_better(&mut self, id: RunId) -> bool {
        let Some(run) = self.runs.get(&id) else { return false };
        if !run.refill {
            return false;
        }
        let slots = self.best_slots(&run.create.base_model, run.model_digest, Some(id)).len();
        // Off a node that is drained also to fewer, or to wait for others.
        let must = run.rank_nodes().into_iter().any(|node| self.is_evacuated(node));
        let better = must || run.ranks_on(slots) > run.roster().len();
        if better {
            self.release(id);
            self.place(id);
        } else if let Some(run) = self.runs.get_mut(&id) {
            run.refill = false;
        }
        better
    }

    /// Marks a run that nobody has used for long, so that its memory becomes free.
    pub(super) fn rest_if_idle(&mut self, id: RunId) {
        let now_ms = self.now_ms;
        let Some(run) = self.runs.get_mut(&id) else { return };
        let idle = now_ms.saturating_sub(run.last_used_ms) >= IDLE_MS && run.unfinished() == 0;
        run.resting |= idle && matches!(run.ranks, Ranks::Formed { .. });
    }

    /// Marks the run that was unused for longest, if slots are full: the next tick finds room.
    fn make_room(&mut self) {
        let formed = self.runs.values_mut().filter(|run| matches!(run.ranks, Ranks::Formed { .. }));
        let idle = formed.filter(|run| run.unfinished() == 0);
        if let Some(run) = idle.min_by_key(|run| run.last_used_ms) {
            run.resting = true;
        }
    }

    /// Lets a resting run's ranks go, its state being written down; says whether it rests.
    pub(super) fn rest(&mut self, id: RunId) -> bool {
        let Some(run) = self.runs.get_mut(&id) else { return false };
        if !run.resting {
            return false;
        }
        run.resting = false;
        run.wanted = false;
        self.release(id);
        true
    }

    /// Lets the ranks of a run go that nothing is in flight on.
    pub(super) fn release(&mut self, id: RunId) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let (nodes, generation) = (run.rank_nodes(), run.generation);
        run.ranks = Ranks::Absent;
        for node in nodes {
            self.send(node, CoordinatorMessage::ReleaseRanks { run: id, generation });
        }
    }

    /// Runs with fewer ranks than they asked for look again at what the cluster has.
    pub(super) fn want_refill(&mut self) {
        for run in self.runs.values_mut() {
            let ranks = run.roster().len();
            run.refill |= ranks > 0 && ranks < run.ranks_on(usize::MAX);
        }
    }
}

fn backoff(setbacks: u32) -> u64 {
    // The first loss is most likely a node that is gone: others can take over at once.
    match setbacks {
        0 | 1 => 0,
        n => (RETRY_MS << (n - 2).min(5)).min(RETRY_MAX_MS),
    }
}

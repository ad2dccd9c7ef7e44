//! Nodes that live and can't reach each other: no rank set holds both of such a pair, so that a node which
//! is cut off from the others, but not from here, costs a run a few tries and not its operation.
//!
//! A rank that misses another says so, as soon as it has not heard it for as long as a node may be silent
//! towards the coordinator. Whose fault it was is not known of one pair: with three nodes the
//! first set leaves out one of the two, and if that was the wrong one, the next miss tells. Pairs are tried
//! again after a while, each time after a longer one, as a try that fails costs the run a rank set.

use std::collections::BTreeMap;

use crate::{
    protocol::{Blame, NodeId},
    types::RunId,
};

use super::{State, placement::Slot};

/// How long a pair is kept apart the first time; doubled each time that it fails again.
const APART_MS: u64 = 120_000;

/// Doublings: the longest is a good hour.
const DOUBLINGS_MAX: u32 = 5;

/// Pairs by their nodes, the lower number first.
#[derive(Default)]
pub(super) struct Severed(BTreeMap<(NodeId, NodeId), Apart>);

struct Apart {
    until_ms: u64,
    times: u32,
    /// Its time is over, and runs have been told.
    over: bool,
}

impl Severed {
    fn are_apart(&self, a: NodeId, b: NodeId) -> bool {
        self.0.get(&pair(a, b)).is_some_and(|apart| !apart.over)
    }

    /// A node is gone; under its next number it is another.
    pub fn forget(&mut self, node: NodeId) {
        self.0.retain(|(a, b), _| *a != node && *b != node);
    }
}

impl State {
    /// A rank on `node` missed another of its set.
    pub(super) fn note_blame(&mut self, id: RunId, node: NodeId, blame: Blame) {
        let (Blame::Peer(rank), Some(run)) = (blame, self.runs.get(&id)) else { return };
        let missed = run.roster().iter().find(|seat| seat.rank == rank).map(|seat| seat.node);
        let Some(other) = missed.filter(|other| *other != node) else { return };
        let apart =
            self.severed.0.entry(pair(node, other)).or_insert(Apart { until_ms: 0, times: 0, over: true });
        apart.until_ms = self.now_ms + (APART_MS << apart.times.min(DOUBLINGS_MAX));
        (apart.times, apart.over) = (apart.times + 1, false);
        let (node, other) = (self.node_name(node), self.node_name(other));
        tracing::warn!("{node} can't reach {other}: their ranks are kept apart for a while");
    }

    /// Leaves out nodes until no two that are left are kept apart: first whoever misses most others, then
    /// whoever has least to give.
    pub(super) fn without_severed(&self, mut slots: Vec<Slot>) -> Vec<Slot> {
        loop {
            let mut counts: BTreeMap<NodeId, (usize, usize)> = BTreeMap::new();
            for slot in &slots {
                counts.entry(slot.node).or_default().1 += 1;
            }
            let nodes: Vec<NodeId> = counts.keys().copied().collect();
            for node in &nodes {
                let missed = nodes.iter().filter(|other| self.severed.are_apart(*node, **other)).count();
                counts.entry(*node).or_default().0 = missed;
            }
            let worst = counts
                .into_iter()
                .filter(|(_, (missed, _))| *missed > 0)
                .max_by_key(|(node, (missed, slots))| (*missed, std::cmp::Reverse(*slots), *node));
            let Some((worst, _)) = worst else { return slots };
            slots.retain(|slot| slot.node != worst);
        }
    }

    /// Pairs whose time is over may be tried again.
    pub(super) fn expire_severed(&mut self) {
        let now_ms = self.now_ms;
        let due = self.severed.0.values_mut().filter(|apart| !apart.over && apart.until_ms <= now_ms);
        let due = due.map(|apart| apart.over = true).count();
        if due > 0 {
            self.want_refill();
            self.advance_all();
        }
    }
}

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

//! Draining a node: what it does is done elsewhere, step by step, and then it can stop without anyone
//! noticing.
//!
//! A rank leaves it between two operations, once the run's state is written down. A replica finishes the
//! sequences that it has, gets no others, and no publish waits for it. The name stays drained, when the node
//! connects again and when the coordinator restarts, until it is taken back.

use crate::{
    journal::{JournalError, Record},
    protocol::{ClientResponse, NodeDrain, NodeId},
};

use super::{Appending, Refusal, State, WaiterId};

/// Nodes that are drained at once.
const DRAINED_MAX: usize = 4_096;

impl State {
    /// Drains the node of this name, or gives it work again; either once that is durable.
    pub(super) fn drain_node(
        &mut self,
        waiter: WaiterId,
        name: String,
        drain: bool,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.refuse_while_draining()?;
        // One that is away can be taken back, and not be drained: its name may be a slip.
        if self.node_named(&name).is_none() && (drain || !self.evacuated.contains(&name)) {
            let there: Vec<&str> = self.nodes.values().map(|node| node.hello.name.as_str()).collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
            return Err(Refusal::UnknownNode { name: name.chars().take(128).collect(), there });
        }
        if drain && self.evacuated.len() >= DRAINED_MAX {
            return Err(Refusal::Overloaded { what: "drained nodes", bound: DRAINED_MAX });
        }
        let record = Record::Drained { node: name.clone(), drained: drain };
        self.append(vec![record], Appending::Drained { node: name, drained: drain, waiter });
        Ok(None)
    }

    pub(super) fn drained_durable(
        &mut self,
        name: String,
        drained: bool,
        waiter: WaiterId,
        result: Result<(), JournalError>,
    ) {
        if let Err(why) = result {
            return self.refuse(waiter, Refusal::NotDurable(why.to_string()));
        }
        let node = self.node_named(&name);
        let changed = if drained { self.evacuated.insert(name) } else { self.evacuated.remove(&name) };
        if let (true, Some(node)) = (changed, node) {
            if drained { self.evacuate(node) } else { self.take_back(node) }
        }
        self.respond(waiter, ClientResponse::Cluster(self.cluster_status()));
    }

    fn node_named(&self, name: &str) -> Option<NodeId> {
        self.nodes.iter().find(|(_, node)| node.hello.name == name).map(|(id, _)| *id)
    }

    fn evacuate(&mut self, node: NodeId) {
        tracing::info!(node = %self.node_name(node), "it is drained");
        for run in self.runs.values_mut() {
            run.refill |= run.rank_nodes().contains(&node);
        }
        for policy in self.policies.served.keys().copied().collect::<Vec<_>>() {
            // What it holds of it serves the requests that it has.
            self.leave_roster(policy, node);
        }
        self.advance_all();
        self.dispatch_waiting();
    }

    fn take_back(&mut self, node: NodeId) {
        tracing::info!(node = %self.node_name(node), "it gets work again");
        self.want_refill();
        self.stage_on_newcomer(node);
        self.advance_all();
        self.dispatch_waiting();
    }

    /// Whether a node gets nothing new.
    pub(super) fn is_evacuated(&self, node: NodeId) -> bool {
        !self.evacuated.is_empty()
            && self.nodes.get(&node).is_some_and(|node| self.evacuated.contains(&node.hello.name))
    }

    /// What a node that is drained still has.
    pub(super) fn drain_of(&self, node: NodeId) -> Option<NodeDrain> {
        if !self.is_evacuated(node) {
            return None;
        }
        let runs = self.runs.values().filter(|run| run.rank_nodes().contains(&node)).count();
        let samples = self.nodes.get(&node).map_or(0, |node| node.generating);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Some(NodeDrain { runs: count(runs), samples: count(samples) })
    }
}

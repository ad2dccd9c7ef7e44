//! Draining a node: what it does is done elsewhere, step by step, and then it can stop without anyone
//! noticing.
//!
//! A rank leaves it between two operations, once the run's state is written down. A replica finishes the
//! sequences that it has, gets no others, and no publish waits for it. The name stays drained when the node
//! connects again, until it is taken back or the coordinator restarts.

use crate::protocol::{ClientResponse, NodeDrain, NodeId};

use super::{Refusal, State};

impl State {
    /// Drains the node of this name, or gives it work again.
    pub(super) fn drain_node(&mut self, name: &str, drain: bool) -> Result<ClientResponse, Refusal> {
        let Some(node) = self.nodes.iter().find(|(_, node)| node.hello.name == name).map(|(id, _)| *id)
        else {
            let there: Vec<&str> = self.nodes.values().map(|node| node.hello.name.as_str()).collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
            return Err(Refusal::UnknownNode { name: name.chars().take(128).collect(), there });
        };
        match drain {
            true if self.evacuated.insert(name.to_owned()) => self.evacuate(node),
            false if self.evacuated.remove(name) => self.take_back(node),
            _ => {}
        }
        Ok(ClientResponse::Cluster(self.cluster_status()))
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

//! Which weights the samplers hold and serve.
//!
//! ```text
//!   publish ─► Stage to every node with replicas ─► all Staged ─► Activate ─► all Activated
//!              │                                                              ─► live, reported
//!              └─ late or failed: the node leaves this policy's roster and is staged again
//! ```
//!
//! A node is given requests for a policy only when it has said `Activated`. A node that joins
//! later is brought up to date by itself, and so is a policy that is asked for again after it
//! left memory: both are staged and activated at once.

use std::collections::BTreeMap;

use crate::{
    protocol::{BlobRef, CoordinatorMessage, NodeId, OperationSeq},
    types::{OperationError, PolicyId, RunId},
};

use super::{State, ms, run::Publication};

/// Policies that are no run's live one and stay in the replicas' memory: a loop samples its
/// last version while the next is published, and an evaluation an older one.
const OTHERS_MAX: usize = 4;

/// Live policies in the replicas' memory; an idle run's is staged again when it is asked for.
const LIVE_MAX: usize = 16;

/// Policies whose adapter is known, staged or not.
const KNOWN_MAX: usize = 65_536;

/// How long a node that failed to stage is left alone.
const RETRY_MS: u64 = 5_000;

/// All policies that can be served.
#[derive(Default)]
pub(super) struct Policies {
    known: BTreeMap<PolicyId, Known>,
    /// In the memory of replicas, or on the way there.
    pub served: BTreeMap<PolicyId, Served>,
}

/// What it takes to serve a policy.
#[derive(Clone)]
pub(super) struct Known {
    pub base_model: String,
    pub adapter: BlobRef,
}

/// A policy on the nodes.
#[derive(Default)]
pub(super) struct Served {
    pub standing: BTreeMap<NodeId, Standing>,
    pub last_used_ms: u64,
    /// Sample requests that are pinned to it.
    pub pins: usize,
}

/// How far a node is with a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Staging {
        deadline_ms: u64,
    },
    /// Verified on every replica of the node; waits for the other nodes.
    Staged,
    Activating {
        deadline_ms: u64,
    },
    Active,
    /// Failed or late: out of the roster until it is tried again.
    Behind {
        retry_ms: u64,
    },
}

impl Policies {
    /// Makes a policy known; the oldest that nobody serves are forgotten.
    pub fn learn(&mut self, policy: PolicyId, base_model: &str, adapter: BlobRef) {
        self.known.insert(policy, Known { base_model: base_model.to_owned(), adapter });
        if self.known.len() > KNOWN_MAX {
            let oldest = self.known.keys().find(|policy| !self.served.contains_key(policy)).copied();
            oldest.and_then(|policy| self.known.remove(&policy));
        }
    }

    /// Forgets those that no replica has and that `keep` does not hold.
    pub fn forget_unless(&mut self, keep: impl Fn(&PolicyId) -> bool) {
        self.known.retain(|policy, _| self.served.contains_key(policy) || keep(policy));
    }

    /// Of every policy that a request may name.
    pub fn adapters(&self) -> impl Iterator<Item = BlobRef> {
        self.known.values().map(|known| known.adapter)
    }

    pub fn get(&self, policy: &PolicyId) -> Option<&Known> {
        self.known.get(policy)
    }

    /// Whether requests for the policy may go to `node`.
    pub fn is_active(&self, policy: &PolicyId, node: NodeId) -> bool {
        self.served.get(policy).is_some_and(|s| s.standing.get(&node) == Some(&Standing::Active))
    }
}

impl State {
    /// Begins to make a policy the run's live one; its outcome and slot are durable, its
    /// adapter is known.
    pub(super) fn publish(&mut self, id: RunId, seq: OperationSeq, policy: PolicyId) {
        let deadline_ms = self.now_ms + ms(self.limits.publish_deadline);
        let Some(run) = self.runs.get_mut(&id) else { return };
        run.publishing = Some(Publication::new(seq, policy, deadline_ms));
        self.stage_everywhere(policy);
        self.continue_publish(policy);
    }

    /// Stages a policy on every node with replicas that has nothing of it yet.
    pub(super) fn stage_everywhere(&mut self, policy: PolicyId) {
        let now_ms = self.now_ms;
        let Some(known) = self.policies.known.get(&policy) else { return };
        self.policies.served.entry(policy).or_default().last_used_ms = now_ms;
        let Some(digest) = self.models.get(&known.base_model).map(|offer| offer.digest) else { return };
        let nodes = self
            .nodes
            .iter()
            .filter(|(_, node)| node.hello.samplers > 0 && node.offers(&known.base_model, digest));
        let nodes: Vec<NodeId> = nodes.map(|(id, _)| *id).filter(|node| !self.is_evacuated(*node)).collect();
        for node in nodes {
            if !self.policies.served[&policy].standing.contains_key(&node) {
                self.stage(policy, node);
            }
        }
        self.retire_unused(policy);
    }

    fn stage(&mut self, policy: PolicyId, node: NodeId) {
        let Some(Known { base_model, adapter }) = self.policies.get(&policy).cloned() else { return };
        let deadline_ms = self.now_ms + ms(self.limits.stage_deadline);
        self.set_standing(policy, node, Standing::Staging { deadline_ms });
        self.send(node, CoordinatorMessage::Stage { policy, base_model, adapter });
    }

    fn activate(&mut self, policy: PolicyId, node: NodeId) {
        let deadline_ms = self.now_ms + ms(self.limits.stage_deadline);
        self.set_standing(policy, node, Standing::Activating { deadline_ms });
        self.send(node, CoordinatorMessage::Activate { policy });
    }

    fn set_standing(&mut self, policy: PolicyId, node: NodeId, standing: Standing) {
        if let Some(served) = self.policies.served.get_mut(&policy) {
            served.standing.insert(node, standing);
        }
    }

    fn standing(&self, policy: PolicyId, node: NodeId) -> Option<Standing> {
        self.policies.served.get(&policy)?.standing.get(&node).copied()
    }

    pub(super) fn staged(&mut self, node: NodeId, policy: PolicyId) {
        if matches!(self.standing(policy, node), Some(Standing::Staging { .. })) {
            self.set_standing(policy, node, Standing::Staged);
            if !self.is_publishing(policy) {
                self.activate(policy, node);
            }
            self.continue_publish(policy);
        }
    }

    pub(super) fn activated(&mut self, node: NodeId, policy: PolicyId) {
        if matches!(self.standing(policy, node), Some(Standing::Activating { .. })) {
            self.set_standing(policy, node, Standing::Active);
            self.continue_publish(policy);
            self.dispatch_waiting();
        }
    }

    pub(super) fn stage_failed(&mut self, node: NodeId, policy: PolicyId, error: &OperationError) {
        if self.standing(policy, node).is_some() {
            self.fall_behind(node, policy, &error.to_string());
        }
    }

    fn fall_behind(&mut self, node: NodeId, policy: PolicyId, why: &str) {
        let name = self.node_name(node);
        tracing::warn!(node = %name, %policy, "not staged, left out until it is: {why}");
        let publication = self.runs.get_mut(&policy.run).and_then(|run| run.publishing.as_mut());
        if let Some(publication) = publication.filter(|p| p.policy == policy) {
            publication.reasons.insert(name, why.to_owned());
        }
        let retry_ms = self.now_ms + RETRY_MS;
        self.set_standing(policy, node, Standing::Behind { retry_ms });
        self.continue_publish(policy);
    }

    fn is_publishing(&self, policy: PolicyId) -> bool {
        let run = self.runs.get(&policy.run);
        run.is_some_and(|run| run.publishing.as_ref().is_some_and(|p| p.policy == policy && !p.failing))
    }

    /// The next step of a publish: activate when all have staged, be done when all serve it.
    pub(super) fn continue_publish(&mut self, policy: PolicyId) {
        if !self.is_publishing(policy) {
            return;
        }
        let Some(served) = self.policies.served.get(&policy) else { return };
        let roster = served.standing.iter().filter(|(_, s)| !matches!(s, Standing::Behind { .. }));
        let roster: Vec<(NodeId, Standing)> = roster.map(|(node, s)| (*node, *s)).collect();
        if roster.iter().any(|(_, standing)| matches!(standing, Standing::Staging { .. })) {
            return;
        }
        let staged = roster.iter().filter(|(_, standing)| *standing == Standing::Staged);
        let staged: Vec<NodeId> = staged.map(|(node, _)| *node).collect();
        for node in staged {
            self.activate(policy, node);
        }
        if !roster.is_empty() && roster.iter().all(|(_, standing)| *standing == Standing::Active) {
            self.finish_publish(policy);
        }
    }

    /// Every replica of the roster serves it: it is live, and the operation is done.
    fn finish_publish(&mut self, policy: PolicyId) {
        let Some(run) = self.runs.get_mut(&policy.run) else { return };
        let Some(Publication { seq, .. }) = run.publishing.take() else { return };
        run.serve(policy, self.wall_ms);
        self.show(policy.run, seq);
        self.retire_unused(policy);
        self.dispatch_waiting();
        self.advance(policy.run);
    }

    /// Brings a node that joined up to date with what is served.
    pub(super) fn stage_on_newcomer(&mut self, node: NodeId) {
        if self.nodes.get(&node).is_none_or(|node| node.hello.samplers == 0) {
            return;
        }
        for policy in self.policies.served.keys().copied().collect::<Vec<_>>() {
            self.stage_everywhere(policy);
        }
    }

    /// A node is gone, with all that it held.
    pub(super) fn unstage_node(&mut self, node: NodeId) {
        for policy in self.policies.served.keys().copied().collect::<Vec<_>>() {
            self.leave_roster(policy, node);
        }
    }

    /// From now on no publish waits for the node, and no request for the policy goes to it.
    pub(super) fn leave_roster(&mut self, policy: PolicyId, node: NodeId) {
        if let Some(served) = self.policies.served.get_mut(&policy) {
            served.standing.remove(&node);
        }
        self.continue_publish(policy);
    }

    /// Deadlines of staging, and another try for nodes that fell behind.
    pub(super) fn expire_stages(&mut self) {
        let now_ms = self.now_ms;
        let all = self.policies.served.iter().flat_map(|(policy, served)| {
            served.standing.iter().map(|(node, standing)| (*policy, *node, *standing))
        });
        for (policy, node, standing) in all.collect::<Vec<_>>() {
            match standing {
                Standing::Staging { deadline_ms } | Standing::Activating { deadline_ms }
                    if deadline_ms <= now_ms =>
                {
                    let limit = self.limits.stage_deadline.as_secs();
                    self.fall_behind(node, policy, &format!("it took more than {limit} s"));
                }
                Standing::Behind { retry_ms } if retry_ms <= now_ms => self.stage(policy, node),
                _ => {}
            }
        }
    }

    /// Takes policies out of the replicas' memory that nobody has asked for lately; not `fresh`.
    fn retire_unused(&mut self, fresh: PolicyId) {
        while let Some(policy) = self.policy_to_retire(fresh) {
            let served = self.policies.served.remove(&policy);
            for node in served.into_iter().flat_map(|served| served.standing.into_keys()) {
                self.send(node, CoordinatorMessage::Retire { policy });
            }
        }
    }

    /// The longest unused of those that are too many and that no request is pinned to.
    fn policy_to_retire(&self, fresh: PolicyId) -> Option<PolicyId> {
        let (live, others): (Vec<_>, Vec<_>) = self
            .policies
            .served
            .iter()
            .partition(|(policy, _)| self.runs.get(&policy.run).is_some_and(|run| run.serves(**policy)));
        let crowded = match (others.len() > OTHERS_MAX, live.len() > LIVE_MAX) {
            (true, _) => others,
            (false, true) => live,
            (false, false) => return None,
        };
        let idle = crowded.into_iter().filter(|(policy, served)| {
            served.pins == 0 && !self.is_publishing(**policy) && **policy != fresh
        });
        idle.min_by_key(|(_, served)| served.last_used_ms).map(|(policy, _)| *policy)
    }
}

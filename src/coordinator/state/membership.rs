//! Nodes that come, answer pings and go.

use crate::{
    protocol::{
        Blame, CoordinatorMessage, ModelOffer, NodeHello, NodeId, NodeMessage, Numerics, PROTOCOL_VERSION,
    },
    types::{Digest, ErrorKind, OperationError, RunId},
};

use super::{Effect, Refusal, State, ms, run::Answer};

/// How often each node is pinged.
const PING_MS: u64 = 2_000;

/// Trainer slots, and replicas, that one node may have.
const SEATS_MAX: u32 = 1_024;

/// Models that one node may offer.
const MODELS_MAX: usize = 256;

/// A connected node.
pub(super) struct Node {
    pub hello: NodeHello,
    pub last_pong_ms: u64,
    /// Sample requests that its replicas have.
    pub generating: usize,
    /// Prompt tokens of these.
    pub generating_tokens: usize,
}

impl State {
    /// A node introduced itself.
    pub(super) fn node_joined(&mut self, id: NodeId, hello: NodeHello) {
        if let Err(reason) = acceptable(&hello) {
            tracing::warn!(node = %hello.name, "refused: {reason}");
            self.effects.push(Effect::Dismiss { node: id, reason });
            return;
        }
        if let Err(reason) = self.same_weights(&hello) {
            tracing::warn!(node = %hello.name, "refused: {reason}");
            self.effects.push(Effect::Dismiss { node: id, reason });
            return;
        }
        let namesake = self.nodes.iter().find(|(_, node)| node.hello.name == hello.name).map(|(id, _)| *id);
        if let Some(old) = namesake {
            self.dismiss(old, "a node of the same name joined");
        }
        tracing::info!(node = %hello.name, id = id.0, trainers = hello.trainers, samplers = hello.samplers, "joined");
        for offer in &hello.models {
            self.learn_model(offer);
        }
        let node = Node { hello, last_pong_ms: self.now_ms, generating: 0, generating_tokens: 0 };
        let offers: Vec<_> = node.hello.models.iter().map(|o| (o.name.clone(), o.digest)).collect();
        self.nodes.insert(id, node);
        self.ever_joined = true;
        for (model, digest) in offers {
            let slots = self.slots_for(&model, digest);
            let most = self.most_slots.entry(model).or_default();
            *most = (*most).max(slots);
        }
        self.membership_changed_ms = self.now_ms;
        self.send(id, CoordinatorMessage::Welcome { node: id, epoch: self.epoch });
        self.tell_revoked(id);
        self.want_refill();
        self.stage_on_newcomer(id);
        self.release_held();
        self.advance_all();
        self.dispatch_waiting();
    }

    /// Refuses a node that holds weights of a model as another type than one that is there: what its
    /// replicas sample would be of other weights than those that are trained.
    fn same_weights(&self, hello: &NodeHello) -> Result<(), String> {
        let offers = |other: &Node| {
            let names = |model: &ModelOffer| other.hello.models.iter().any(|known| known.name == model.name);
            hello.models.iter().any(names)
        };
        let (name, dtype) = (&hello.name, &hello.numerics.dtype);
        let mut others = self.nodes.values().filter(|other| other.hello.name != *name && offers(other));
        match others.find(|other| other.hello.numerics.dtype != *dtype) {
            None => Ok(()),
            Some(other) => Err(format!(
                "node {name} holds base weights as {dtype}, node {} as {}; give all nodes of a cluster the same --dtype",
                other.hello.name, other.hello.numerics.dtype
            )),
        }
    }

    /// Adds what a node offers; of two models under one name the one that is served stays.
    fn learn_model(&mut self, offer: &ModelOffer) {
        let other = self.models.get(&offer.name).filter(|known| known.digest != offer.digest);
        if other.is_some_and(|known| self.nodes.values().any(|n| n.offers(&known.name, known.digest))) {
            tracing::warn!(model = %offer.name, "nodes offer different files under one name; the first stays");
            return;
        }
        self.models.insert(offer.name.clone(), offer.clone());
    }

    /// The model of this name or alias.
    pub(super) fn offer(&self, name: &str) -> Result<&ModelOffer, Refusal> {
        let by_alias = || self.models.values().find(|offer| offer.aliases.iter().any(|alias| alias == name));
        self.models.get(name).or_else(by_alias).ok_or_else(|| {
            if !self.ever_joined {
                return Refusal::NoNode;
            }
            let offered: Vec<&str> = self.models.keys().map(String::as_str).collect();
            let offered = if offered.is_empty() { "nothing yet".to_owned() } else { offered.join(", ") };
            Refusal::UnknownModel { name: name.chars().take(128).collect(), offered }
        })
    }

    /// A node is gone: what it was doing is done elsewhere, or fails and says so.
    pub(super) fn lose_node(&mut self, id: NodeId, reason: &str) {
        let Some(node) = self.nodes.remove(&id) else { return };
        let name = node.hello.name;
        tracing::warn!(node = %name, id = id.0, "lost: {reason}");
        self.membership_changed_ms = self.now_ms;
        self.severed.forget(id);
        if node.hello.samplers > 0 {
            let seen = node.hello.models.into_iter().map(|offer| (offer.name, self.now_ms));
            self.samplers_seen_ms.extend(seen);
        }
        let concerned: Vec<RunId> =
            self.runs.values().filter(|run| run.rank_nodes().contains(&id)).map(|run| run.id).collect();
        for run in concerned {
            let message = format!("node {name} was lost while it held a rank of {run} ({reason})");
            self.lose_ranks(run, OperationError::new(ErrorKind::Unavailable, message));
        }
        self.unstage_node(id);
        self.retry_samples_of(id, &format!("node {name} was lost: {reason}"));
        self.dispatch_waiting();
    }

    /// Ends the connection of a node that is still there.
    fn dismiss(&mut self, id: NodeId, reason: &str) {
        self.lose_node(id, reason);
        self.effects.push(Effect::Dismiss { node: id, reason: reason.to_owned() });
    }

    pub(super) fn node_message(&mut self, id: NodeId, message: NodeMessage) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        // Whatever it says, it lives.
        node.last_pong_ms = self.now_ms;
        match message {
            NodeMessage::Pong { .. } => {}
            NodeMessage::Progress { token, rank, .. } => self.rank_progressed(id, token, rank),
            NodeMessage::RanksReady { run, generation } => self.ranks_ready(id, run, generation),
            NodeMessage::RanksFailed { run, generation, error, blame } => {
                self.ranks_failed(id, run, generation, (error, blame));
            }
            NodeMessage::Prepared { token, rank, state, result, saved, step } => {
                self.rank_answered(id, token, rank, Answer::Prepared { state, result, saved, step });
            }
            NodeMessage::OperationFailed { token, rank, error, blame: Blame::Operation } => {
                self.rank_answered(id, token, rank, Answer::Failed(error));
            }
            NodeMessage::OperationFailed { token, error, blame, .. } => {
                self.rank_failed(id, token, error, blame);
            }
            NodeMessage::SnapshotTaken { token, snapshot } => self.snapshot_taken(id, token, snapshot),
            NodeMessage::SnapshotFailed { token, error } => self.snapshot_failed(id, token, &error),
            NodeMessage::Staged { policy } => self.staged(id, policy),
            NodeMessage::StageFailed { policy, error } => self.stage_failed(id, policy, &error),
            NodeMessage::Activated { policy } => self.activated(id, policy),
        }
    }

    /// Pings, and gives up nodes that have been silent too long.
    pub(super) fn ping_nodes(&mut self) {
        let (now_ms, limit_ms) = (self.now_ms, ms(self.limits.node_deadline));
        let silent = self.nodes.iter().filter(|(_, node)| now_ms >= node.last_pong_ms + limit_ms);
        for id in silent.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.dismiss(id, &format!("silent for {} s", limit_ms / 1_000));
        }
        if now_ms >= self.next_ping_ms {
            self.next_ping_ms = now_ms + PING_MS;
            self.ping_nonce += 1;
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                self.send(id, CoordinatorMessage::Ping { nonce: self.ping_nonce });
            }
        }
    }

    pub(super) fn advance_all(&mut self) {
        for run in self.runs.keys().copied().collect::<Vec<_>>() {
            self.advance(run);
        }
    }

    /// For people; also of a node that has just gone.
    pub(super) fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| id.to_string(), |node| node.hello.name.clone())
    }
}

impl Node {
    /// Whether it has exactly this model.
    pub fn offers(&self, model: &str, digest: Digest) -> bool {
        self.hello.models.iter().any(|offer| offer.name == model && offer.digest == digest)
    }

    pub fn numerics(&self) -> String {
        let Numerics { build, kernels, dtype, reduction } = &self.hello.numerics;
        match reduction.as_str() {
            "fast" => format!("{build} {kernels} {dtype} fast"),
            _ => format!("{build} {kernels} {dtype}"),
        }
    }
}

/// What a node may not say of itself.
fn acceptable(hello: &NodeHello) -> Result<(), String> {
    if hello.protocol_version != PROTOCOL_VERSION {
        return Err(format!(
            "it speaks protocol {}, this coordinator {PROTOCOL_VERSION}",
            hello.protocol_version
        ));
    }
    if hello.trainers > SEATS_MAX || hello.samplers > SEATS_MAX {
        return Err(format!("more than {SEATS_MAX} trainers or samplers on one node"));
    }
    if hello.models.len() > MODELS_MAX {
        return Err(format!("more than {MODELS_MAX} models on one node"));
    }
    Ok(())
}

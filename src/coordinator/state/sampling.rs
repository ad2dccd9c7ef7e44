//! Sample requests: checked, pinned to weights and a seed, handed to the replica with the least
//! to do, and handed to another one if its node is lost.

use crate::{
    protocol::{
        ClientResponse, Generate, GenerateReply, ModelOffer, NodeId, RequestId, SampleRequest, SampleTarget,
    },
    types::{CheckpointPath, CheckpointTarget, ErrorKind, InvalidInput, PolicyId, RunId},
};

use super::{Effect, Refusal, State, WaiterId, admission, membership::Node, ms};

/// Requests admitted and not answered.
const IN_FLIGHT_MAX: usize = 4_096;

/// Sequences of one request.
const NUM_SAMPLES_MAX: u32 = 128;

/// Replicas that a request is tried on.
const TRIES_MAX: u32 = 3;

/// Requests that one replica is given at once: several batches, so that it never idles, and half of
/// what it takes, as it hears later than we do that one was cancelled. The others wait here.
pub(super) const HANDED_MAX: usize = 512;

/// Prompt tokens of the requests that one replica is given at once, half of what it takes. A longer
/// prompt has the replica's queue to itself.
const HANDED_TOKENS_MAX: usize = 2 << 20;

/// How long a request waits for a node that can serve it.
const NODE_WAIT_MS: u64 = 30_000;

/// How long a request waits for the version that it asked for; a client asks again.
const VERSION_WAIT_MS: u64 = 25_000;

/// An admitted request.
pub(super) struct Sample {
    waiter: WaiterId,
    /// `policy` is filled in, and pinned, when the request gets its weights.
    generate: Generate,
    place: Place,
    /// Tries that ended without an answer.
    tries: u32,
    last_failure: String,
}

enum Place {
    /// For a live version of at least `floor`.
    Version { run: RunId, floor: u64, since_ms: u64 },
    /// For a node that serves its weights.
    Node { since_ms: u64 },
    /// For room on one that does.
    Room { since_ms: u64 },
    /// On a replica of `node`.
    Replica { node: NodeId, since_ms: u64 },
}

impl State {
    /// Admits a request.
    pub(super) fn sample(
        &mut self,
        waiter: WaiterId,
        request: SampleRequest,
        entropy: u64,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.refuse_while_draining()?;
        if self.samples.len() >= IN_FLIGHT_MAX {
            return Err(Refusal::Overloaded { what: "sample requests", bound: IN_FLIGHT_MAX });
        }
        let (base_model, place, policy) = self.sample_target(&request.target)?;
        let offer = self.offer(&base_model)?;
        let prompt = checked_prompt(&request, offer)?;
        let generate = Generate {
            request: RequestId(self.next_request),
            base_model: offer.name.clone(),
            policy,
            prompt,
            num_samples: request.num_samples,
            seed: request.params.seed.unwrap_or(entropy),
            params: request.params,
            flags: request.flags,
        };
        self.next_request += 1;
        let id = generate.request;
        self.pin(policy, 1);
        let sample = Sample { waiter, generate, place, tries: 0, last_failure: String::new() };
        self.samples.insert(id, sample);
        self.dispatch(id);
        Ok(None)
    }

    /// The base model, what to wait for, and the weights if they are known already.
    fn sample_target(&self, target: &SampleTarget) -> Result<(String, Place, Option<PolicyId>), Refusal> {
        let since_ms = self.now_ms;
        let known = |policy: PolicyId| {
            let known = self.policies.get(&policy).ok_or(Refusal::UnknownPolicy(policy))?;
            Ok((known.base_model.clone(), Place::Node { since_ms }, Some(policy)))
        };
        match target {
            SampleTarget::Base { base_model } => Ok((base_model.clone(), Place::Node { since_ms }, None)),
            SampleTarget::Live { run, min_version } => {
                let base_model =
                    self.runs.get(run).ok_or(Refusal::UnknownRun(*run))?.create.base_model.clone();
                Ok((base_model, Place::Version { run: *run, floor: *min_version, since_ms }, None))
            }
            SampleTarget::Policy(policy) => known(*policy),
            SampleTarget::Checkpoint { path } => known(self.saved_policy(path)?),
            SampleTarget::Initial { run } => {
                let run = self.runs.get(run).ok_or(Refusal::UnknownRun(*run))?;
                Ok((run.create.base_model.clone(), Place::Node { since_ms }, run.initial))
            }
            SampleTarget::LiveOrCheckpoint { run, min_version, path } => {
                // The path is looked at in any case: a wrong one is not right until a publish.
                let saved = self.saved_policy(path)?;
                let run = self.runs.get(run).ok_or(Refusal::UnknownRun(*run))?;
                known(run.live_from(*min_version).unwrap_or(saved))
            }
        }
    }

    /// What a sampler checkpoint is served as.
    fn saved_policy(&self, path: &str) -> Result<PolicyId, Refusal> {
        let path: CheckpointPath = path.parse()?;
        if path.target != CheckpointTarget::Sampler {
            let problem = format!("{path} is no sampler checkpoint; save_weights_for_sampler makes one");
            return Err(InvalidInput::new("path", problem).into());
        }
        let policy = self.checkpoints.find(&path)?.policy;
        policy.ok_or_else(|| Refusal::UnknownCheckpoint(path.to_string()))
    }

    /// Hands a request on as far as possible.
    fn dispatch(&mut self, id: RequestId) {
        self.waiting.remove(&id);
        let now_ms = self.now_ms;
        let Some(sample) = self.samples.get_mut(&id) else { return };
        if let Place::Version { run, floor, .. } = sample.place {
            match self.runs.get(&run).and_then(|run| run.live_from(floor)) {
                Some(live) => {
                    sample.generate.policy = Some(live);
                    sample.place = Place::Node { since_ms: now_ms };
                    self.pin(Some(live), 1);
                }
                None => {
                    self.waiting.insert(id);
                    return;
                }
            }
        }
        let Some(sample) = self.samples.get(&id) else { return };
        let policy = sample.generate.policy;
        if let Some(policy) = policy {
            self.stage_everywhere(policy);
        }
        match self.idlest_node(&self.samples[&id].generate) {
            Some(node) if self.has_room(node, id) => self.hand_over(id, node),
            idlest => {
                self.wait_for(id, idlest.is_some());
                self.waiting.insert(id);
            }
        }
    }

    /// Says what a request waits for, from now on if it waited for something else before.
    fn wait_for(&mut self, id: RequestId, room: bool) {
        let since_ms = self.now_ms;
        let Some(sample) = self.samples.get_mut(&id) else { return };
        match sample.place {
            Place::Room { .. } if room => {}
            Place::Node { .. } if !room => {}
            _ if room => sample.place = Place::Room { since_ms },
            _ => sample.place = Place::Node { since_ms },
        }
    }

    /// Whether a node may be given a request beside those that it has.
    fn has_room(&self, node: NodeId, id: RequestId) -> bool {
        let node = &self.nodes[&node];
        let replicas = node.hello.samplers as usize;
        let tokens = node.generating_tokens + self.samples[&id].generate.prompt.len();
        node.generating == 0
            || (node.generating < HANDED_MAX * replicas && tokens <= HANDED_TOKENS_MAX * replicas)
    }

    /// Gives the room that a request has left to the one that has waited longest for it.
    fn fill_room(&mut self) {
        let waits = |id: &&RequestId| matches!(self.samples[id].place, Place::Room { .. });
        for id in self.waiting.iter().filter(waits).copied().collect::<Vec<_>>() {
            self.dispatch(id);
            if !self.waiting.contains(&id) {
                return;
            }
        }
    }

    /// The node with the fewest requests a replica that serves these weights.
    fn idlest_node(&self, generate: &Generate) -> Option<NodeId> {
        let digest = self.models.get(&generate.base_model)?.digest;
        let able = self.nodes.iter().filter(|(id, node)| {
            node.hello.samplers > 0
                && !self.is_evacuated(**id)
                && node.offers(&generate.base_model, digest)
                && generate.policy.is_none_or(|policy| self.policies.is_active(&policy, **id))
        });
        let load = |node: &Node| node.generating as u64 * 1_000 / u64::from(node.hello.samplers);
        able.min_by_key(|(id, node)| (load(node), **id)).map(|(id, _)| *id)
    }

    fn hand_over(&mut self, id: RequestId, node: NodeId) {
        let Some(sample) = self.samples.get_mut(&id) else { return };
        sample.place = Place::Replica { node, since_ms: self.now_ms };
        let effect = Effect::Generate { node, attempt: sample.tries, generate: sample.generate.clone() };
        if let Some(node) = self.nodes.get_mut(&node) {
            node.generating += 1;
            node.generating_tokens += sample.generate.prompt.len();
        }
        self.effects.push(effect);
    }

    /// A replica has answered, or its stream broke.
    pub(super) fn generated(&mut self, id: RequestId, attempt: u32, reply: Result<GenerateReply, String>) {
        let Some(sample) = self.samples.get(&id) else { return };
        if sample.tries != attempt || !matches!(sample.place, Place::Replica { .. }) {
            return;
        }
        match reply {
            Ok(GenerateReply::Done(result)) => {
                let policy = sample.generate.policy;
                let pinned = policy.map_or(0, |policy| policy.step);
                let response = if result.policy_version == pinned {
                    ClientResponse::Sample { result, policy }
                } else {
                    let served = result.policy_version;
                    let problem =
                        format!("a replica served version {served} to a request pinned to {pinned}");
                    ClientResponse::Error(Refusal::Fault(problem).into())
                };
                self.end_sample(id, response);
            }
            Ok(GenerateReply::Failed(error)) if error.kind == ErrorKind::Unavailable => {
                self.retry_sample(id, &error.message);
            }
            Ok(GenerateReply::Failed(error)) => self.end_sample(id, ClientResponse::Error(error)),
            Err(reason) => self.retry_sample(id, &reason),
        }
    }

    /// The same request, weights and seed on another replica.
    fn retry_sample(&mut self, id: RequestId, reason: &str) {
        self.leave_replica(id);
        let now_ms = self.now_ms;
        let Some(sample) = self.samples.get_mut(&id) else { return };
        sample.tries += 1;
        sample.last_failure = reason.to_owned();
        if sample.tries >= TRIES_MAX {
            let refusal = Refusal::TriesExhausted { tries: sample.tries, last: reason.to_owned() };
            return self.end_sample(id, ClientResponse::Error(refusal.into()));
        }
        sample.place = Place::Node { since_ms: now_ms };
        self.dispatch(id);
    }

    /// What a lost node was generating goes elsewhere.
    pub(super) fn retry_samples_of(&mut self, node: NodeId, reason: &str) {
        let there = self
            .samples
            .iter()
            .filter(|(_, s)| matches!(s.place, Place::Replica { node: n, .. } if n == node));
        for id in there.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.effects.push(Effect::CancelGenerate { request: id });
            self.retry_sample(id, reason);
        }
    }

    /// Nobody waits for the answer any more.
    pub(super) fn cancel_sample(&mut self, waiter: WaiterId) {
        let gone = self.samples.iter().find(|(_, sample)| sample.waiter == waiter).map(|(id, _)| *id);
        if let Some(id) = gone {
            self.drop_sample(id);
        }
        self.held.retain(|held| held.waiter != waiter);
    }

    /// After anything that may have brought a version or a node that somebody waits for.
    pub(super) fn dispatch_waiting(&mut self) {
        for id in std::mem::take(&mut self.waiting) {
            self.dispatch(id);
        }
    }

    /// Requests that have waited long enough.
    pub(super) fn expire_samples(&mut self) {
        let now_ms = self.now_ms;
        let generate_ms = ms(self.limits.generate_deadline);
        let late = self.samples.iter().filter_map(|(id, sample)| {
            let (since_ms, limit_ms) = match sample.place {
                Place::Version { since_ms, .. } => (since_ms, VERSION_WAIT_MS),
                Place::Node { since_ms } => (since_ms, NODE_WAIT_MS),
                Place::Room { since_ms } | Place::Replica { since_ms, .. } => (since_ms, generate_ms),
            };
            let waited_ms = now_ms.saturating_sub(since_ms);
            (waited_ms >= limit_ms).then(|| (*id, self.lateness(sample, waited_ms)))
        });
        for (id, refusal) in late.collect::<Vec<_>>() {
            if let Some(waiter) = self.drop_sample(id) {
                self.refuse(waiter, refusal);
            }
        }
    }

    /// Requests for versions that a run will never have.
    pub(super) fn drop_samples_waiting_for(&mut self, id: RunId) {
        let waits = |sample: &Sample| matches!(sample.place, Place::Version { run, .. } if run == id);
        let waiting = self.samples.iter().filter(|(_, sample)| waits(sample)).map(|(id, _)| *id);
        for request in waiting.collect::<Vec<_>>() {
            if let Some(waiter) = self.drop_sample(request) {
                self.refuse(waiter, Refusal::UnknownRun(id));
            }
        }
    }

    fn lateness(&self, sample: &Sample, waited_ms: u64) -> Refusal {
        match sample.place {
            Place::Version { run, floor, .. } => {
                let live = self.runs.get(&run).and_then(|run| run.live_from(0)).map(|live| live.step);
                Refusal::VersionBehind { run, live, floor }
            }
            Place::Node { .. } if sample.tries > 0 => {
                Refusal::TriesExhausted { tries: sample.tries, last: sample.last_failure.clone() }
            }
            Place::Node { .. } => Refusal::NoSampler { model: sample.generate.base_model.clone(), waited_ms },
            Place::Room { .. } | Place::Replica { .. } => Refusal::GenerateDeadline { waited_ms },
        }
    }

    fn end_sample(&mut self, id: RequestId, response: ClientResponse) {
        self.leave_replica(id);
        if let Some(sample) = self.samples.remove(&id) {
            self.pin(sample.generate.policy, -1);
            self.respond(sample.waiter, response);
        }
        self.fill_room();
    }

    /// Forgets a request, also on the replica that has it; returns who waits for it.
    fn drop_sample(&mut self, id: RequestId) -> Option<WaiterId> {
        if self.leave_replica(id) {
            self.effects.push(Effect::CancelGenerate { request: id });
        }
        self.waiting.remove(&id);
        let sample = self.samples.remove(&id)?;
        self.pin(sample.generate.policy, -1);
        self.fill_room();
        Some(sample.waiter)
    }

    /// Takes a request off its node's count; says whether it was on one.
    fn leave_replica(&mut self, id: RequestId) -> bool {
        let Some(sample) = self.samples.get_mut(&id) else { return false };
        let Place::Replica { node, .. } = sample.place else { return false };
        sample.place = Place::Node { since_ms: self.now_ms };
        if let Some(node) = self.nodes.get_mut(&node) {
            node.generating -= 1;
            node.generating_tokens -= sample.generate.prompt.len();
        }
        true
    }

    /// Counts requests that hold a policy in the replicas' memory.
    fn pin(&mut self, policy: Option<PolicyId>, change: isize) {
        if let Some(policy) = policy {
            let served = self.policies.served.entry(policy).or_default();
            served.pins = served.pins.saturating_add_signed(change);
            served.last_used_ms = self.now_ms;
        }
    }

    /// Requests on a node with their prompts' tokens, and pins of a policy, as counted from the
    /// requests themselves.
    pub(super) fn counted_samples(&self, node: NodeId) -> (usize, usize) {
        let there = |s: &&Sample| matches!(s.place, Place::Replica { node: n, .. } if n == node);
        let prompts = self.samples.values().filter(there).map(|s| s.generate.prompt.len());
        prompts.fold((0, 0), |(requests, tokens), prompt| (requests + 1, tokens + prompt))
    }

    pub(super) fn counted_pins(&self, policy: PolicyId) -> usize {
        self.samples.values().filter(|s| s.generate.policy == Some(policy)).count()
    }

    /// Whether a request is in neither place where somebody would look after it.
    pub(super) fn is_stranded(&self, id: RequestId) -> bool {
        let on_replica = matches!(self.samples[&id].place, Place::Replica { .. });
        on_replica == self.waiting.contains(&id)
    }
}

/// Everything about a request that needs no weights.
fn checked_prompt(request: &SampleRequest, offer: &ModelOffer) -> Result<Vec<u32>, Refusal> {
    admission::in_range("num_samples", request.num_samples, 1, NUM_SAMPLES_MAX)?;
    request.params.validate()?;
    request.flags.validate()?;
    Ok(admission::prompt(request.prompt.clone(), offer.vocab, offer.context)?)
}

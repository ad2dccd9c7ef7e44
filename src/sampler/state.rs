//! What a replica decides: whom it admits, which weights serve whom, what the next step computes.
//!
//! Pure: events in, effects out. At most one step is with the compute thread at a time; what
//! arrives meanwhile waits for the next one, so a step is where requests join, leave and advance.
//! Weights, caches and tokens are not here: the state knows them by key, and the compute thread
//! tells what ended.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    protocol::{Generate, GenerateReply},
    types::{OperationError, PolicyId, SampleResult},
};

use super::{
    ReplicaReport,
    budget::{self, ModelFacts},
    error::SamplerError,
    schedule::{self, Capacity, ModelIndex, RequestKey, Step, Work},
    slots::{Fate, Slots, Staging},
};

/// Most requests that wait to begin: a few steps of training's rollouts. More is answered at once.
pub const MAX_QUEUED: usize = 1024;

/// Most prompt tokens of requests that wait to begin (16 MiB of ids).
pub const MAX_QUEUED_TOKENS: usize = 4 << 20;

/// What happens to a replica.
#[derive(Debug)]
pub enum Event {
    /// A request has arrived; keys rise.
    Sample { key: RequestKey, generate: Generate },
    /// Nobody waits for the answer any more.
    Cancelled(RequestKey),
    /// A policy's bytes are here, unverified.
    Stage { policy: PolicyId, base_model: String, adapter: Bytes },
    /// The coordinator's word: serve it.
    Activate(PolicyId),
    /// No new requests for it.
    Retire(PolicyId),
    /// Answers [`Effect::LoadModel`].
    ModelLoaded { model: ModelIndex, outcome: Result<(), SamplerError> },
    /// Answers [`Effect::Verify`]; the weights are held until [`Effect::Forget`].
    Verified { policy: PolicyId, outcome: Result<(), SamplerError> },
    /// Answers [`Effect::Step`].
    StepDone(StepReport),
    /// A thread of the replica has panicked.
    Died { reason: String },
}

/// What a replica does about it.
#[derive(Debug)]
pub enum Effect {
    /// Read the model's weights; at most once at a time for each.
    LoadModel(ModelIndex),
    /// Read and hash the bytes; at most [`MAX_VERIFYING`](super::slots::MAX_VERIFYING) at a time.
    Verify { policy: PolicyId, model: ModelIndex, adapter: Bytes },
    /// The policy's weights leave memory.
    Forget(PolicyId),
    /// Tell the node.
    Report(ReplicaReport),
    /// The one answer of a request.
    Answer { key: RequestKey, reply: GenerateReply },
    /// Hand the order to the compute thread, which has none.
    Step(Order),
    /// Everybody is answered: tell whoever hosts the replica.
    Die { reason: String },
}

/// One order to the compute thread, carried out from top to bottom.
#[derive(Debug, Default)]
pub struct Order {
    /// Forget these requests.
    pub drop: Vec<RequestKey>,
    /// Take these in.
    pub admit: Vec<Admission>,
    pub step: Step,
}

/// A request on its way to the compute thread.
#[derive(Debug)]
pub struct Admission {
    pub key: RequestKey,
    pub model: ModelIndex,
    /// New tokens of each sequence at most.
    pub new_tokens: usize,
    pub generate: Generate,
}

/// What a step has brought.
#[derive(Debug, Default)]
pub struct StepReport {
    /// Sequences that drew their last token.
    pub ended: Vec<(RequestKey, u32)>,
    /// Requests whose last sequence has ended, or that have failed; the compute thread has
    /// forgotten them.
    pub answers: Vec<(RequestKey, Result<SampleResult, SamplerError>)>,
}

/// One replica's decisions.
#[derive(Debug)]
pub struct SamplerState {
    replica: u32,
    capacity: Capacity,
    models: Vec<Model>,
    slots: Slots,
    requests: BTreeMap<RequestKey, Request>,
    /// The same keys as `requests`.
    works: BTreeMap<RequestKey, Work>,
    in_flight: Option<Step>,
    /// Requests that left while the compute thread knew them.
    leaving: Vec<RequestKey>,
    /// Which model's step comes next, if it has one.
    turn: ModelIndex,
    dead: Option<String>,
}

#[derive(Debug)]
struct Model {
    facts: ModelFacts,
    weights: Weights,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weights {
    Cold,
    Loading,
    Ready,
}

#[derive(Debug)]
struct Request {
    /// Pinned until the answer.
    policy: Option<PolicyId>,
    prompt_tokens: usize,
    new_tokens: usize,
    /// Until it is admitted.
    generate: Option<Generate>,
}

impl SamplerState {
    /// A replica with nothing loaded.
    pub fn new(replica: u32, capacity: Capacity, models: Vec<ModelFacts>) -> Self {
        Self {
            replica,
            capacity,
            models: models.into_iter().map(|facts| Model { facts, weights: Weights::Cold }).collect(),
            slots: Slots::default(),
            requests: BTreeMap::new(),
            works: BTreeMap::new(),
            in_flight: None,
            leaving: Vec::new(),
            turn: ModelIndex(0),
            dead: None,
        }
    }

    /// What `event` leads to.
    pub fn handle(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Sample { key, generate } => {
                if let Err(error) = self.enqueue(key, generate, &mut effects) {
                    effects.push(failed(key, error));
                }
            }
            Event::Cancelled(key) => self.cancel(key, &mut effects),
            Event::Stage { policy, base_model, adapter } => {
                let staged = self.stage(policy, &base_model, adapter, &mut effects);
                self.report_staging(policy, staged, &mut effects);
            }
            Event::Activate(policy) => self.activate(policy, &mut effects),
            Event::Retire(policy) => {
                let fate = self.slots.retire(policy);
                settle(policy, fate, &mut effects);
            }
            Event::ModelLoaded { model, outcome } => self.model_loaded(model, outcome, &mut effects),
            Event::Verified { policy, outcome } => self.verified(policy, outcome, &mut effects),
            Event::StepDone(report) => self.step_done(report, &mut effects),
            Event::Died { reason } => self.die(reason, &mut effects),
        }
        self.drive(&mut effects);
        effects
    }

    /// Takes a request into the queue, or says why not.
    fn enqueue(
        &mut self,
        key: RequestKey,
        generate: Generate,
        effects: &mut Vec<Effect>,
    ) -> Result<(), SamplerError> {
        if let Some(reason) = self.dead.clone() {
            return Err(SamplerError::Dead { reason });
        }
        self.check_queue()?;
        let model = self.model(&generate.base_model)?;
        let facts = &self.models[model.0].facts;
        let need = budget::check(facts, &generate, self.capacity.kv_bytes)?;
        let new_tokens = budget::new_tokens(facts, &generate);
        if let Some(policy) = generate.policy {
            self.pin(policy, model, effects)?;
        }
        self.load(model, effects);
        let (policy, prompt_tokens, samples) = (generate.policy, generate.prompt.len(), generate.num_samples);
        let prompt_rows = prompt_tokens - 1;
        let work =
            Work { model, need, admitted: false, prompt_rows, samples, waiting: samples, live: Vec::new() };
        self.works.insert(key, work);
        let request = Request { policy, prompt_tokens, new_tokens, generate: Some(generate) };
        self.requests.insert(key, request);
        Ok(())
    }

    fn check_queue(&self) -> Result<(), SamplerError> {
        let queued = self.requests.values().filter(|request| request.generate.is_some());
        let (requests, tokens) =
            queued.fold((0, 0), |(count, tokens), request| (count + 1, tokens + request.prompt_tokens));
        if requests < MAX_QUEUED && tokens < MAX_QUEUED_TOKENS {
            return Ok(());
        }
        let (max_requests, max_tokens) = (MAX_QUEUED, MAX_QUEUED_TOKENS);
        Err(SamplerError::QueueFull { requests, tokens, max_requests, max_tokens })
    }

    fn pin(
        &mut self,
        policy: PolicyId,
        model: ModelIndex,
        effects: &mut Vec<Effect>,
    ) -> Result<(), SamplerError> {
        let held_for = self.slots.pin(policy)?;
        if held_for == model {
            return Ok(());
        }
        let fate = self.slots.unpin(policy);
        settle(policy, fate, effects);
        let name = |model: ModelIndex| self.models[model.0].facts.name.clone();
        Err(SamplerError::OtherModel { policy, held_for: name(held_for), asked: name(model) })
    }

    fn model(&self, name: &str) -> Result<ModelIndex, SamplerError> {
        // As the library does: names differ in more than case.
        let is = |known: &String| known.eq_ignore_ascii_case(name);
        let answers = |facts: &ModelFacts| is(&facts.name) || facts.aliases.iter().any(is);
        let found = self.models.iter().position(|model| answers(&model.facts));
        found.map(ModelIndex).ok_or_else(|| SamplerError::UnknownModel {
            name: name.to_owned(),
            offered: self.models.iter().map(|model| model.facts.name.clone()).collect(),
        })
    }

    fn load(&mut self, model: ModelIndex, effects: &mut Vec<Effect>) {
        let weights = &mut self.models[model.0].weights;
        if *weights == Weights::Cold {
            *weights = Weights::Loading;
            effects.push(Effect::LoadModel(model));
        }
    }

    fn model_loaded(
        &mut self,
        model: ModelIndex,
        outcome: Result<(), SamplerError>,
        effects: &mut Vec<Effect>,
    ) {
        let Err(error) = outcome else {
            self.models[model.0].weights = Weights::Ready;
            return;
        };
        // The next request tries again: the files may be back by then.
        self.models[model.0].weights = Weights::Cold;
        let waiting = self.works.iter().filter(|(_, work)| work.model == model).map(|(&key, _)| key);
        for key in waiting.collect::<Vec<_>>() {
            effects.push(failed(key, error.clone()));
            self.finish(key, effects);
        }
    }

    /// Whether the policy is held already.
    fn stage(
        &mut self,
        policy: PolicyId,
        base_model: &str,
        adapter: Bytes,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, SamplerError> {
        if let Some(reason) = self.dead.clone() {
            return Err(SamplerError::Dead { reason });
        }
        let model = self.model(base_model)?;
        let staging = self.slots.stage(policy, model)?;
        if staging == Staging::Verify {
            // Whoever stages will sample: the base weights are read while nobody waits for them.
            self.load(model, effects);
            effects.push(Effect::Verify { policy, model, adapter });
        }
        Ok(staging == Staging::Held)
    }

    fn report_staging(&self, policy: PolicyId, held: Result<bool, SamplerError>, effects: &mut Vec<Effect>) {
        let replica = self.replica;
        effects.extend(match held {
            Ok(true) => Some(Effect::Report(ReplicaReport::Staged { replica, policy })),
            Ok(false) => None,
            Err(error) => {
                let error = OperationError::from(error);
                Some(Effect::Report(ReplicaReport::StageFailed { replica, policy, error }))
            }
        });
    }

    fn verified(&mut self, policy: PolicyId, outcome: Result<(), SamplerError>, effects: &mut Vec<Effect>) {
        let held = match outcome {
            Ok(()) => match self.slots.verified(policy) {
                Fate::Kept => Ok(true),
                Fate::Forgotten => {
                    effects.push(Effect::Forget(policy));
                    Err(SamplerError::UnknownPolicy { policy })
                }
            },
            Err(error) => {
                self.slots.failed(policy);
                Err(error)
            }
        };
        self.report_staging(policy, held, effects);
    }

    fn activate(&mut self, policy: PolicyId, effects: &mut Vec<Effect>) {
        let replica = self.replica;
        effects.push(Effect::Report(match self.slots.activate(policy) {
            Ok(()) => ReplicaReport::Activated { replica, policy },
            // What the node must know is the same: this replica does not hold the policy.
            Err(error) => ReplicaReport::StageFailed { replica, policy, error: error.into() },
        }));
    }

    fn cancel(&mut self, key: RequestKey, effects: &mut Vec<Effect>) {
        if self.works.get(&key).is_some_and(|work| work.admitted) {
            self.leaving.push(key);
        }
        self.finish(key, effects);
    }

    fn step_done(&mut self, report: StepReport, effects: &mut Vec<Effect>) {
        let step = self.in_flight.take().unwrap_or_default();
        for (key, rows) in step.prefill {
            if let Some(work) = self.works.get_mut(&key) {
                work.prompt_rows -= rows;
            }
        }
        for (key, sequence) in report.ended {
            if let Some(work) = self.works.get_mut(&key) {
                work.live.retain(|&live| live != sequence);
            }
        }
        for (key, outcome) in report.answers {
            // One that was cancelled meanwhile is unknown to both sides by now.
            self.leaving.retain(|&leaving| leaving != key);
            if self.requests.contains_key(&key) {
                effects.push(match outcome {
                    Ok(result) => Effect::Answer { key, reply: GenerateReply::Done(result) },
                    Err(error) => failed(key, error),
                });
                self.finish(key, effects);
            }
        }
    }

    /// Forgets a request and gives back what it held.
    fn finish(&mut self, key: RequestKey, effects: &mut Vec<Effect>) {
        self.works.remove(&key);
        let policy = self.requests.remove(&key).and_then(|request| request.policy);
        if let Some(policy) = policy {
            let fate = self.slots.unpin(policy);
            settle(policy, fate, effects);
        }
    }

    fn die(&mut self, reason: String, effects: &mut Vec<Effect>) {
        if self.dead.is_some() {
            return;
        }
        self.works.clear();
        for key in std::mem::take(&mut self.requests).into_keys() {
            effects.push(failed(key, SamplerError::Dead { reason: reason.clone() }));
        }
        self.dead = Some(reason.clone());
        effects.push(Effect::Die { reason });
    }

    /// Sends the compute thread its next order, if it is free and there is something to do.
    fn drive(&mut self, effects: &mut Vec<Effect>) {
        if self.dead.is_some() || self.in_flight.is_some() {
            return;
        }
        let models = &self.models;
        let ready = |model: ModelIndex| models[model.0].weights == Weights::Ready;
        let admitted = schedule::admit(&mut self.works, self.capacity, ready);
        let step = schedule::plan(&self.works, self.capacity, self.models.len(), self.turn);
        let drop = std::mem::take(&mut self.leaving);
        let admit = admitted.into_iter().filter_map(|key| self.admission(key)).collect();
        let order = Order { drop, admit, step };
        if order.is_empty() {
            return;
        }
        if let Some(model) = order.step.model {
            self.turn = ModelIndex(model.0 + 1);
        }
        self.in_flight = Some(order.step.clone());
        effects.push(Effect::Step(order));
    }

    fn admission(&mut self, key: RequestKey) -> Option<Admission> {
        let model = self.works.get(&key)?.model;
        let request = self.requests.get_mut(&key)?;
        let generate = request.generate.take()?;
        Some(Admission { key, model, new_tokens: request.new_tokens, generate })
    }
}

impl Order {
    fn is_empty(&self) -> bool {
        self.drop.is_empty() && self.admit.is_empty() && self.step.model.is_none()
    }
}

fn failed(key: RequestKey, error: SamplerError) -> Effect {
    Effect::Answer { key, reply: GenerateReply::Failed(error.into()) }
}

fn settle(policy: PolicyId, fate: Fate, effects: &mut Vec<Effect>) {
    if fate == Fate::Forgotten {
        effects.push(Effect::Forget(policy));
    }
}

#[cfg(test)]
mod tests;

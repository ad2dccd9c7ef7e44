//! A client that submits ahead, asks again with the same key, and checks every answer.

use std::collections::{BTreeMap, HashMap};

use lockstep::{
    coordinator::state::WaiterId,
    journal::Outcome,
    protocol::{
        ClientRequest, ClientResponse, CreateRun, Operation, OperationKey, OperationSeq, OperationStatus,
        Payload, SampleRequest, SampleTarget, SubmitOperation,
    },
    types::{
        AdamParams, Digest, EncodedTextChunk, ErrorKind, LoraConfig, LossFn, LossSpec, ModelInput,
        ModelInputChunk, OperationError, PolicyId, RunId, SampleFlags, SampleResult, SamplingParams,
        SessionId,
    },
};

use super::{
    dice::Dice,
    node::{MODEL, VOCAB},
    rank::{BAD_BATCH, INFINITE_BATCH},
    world::{World, key_of},
};

/// Submitted and not finished at once.
const AHEAD: usize = 12;

/// How far back it asks again.
const REMEMBERED: usize = 8;

pub struct ModelClient {
    index: usize,
    replicas: Option<u32>,
    session: Option<SessionId>,
    pub run: Option<RunId>,
    plan: Vec<Operation>,
    accepted: BTreeMap<usize, OperationSeq>,
    outcomes: BTreeMap<usize, OperationStatus>,
    /// Policies that it was given, and samples that it got.
    policies: Vec<PolicyId>,
    pub samples: usize,
    asked: HashMap<WaiterId, Asked>,
}

#[derive(Clone, PartialEq)]
enum Asked {
    Session,
    Run,
    Submit(usize),
    /// The same key for something else.
    Conflict(usize),
    Wait(usize),
    Sample(SampleTarget, Option<u64>),
    Info,
}

impl ModelClient {
    pub fn new(index: usize, operations: usize, dice: &mut Dice) -> Self {
        let mut plan = vec![Operation::Init { lora: LoraConfig::new(8, index as u64) }];
        while plan.len() < operations {
            plan.push(operation(plan.len(), dice));
        }
        Self {
            index,
            replicas: Some(1 + dice.below(3) as u32).filter(|_| dice.below(2) == 0),
            session: None,
            run: None,
            plan,
            accepted: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            policies: Vec::new(),
            samples: 0,
            asked: HashMap::new(),
        }
    }

    pub fn is_done(&self) -> bool {
        self.outcomes.len() == self.plan.len()
    }

    pub fn disconnected(&mut self) {
        self.asked.clear();
    }

    /// Asks for what it needs next.
    pub fn step(world: &mut World, index: usize) {
        let World { clients, dice, .. } = world;
        let client = &mut clients[index];
        let Some((request, asked)) = client.next(dice) else { return };
        if client.asked.values().any(|other| *other == asked) {
            return;
        }
        let waiter = world.ask(index, request);
        world.clients[index].asked.insert(waiter, asked);
    }

    fn next(&self, dice: &mut Dice) -> Option<(ClientRequest, Asked)> {
        let Some(session) = self.session else { return Some((ClientRequest::CreateSession, Asked::Session)) };
        let Some(run) = self.run else {
            let create = CreateRun {
                session,
                base_model: if self.index == 0 { "tiny".into() } else { MODEL.into() },
                lora: LoraConfig::new(8, 0),
                replicas: self.replicas,
                max_seq_len: None,
                micro_batch_tokens: None,
                name: None,
            };
            return Some((ClientRequest::CreateRun(create), Asked::Run));
        };
        match dice.below(10) {
            0..=4 => self.next_submit(run, dice),
            5..=7 => {
                let mut waits = (0..self.plan.len()).filter(|i| !self.outcomes.contains_key(i)).peekable();
                // A result is kept for so long, not for ever.
                let urgent = waits.peek().is_some_and(|i| i + REMEMBERED < self.accepted.len());
                let among = if urgent { 1 } else { 1 + dice.below(3) as usize };
                let i = waits.take(among).last()?;
                let seq = *self.accepted.get(&i)?;
                let hold_ms = dice.below(3_000) as u32;
                Some((ClientRequest::WaitOperation { run, seq, hold_ms }, Asked::Wait(i)))
            }
            8 => Some((ClientRequest::RunInfo { run }, Asked::Info)),
            _ => self.next_sample(run, dice),
        }
    }

    /// The next operation, or one that was submitted before.
    fn next_submit(&self, run: RunId, dice: &mut Dice) -> Option<(ClientRequest, Asked)> {
        let submitting = self.asked.values().any(|asked| matches!(asked, Asked::Submit(_)));
        let next = self.accepted.len();
        let again = next > 0 && dice.below(8) == 0;
        let recent = next.min(REMEMBERED) as u64;
        let i = if again { next - 1 - dice.below(recent) as usize } else { next };
        let ahead = self.accepted.len() - self.outcomes.len().min(self.accepted.len());
        if submitting || i >= self.plan.len() || (!again && ahead >= AHEAD) {
            return None;
        }
        let key = OperationKey(key_of(self.index, i));
        if again && dice.below(3) == 0 {
            let operation = Operation::SaveState { name: "another".into(), ttl_seconds: None };
            return Some((
                ClientRequest::Submit(SubmitOperation { run, key, operation }),
                Asked::Conflict(i),
            ));
        }
        let operation = self.plan[i].clone();
        Some((ClientRequest::Submit(SubmitOperation { run, key, operation }), Asked::Submit(i)))
    }

    fn next_sample(&self, run: RunId, dice: &mut Dice) -> Option<(ClientRequest, Asked)> {
        let target = match (dice.below(3), self.policies.is_empty()) {
            (0, _) => SampleTarget::Base { base_model: MODEL.into() },
            (1, _) => SampleTarget::Live { run, min_version: dice.below(3) },
            (_, true) => return None,
            (_, false) => {
                SampleTarget::Policy(self.policies[dice.below(self.policies.len() as u64) as usize])
            }
        };
        let seed = Some(dice.below(1 << 40)).filter(|seed| seed % 2 == 0);
        let tokens = vec![dice.below(u64::from(VOCAB)) as u32];
        let request = SampleRequest {
            target: target.clone(),
            prompt: ModelInput { chunks: vec![ModelInputChunk::EncodedText(EncodedTextChunk { tokens })] },
            num_samples: 1 + dice.below(4) as u32,
            params: SamplingParams { seed, ..SamplingParams::default() },
            flags: SampleFlags::default(),
        };
        Some((ClientRequest::Sample(request), Asked::Sample(target, seed)))
    }

    /// What must hold at the moment in which the coordinator answers.
    pub fn check_said(world: &World, index: usize, waiter: WaiterId, response: &ClientResponse) {
        let client = &world.clients[index];
        let (Some(asked), Some(run)) = (client.asked.get(&waiter), client.run) else { return };
        match (asked, response) {
            (Asked::Submit(i), ClientResponse::Accepted { seq }) => {
                let durable = world.journal.operation(run, *seq);
                let durable = durable.unwrap_or_else(|| panic!("{run}: operation {} is not durable", seq.0));
                assert_eq!(name(durable), name(&client.plan[*i]));
            }
            (Asked::Wait(i), ClientResponse::Operation(OperationStatus::Done(result))) => {
                let seq = client.accepted[i];
                match world.journal.outcome(run, seq) {
                    Some(Outcome::Done { result: durable, .. }) => assert_eq!(durable, result),
                    other => panic!("{run}: operation {} was reported done, and is {other:?}", seq.0),
                }
                if let Some(policy) = world.journal.published_by(run, seq) {
                    // One of an earlier life may have been reported then, so it is reported in the end.
                    let given_up =
                        world.journal.is_recovered(run, seq) && world.has_publish_deadline_passed();
                    let served = world.is_confirmed(&policy);
                    assert!(served || given_up, "{policy} was reported and nobody serves it");
                }
            }
            (Asked::Wait(i), ClientResponse::Operation(OperationStatus::Failed(error))) => {
                let seq = client.accepted[i];
                let durable = world.journal.outcome(run, seq);
                assert_eq!(durable, Some(&Outcome::Failed { error: error.clone() }));
            }
            _ => {}
        }
    }

    /// An answer arrives.
    pub fn hear(world: &mut World, index: usize, waiter: WaiterId, response: ClientResponse) {
        let client = &mut world.clients[index];
        let Some(asked) = client.asked.remove(&waiter) else { return };
        match (asked, response) {
            (Asked::Session, ClientResponse::Session(session)) => client.session = Some(session),
            (Asked::Run, ClientResponse::Run(info)) => {
                assert_eq!(info.base_model, MODEL, "an alias is answered with the name");
                client.run = Some(info.run);
            }
            // While nodes restart, the cluster may be too small for what it could do before.
            (Asked::Run, ClientResponse::Error(error)) => {
                let transient =
                    [ErrorKind::InvalidInput, ErrorKind::Unavailable, ErrorKind::ResourceExhausted];
                assert!(transient.contains(&error.kind), "{error:?}");
                client.replicas = None;
            }
            (Asked::Submit(i), ClientResponse::Accepted { seq }) => {
                assert_eq!(*client.accepted.entry(i).or_insert(seq), seq, "one key, two numbers");
                let seqs: Vec<_> = client.accepted.values().collect();
                assert!(seqs.is_sorted(), "accepted out of order");
                assert!(client.accepted.keys().copied().eq(0..seqs.len()), "accepted out of order");
            }
            (Asked::Conflict(i), ClientResponse::Error(error)) => {
                let taken =
                    client.plan[i] != Operation::SaveState { name: "another".into(), ttl_seconds: None };
                let refused = [ErrorKind::InvalidInput, ErrorKind::Unavailable].contains(&error.kind);
                assert!(refused && taken, "{error:?}");
            }
            (Asked::Wait(_), ClientResponse::Operation(OperationStatus::Pending)) => {}
            (Asked::Wait(i), ClientResponse::Operation(status)) => {
                if let OperationStatus::Failed(error) = &status {
                    check_failure(&client.plan[i], error);
                }
                let first = client.outcomes.entry(i).or_insert_with(|| status.clone());
                assert_eq!(*first, status, "an outcome changed");
            }
            (Asked::Sample(target, seed), ClientResponse::Sample { result, policy }) => {
                check_sample(&target, seed, &result, policy);
                client.samples += 1;
            }
            (Asked::Info, ClientResponse::Run(info)) => {
                let published = [info.initial, info.live].into_iter().flatten();
                let new: Vec<_> = published.filter(|policy| !client.policies.contains(policy)).collect();
                client.policies.extend(new);
            }
            (Asked::Sample(SampleTarget::Policy(policy), _), ClientResponse::Error(error))
                if error.kind == ErrorKind::NotFound =>
            {
                client.policies.retain(|known| *known != policy);
                assert!(!world.journal.keeps(policy), "{policy} is kept: {error}");
            }
            (asked, ClientResponse::Error(error)) => {
                let transient = match asked {
                    Asked::Sample(..) => [ErrorKind::Unavailable, ErrorKind::DeadlineExceeded].as_slice(),
                    _ => [ErrorKind::ResourceExhausted, ErrorKind::Unavailable].as_slice(),
                };
                assert!(transient.contains(&error.kind), "{error:?}");
            }
            (_, response) => panic!("an answer to another question: {response:?}"),
        }
    }
}

fn check_sample(target: &SampleTarget, seed: Option<u64>, result: &SampleResult, policy: Option<PolicyId>) {
    match target {
        SampleTarget::Base { .. } => assert_eq!(policy, None),
        SampleTarget::Live { run, min_version } => {
            let policy = policy.expect("a live policy");
            assert!(policy.run == *run && policy.step >= *min_version, "{policy} is behind {min_version}");
        }
        SampleTarget::Policy(wanted) => assert_eq!(policy, Some(*wanted)),
        SampleTarget::Checkpoint { .. }
        | SampleTarget::Initial { .. }
        | SampleTarget::LiveOrCheckpoint { .. } => panic!("never asked"),
    }
    assert_eq!(result.policy_version, policy.map_or(0, |policy| policy.step));
    let Some(seed) = seed else { return };
    // Whatever replica it ran on, and however often it was tried.
    let digest = policy.map_or(Digest::of(b"base"), |policy| policy.digest);
    let mixed = Digest::of(&[&digest.0[..], &seed.to_le_bytes()].concat());
    assert_eq!(result.sequences[0].tokens[0], u32::from(mixed.0[0]) % VOCAB, "another seed or other weights");
}

fn check_failure(operation: &Operation, error: &OperationError) {
    let legal = match operation {
        Operation::OptimStep { .. } => [ErrorKind::NotFinite, ErrorKind::Unavailable],
        Operation::LoadState { .. } => [ErrorKind::NotFound, ErrorKind::Unavailable],
        _ => [ErrorKind::InvalidInput, ErrorKind::Unavailable],
    };
    assert!(legal.contains(&error.kind), "{operation:?} failed: {error:?}");
    if error.kind == ErrorKind::Unavailable {
        assert!(error.message.contains("node"), "names no node: {error}");
    }
}

fn operation(number: usize, dice: &mut Dice) -> Operation {
    let batch =
        |first: u8, dice: &mut Dice| Payload::Inline(vec![first, dice.below(256) as u8, number as u8]);
    let loss = LossSpec::new(LossFn::CrossEntropy);
    // Names repeat, so that some are replaced and some loads find nothing.
    let name = |dice: &mut Dice| format!("save{}", dice.below(4));
    match dice.below(100) {
        0..=39 => Operation::ForwardBackward { loss, data: batch(1, dice) },
        40..=44 => Operation::ForwardBackward { loss, data: batch(BAD_BATCH, dice) },
        45..=49 => Operation::ForwardBackward { loss, data: batch(INFINITE_BATCH, dice) },
        50..=53 => Operation::Forward { loss, data: batch(1, dice) },
        54..=73 => Operation::OptimStep { adam: AdamParams::default() },
        74..=78 => Operation::SaveState { name: name(dice), ttl_seconds: None },
        79..=89 => Operation::SaveWeightsForSampler {
            name: format!("step{number}"),
            publish: true,
            ttl_seconds: None,
        },
        90..=92 => Operation::SaveWeightsForSampler { name: name(dice), publish: false, ttl_seconds: None },
        93..=97 => {
            let kind = if dice.below(2) == 0 { "weights" } else { "sampler_weights" };
            let path = format!("bt://loops:run-{}/{kind}/{}", 1 + dice.below(2), name(dice));
            Operation::LoadState {
                path,
                with_optimizer: kind == "weights" && dice.below(2) == 0,
                source: None,
            }
        }
        _ => Operation::Init { lora: LoraConfig::new(4, number as u64) },
    }
}

fn name(operation: &Operation) -> std::mem::Discriminant<Operation> {
    std::mem::discriminant(operation)
}

use std::collections::BTreeSet;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::*;
use crate::{
    sampler::{
        budget::tests::{facts, generate},
        schedule::reserved_bytes,
        slots::tests::policy,
    },
    types::{ErrorKind, SampledSequence, StopReason},
};

const CAPACITY: Capacity = Capacity { max_batch: 6, kv_bytes: 2000, prefill_rows: 256 };

fn other_facts() -> ModelFacts {
    ModelFacts { name: "other".into(), aliases: vec![], ..facts() }
}

fn state() -> SamplerState {
    SamplerState::new(3, CAPACITY, vec![facts(), other_facts()])
}

/// A state whose first model is loaded and which serves `policy(1)`.
fn serving() -> SamplerState {
    let mut state = state();
    state.handle(Event::Stage { policy: policy(1), base_model: "tiny".into(), adapter: Bytes::new() });
    state.handle(Event::ModelLoaded { model: ModelIndex(0), outcome: Ok(()) });
    state.handle(Event::Verified { policy: policy(1), outcome: Ok(()) });
    state.handle(Event::Activate(policy(1)));
    state
}

fn sample(key: u64, generate: Generate) -> Event {
    Event::Sample { key: RequestKey(key), generate }
}

fn with_policy(generate: Generate, step: u64) -> Generate {
    Generate { policy: Some(policy(step)), ..generate }
}

fn answers(effects: &[Effect]) -> Vec<(u64, Result<(), ErrorKind>)> {
    let answer = |effect: &Effect| match effect {
        Effect::Answer { key, reply: GenerateReply::Done(_) } => Some((key.0, Ok(()))),
        Effect::Answer { key, reply: GenerateReply::Failed(error) } => Some((key.0, Err(error.kind))),
        _ => None,
    };
    effects.iter().filter_map(answer).collect()
}

fn order(effects: Vec<Effect>) -> Option<Order> {
    effects.into_iter().find_map(|effect| match effect {
        Effect::Step(order) => Some(order),
        _ => None,
    })
}

fn result() -> SampleResult {
    let sequence = SampledSequence { tokens: vec![], logprobs: None, stop_reason: StopReason::Stop };
    SampleResult {
        sequences: vec![sequence],
        policy_version: 0,
        prompt_logprobs: None,
        topk_prompt_logprobs: None,
    }
}

fn done(ended: &[(u64, u32)], answered: &[u64]) -> Event {
    Event::StepDone(StepReport {
        ended: ended.iter().map(|&(key, sequence)| (RequestKey(key), sequence)).collect(),
        answers: answered.iter().map(|&key| (RequestKey(key), Ok(result()))).collect(),
    })
}

#[test]
fn a_request_waits_for_its_model_then_runs_to_its_answer() {
    let mut state = state();
    let effects = state.handle(sample(1, generate(5, 2, 3)));
    assert!(matches!(effects[..], [Effect::LoadModel(ModelIndex(0))]), "{effects:?}");
    let effects = state.handle(sample(2, generate(1, 1, 1)));
    assert!(effects.is_empty(), "a model is loaded once: {effects:?}");

    let first = order(state.handle(Event::ModelLoaded { model: ModelIndex(0), outcome: Ok(()) }));
    let first = first.expect("both begin");
    assert_eq!(first.admit.iter().map(|a| (a.key.0, a.new_tokens)).collect::<Vec<_>>(), [(1, 3), (2, 1)]);
    assert_eq!(first.step.prefill, [(RequestKey(1), 4)]);
    assert_eq!(first.step.decode, [(RequestKey(2), 0)]);

    let effects = state.handle(done(&[(2, 0)], &[2]));
    assert_eq!(answers(&effects), [(2, Ok(()))]);
    assert_eq!(order(effects).expect("goes on").step.decode, [(RequestKey(1), 0), (RequestKey(1), 1)]);
    let next = order(state.handle(done(&[(1, 0)], &[]))).expect("goes on");
    assert_eq!(next.step.decode, [(RequestKey(1), 1)]);
    let effects = state.handle(done(&[(1, 1)], &[1]));
    assert_eq!(answers(&effects), [(1, Ok(()))]);
    assert!(order(effects).is_none(), "nothing is left to compute");
}

#[test]
fn a_model_that_does_not_load_fails_those_who_wait_and_is_tried_again() {
    let mut state = state();
    state.handle(sample(1, generate(5, 1, 3)));
    let error = SamplerError::ModelUnavailable { name: "tiny".into(), problem: "truncated".into() };
    let effects = state.handle(Event::ModelLoaded { model: ModelIndex(0), outcome: Err(error) });
    assert_eq!(answers(&effects), [(1, Err(ErrorKind::Internal))]);
    let effects = state.handle(sample(2, generate(5, 1, 3)));
    assert!(matches!(effects[..], [Effect::LoadModel(_)]));
}

#[test]
fn unknown_names_are_answered_at_once() {
    let mut state = serving();
    let effects = state.handle(sample(1, Generate { base_model: "gpt".into(), ..generate(5, 1, 3) }));
    assert_eq!(answers(&effects), [(1, Err(ErrorKind::NotFound))]);
    let effects = state.handle(sample(2, with_policy(generate(5, 1, 3), 9)));
    assert_eq!(answers(&effects), [(2, Err(ErrorKind::NotFound))]);
    let other = Generate { base_model: "other".into(), ..with_policy(generate(5, 1, 3), 1) };
    let effects = state.handle(sample(3, other));
    assert_eq!(answers(&effects), [(3, Err(ErrorKind::InvalidInput))]);
    // Aliases count, in any case; the mistaken pin above is gone.
    let alias = Generate { base_model: "SMALL".into(), ..with_policy(generate(5, 1, 3), 1) };
    assert!(order(state.handle(sample(4, alias))).is_some());
}

#[test]
fn staging_is_reported_with_its_outcome() {
    let mut state = state();
    let stage = || Event::Stage { policy: policy(1), base_model: "tiny".into(), adapter: Bytes::new() };
    let effects = state.handle(stage());
    assert!(matches!(effects[..], [Effect::LoadModel(_), Effect::Verify { .. }]), "{effects:?}");
    let found = policy(2).digest;
    let mismatch = SamplerError::DigestMismatch { policy: policy(1), found };
    let effects = state.handle(Event::Verified { policy: policy(1), outcome: Err(mismatch) });
    let [Effect::Report(ReplicaReport::StageFailed { replica: 3, error, .. })] = &effects[..] else {
        panic!("{effects:?}");
    };
    for digest in [policy(1).digest, found] {
        assert!(error.message.contains(&digest.to_string()), "{error}");
    }

    let effects = state.handle(Event::Activate(policy(1)));
    assert!(matches!(effects[..], [Effect::Report(ReplicaReport::StageFailed { .. })]), "{effects:?}");
    let effects = state.handle(stage());
    assert!(matches!(effects[..], [Effect::Verify { .. }]), "{effects:?}");
    let effects = state.handle(Event::Verified { policy: policy(1), outcome: Ok(()) });
    assert!(matches!(effects[..], [Effect::Report(ReplicaReport::Staged { .. })]), "{effects:?}");
    let effects = state.handle(Event::Activate(policy(1)));
    assert!(matches!(effects[..], [Effect::Report(ReplicaReport::Activated { .. })]), "{effects:?}");
    let effects = state.handle(stage());
    assert!(matches!(effects[..], [Effect::Report(ReplicaReport::Staged { .. })]), "held: {effects:?}");
}

#[test]
fn a_retired_policy_stays_for_those_it_admitted() {
    let mut state = serving();
    state.handle(sample(1, with_policy(generate(1, 1, 3), 1)));
    // This one is only queued behind the step in flight: it was admitted all the same.
    state.handle(sample(2, with_policy(generate(1, 1, 3), 1)));
    assert!(state.handle(Event::Retire(policy(1))).is_empty());
    let effects = state.handle(sample(3, with_policy(generate(1, 1, 3), 1)));
    assert_eq!(answers(&effects), [(3, Err(ErrorKind::NotFound))]);
    let forgets = |effects: &[Effect]| effects.iter().any(|e| matches!(e, Effect::Forget(_)));
    assert!(!forgets(&state.handle(done(&[(1, 0)], &[1]))));
    assert!(forgets(&state.handle(done(&[(2, 0)], &[2]))));
}

#[test]
fn a_cancelled_request_leaves_with_the_next_order() {
    let mut state = serving();
    state.handle(sample(1, generate(1, 1, 30)));
    state.handle(sample(2, generate(1, 1, 30)));
    assert!(state.handle(Event::Cancelled(RequestKey(2))).is_empty(), "a step is in flight");
    assert!(state.handle(Event::Cancelled(RequestKey(1))).is_empty());
    let order = order(state.handle(done(&[], &[]))).expect("the thread must forget it");
    // The second never got that far.
    assert_eq!(order.drop, [RequestKey(1)]);
    assert_eq!(order.step, Step::default());
    assert!(state.handle(done(&[], &[])).is_empty());
}

#[test]
fn a_request_that_ends_in_the_step_of_its_cancellation_is_not_answered() {
    let mut state = serving();
    state.handle(sample(1, generate(1, 1, 1)));
    state.handle(Event::Cancelled(RequestKey(1)));
    assert!(state.handle(done(&[(1, 0)], &[1])).is_empty());
}

#[test]
fn the_queue_is_bounded_in_requests_and_in_tokens() {
    let mut state = state();
    for key in 0..MAX_QUEUED as u64 {
        assert!(answers(&state.handle(sample(key, generate(1, 1, 1)))).is_empty());
    }
    let effects = state.handle(sample(1 << 20, generate(1, 1, 1)));
    assert_eq!(answers(&effects), [(1 << 20, Err(ErrorKind::ResourceExhausted))]);

    let large = ModelFacts { context: 8 << 20, kv_position_bytes: 0, ..facts() };
    let mut state = SamplerState::new(0, CAPACITY, vec![large]);
    assert!(answers(&state.handle(sample(1, generate(MAX_QUEUED_TOKENS, 1, 1)))).is_empty());
    let effects = state.handle(sample(2, generate(1, 1, 1)));
    assert_eq!(answers(&effects), [(2, Err(ErrorKind::ResourceExhausted))]);
}

#[test]
fn death_answers_everybody_and_refuses_the_rest() {
    let mut state = serving();
    state.handle(sample(1, generate(1, 1, 3)));
    state.handle(sample(2, generate(1, 1, 3)));
    let effects = state.handle(Event::Died { reason: "index out of bounds".into() });
    assert_eq!(answers(&effects), [(1, Err(ErrorKind::Internal)), (2, Err(ErrorKind::Internal))]);
    assert!(matches!(effects.last(), Some(Effect::Die { .. })), "{effects:?}");
    assert_eq!(answers(&state.handle(sample(3, generate(1, 1, 3)))), [(3, Err(ErrorKind::Internal))]);
    assert!(state.handle(Event::Died { reason: "again".into() }).is_empty());
}

/// The compute thread's side, without computing: lengths only.
#[derive(Default)]
struct FakeThread {
    jobs: BTreeMap<RequestKey, FakeJob>,
}

struct FakeJob {
    prompt_rows: usize,
    /// New tokens that each sequence still draws.
    left: Vec<usize>,
}

impl FakeThread {
    fn carry_out(&mut self, order: Order, random: &mut ChaCha8Rng) -> StepReport {
        let mut report = StepReport::default();
        for key in order.drop {
            assert!(self.jobs.remove(&key).is_some(), "dropped a stranger");
        }
        for Admission { key, new_tokens, generate, .. } in order.admit {
            let left = vec![new_tokens; generate.num_samples as usize];
            self.jobs.insert(key, FakeJob { prompt_rows: generate.prompt.len() - 1, left });
        }
        for (key, rows) in order.step.prefill {
            self.jobs.get_mut(&key).expect("admitted").prompt_rows -= rows;
        }
        for (key, sequence) in order.step.decode {
            let job = self.jobs.get_mut(&key).expect("admitted");
            assert_eq!(job.prompt_rows, 0, "decodes before its prompt is computed");
            let left = &mut job.left[sequence as usize];
            assert!(*left > 0, "decodes past its end");
            *left -= 1;
            if random.next_u32().is_multiple_of(7) {
                *left = 0;
            }
            if *left == 0 {
                report.ended.push((key, sequence));
            }
        }
        let over = |job: &FakeJob| job.prompt_rows == 0 && job.left.iter().all(|&left| left == 0);
        for (key, _) in self.jobs.extract_if(.., |_, job| over(job)) {
            report.answers.push((key, Ok(result())));
        }
        report
    }
}

/// Random requests, cancellations and publishes; every request is answered once or was
/// cancelled, in bounds after every event, and what is forgotten is used by nobody.
fn simulate(seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut state = state();
    let mut thread = FakeThread::default();
    let mut pending: Vec<Event> = Vec::new();
    let (mut open, mut answered) = (BTreeSet::new(), 0);
    let mut serves: BTreeMap<u64, PolicyId> = BTreeMap::new();
    let requests = 120;
    let mut key = 0;
    while key < requests || !open.is_empty() || !pending.is_empty() {
        let choice = random.next_u32() % 10;
        let event = match choice {
            0..4 if key < requests => {
                key += 1;
                open.insert(key);
                let roll = random.next_u32();
                let mut request = generate(1 + roll as usize % 50, 1 + roll / 64 % 9, 1 + roll / 1024 % 12);
                request.base_model = if roll.is_multiple_of(5) { "other".into() } else { "tiny".into() };
                request.policy = (roll.is_multiple_of(3)).then(|| policy(u64::from(roll % 4)));
                if let Some(policy) = request.policy {
                    serves.insert(key, policy);
                }
                sample(key, request)
            }
            4 => {
                let Some(&cancelled) = open.iter().nth(random.next_u32() as usize % open.len().max(1)) else {
                    continue;
                };
                open.remove(&cancelled);
                serves.remove(&cancelled);
                Event::Cancelled(RequestKey(cancelled))
            }
            5 => match random.next_u32() % 3 {
                0 => {
                    let step = u64::from(random.next_u32() % 4);
                    Event::Stage { policy: policy(step), base_model: "tiny".into(), adapter: Bytes::new() }
                }
                1 => Event::Activate(policy(u64::from(random.next_u32() % 4))),
                _ => Event::Retire(policy(u64::from(random.next_u32() % 4))),
            },
            _ if !pending.is_empty() => pending.swap_remove(random.next_u32() as usize % pending.len()),
            _ => continue,
        };
        for effect in state.handle(event) {
            match effect {
                Effect::LoadModel(model) => pending.push(Event::ModelLoaded { model, outcome: Ok(()) }),
                Effect::Verify { policy, .. } => pending.push(Event::Verified { policy, outcome: Ok(()) }),
                Effect::Step(order) => {
                    let report = thread.carry_out(order, &mut random);
                    assert!(!pending.iter().any(|e| matches!(e, Event::StepDone(_))), "two steps at once");
                    pending.push(Event::StepDone(report));
                }
                Effect::Answer { key, .. } => {
                    assert!(open.remove(&key.0), "seed {seed}: request {} has a second answer", key.0);
                    serves.remove(&key.0);
                    answered += 1;
                }
                Effect::Forget(policy) => {
                    assert!(serves.values().all(|&p| p != policy), "seed {seed}: {policy} is in use");
                }
                Effect::Report(_) => {}
                Effect::Die { reason } => panic!("seed {seed}: {reason}"),
            }
        }
        assert!(reserved_bytes(&state.works) <= CAPACITY.kv_bytes, "seed {seed}: over the KV budget");
        let live: usize = state.works.values().map(|work| work.live.len()).sum();
        assert!(live <= CAPACITY.max_batch, "seed {seed}: {live} sequences at once");
        assert!(state.works.keys().eq(state.requests.keys()), "seed {seed}");
    }
    assert!(answered > 40, "seed {seed}: only {answered} answers");
    assert!(state.works.is_empty());
}

#[test]
fn random_histories_stay_in_bounds_and_answer_everybody() {
    for seed in 0..60 {
        simulate(seed);
    }
}

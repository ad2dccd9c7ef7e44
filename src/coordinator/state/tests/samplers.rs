//! Publishing and sampling.

use crate::{
    coordinator::state::{Effect, Event, sampling::HANDED_MAX},
    protocol::{
        ClientRequest, ClientResponse, CoordinatorMessage, GenerateReply, NodeId, NodeMessage, SampleRequest,
        SampleTarget,
    },
    types::{
        EncodedTextChunk, ErrorKind, ImageChunk, ImageFormat, ModelInput, ModelInputChunk, OperationError,
        PolicyId, SampleFlags, SampleResult, SampledSequence, SamplingParams, StopReason,
    },
};

use super::desk::{Desk, MODEL, RUN, optim_step, publish};

pub(super) fn request(target: SampleTarget) -> SampleRequest {
    SampleRequest {
        target,
        prompt: text(vec![1, 2, 3]),
        num_samples: 2,
        params: SamplingParams::default(),
        flags: SampleFlags::default(),
    }
}

fn text(tokens: Vec<u32>) -> ModelInput {
    ModelInput { chunks: vec![ModelInputChunk::EncodedText(EncodedTextChunk { tokens })] }
}

fn base() -> SampleTarget {
    SampleTarget::Base { base_model: MODEL.to_owned() }
}

pub(super) fn reply(version: u64) -> Result<GenerateReply, String> {
    let sequence = SampledSequence { tokens: vec![4], logprobs: None, stop_reason: StopReason::Length };
    Ok(GenerateReply::Done(SampleResult {
        sequences: vec![sequence; 2],
        policy_version: version,
        prompt_logprobs: None,
        topk_prompt_logprobs: None,
    }))
}

/// Answers the requests that replicas have.
fn serve(desk: &mut Desk) {
    for (_, attempt, generate) in std::mem::take(&mut desk.generated) {
        let version = generate.policy.map_or(0, |policy| policy.step);
        desk.feed(Event::Generated { request: generate.request, attempt, reply: reply(version) });
    }
}

pub(super) fn live(desk: &mut Desk) -> Option<PolicyId> {
    match desk.asked(ClientRequest::RunInfo { run: RUN }) {
        ClientResponse::Run(info) => info.live.or(info.initial),
        other => panic!("no run: {other:?}"),
    }
}

fn staged_policy(desk: &Desk) -> PolicyId {
    let staged = desk.sent.iter().find_map(|(_, message)| match message {
        CoordinatorMessage::Stage { policy, .. } => Some(*policy),
        _ => None,
    });
    staged.expect("a policy is staged")
}

/// A desk whose run has taken a step, and whose publish waits for two nodes.
fn publishing() -> (Desk, crate::coordinator::state::WaiterId, PolicyId) {
    let mut desk = Desk::with_run(&[(1, 0), (0, 1), (0, 2)], None);
    let waiter = desk.run(1, optim_step());
    desk.done(waiter);
    desk.answering = false;
    let waiter = desk.run(2, publish("v1"));
    let (node, token, operation) = desk.executed().pop().unwrap();
    let prepared = desk.prepared(token, crate::protocol::RankIndex(0), &operation);
    desk.say(node, prepared);
    let policy = staged_policy(&desk);
    (desk, waiter, policy)
}

#[test]
fn a_publish_is_done_when_every_replica_serves_it() {
    let (mut desk, waiter, policy) = publishing();
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::Stage { .. })), 2);
    desk.say(NodeId(2), NodeMessage::Staged { policy });
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::Activate { .. })), 0, "one has not staged it");
    desk.say(NodeId(3), NodeMessage::Staged { policy });
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::Activate { .. })), 2);
    desk.say(NodeId(3), NodeMessage::Activated { policy });
    assert_eq!(live(&mut desk), None);
    assert_eq!(desk.status(waiter), None);
    desk.say(NodeId(2), NodeMessage::Activated { policy });
    desk.done(waiter);
    assert_eq!(live(&mut desk), Some(policy));
    assert_eq!((policy.step, policy.run), (1, RUN));
}

#[test]
fn a_node_that_fails_a_publish_is_left_out_until_it_has_caught_up() {
    let (mut desk, waiter, policy) = publishing();
    let error = OperationError::new(ErrorKind::ResourceExhausted, "no memory");
    desk.say(NodeId(2), NodeMessage::StageFailed { policy, error });
    desk.say(NodeId(3), NodeMessage::Staged { policy });
    desk.say(NodeId(3), NodeMessage::Activated { policy });
    desk.done(waiter);
    for _ in 0..6 {
        desk.ask(ClientRequest::Sample(request(SampleTarget::Policy(policy))));
    }
    assert!(desk.generated.iter().all(|(node, ..)| *node == NodeId(3)));
    desk.answering = true;
    desk.pass(6_000);
    desk.ask(ClientRequest::Sample(request(SampleTarget::Policy(policy))));
    assert_eq!(desk.generated.last().unwrap().0, NodeId(2), "it is staged again, and idle");
}

#[test]
fn a_node_that_is_late_for_a_publish_is_left_out() {
    let (mut desk, waiter, policy) = publishing();
    desk.say(NodeId(3), NodeMessage::Staged { policy });
    for _ in 0..31 {
        for node in [1, 2, 3] {
            desk.say(NodeId(node), NodeMessage::Pong { nonce: 0 });
        }
        desk.pass(2_000);
    }
    desk.say(NodeId(3), NodeMessage::Activated { policy });
    let again = desk.ask(ClientRequest::WaitOperation {
        run: RUN,
        seq: crate::protocol::OperationSeq(2),
        hold_ms: 0,
    });
    desk.done(again);
    assert!(desk.status(waiter).is_some());
}

#[test]
fn a_publish_waits_for_the_first_sampler() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let waiter = desk.run(1, publish("v0"));
    assert_eq!(desk.status(waiter), None);
    desk.join(2, 0, 1);
    desk.done(waiter);
}

#[test]
fn a_newcomer_serves_nothing_before_it_has_what_is_live() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let waiter = desk.run(1, publish("v0"));
    desk.done(waiter);
    let policy = live(&mut desk).unwrap();
    desk.answering = false;
    desk.join(2, 0, 8);
    assert!(
        desk.sent.iter().any(|(node, m)| *node == NodeId(2) && matches!(m, CoordinatorMessage::Stage { .. }))
    );
    for _ in 0..3 {
        desk.ask(ClientRequest::Sample(request(SampleTarget::Live { run: RUN, min_version: 0 })));
    }
    assert!(desk.generated.iter().all(|(node, ..)| *node == NodeId(1)));
    desk.say(NodeId(2), NodeMessage::Staged { policy });
    desk.say(NodeId(2), NodeMessage::Activated { policy });
    desk.ask(ClientRequest::Sample(request(SampleTarget::Live { run: RUN, min_version: 0 })));
    assert_eq!(desk.generated.last().unwrap().0, NodeId(2));
}

#[test]
fn an_older_version_is_served_as_long_as_someone_asks_for_it() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let mut policies = Vec::new();
    for key in 0..16 {
        desk.run(2 * key, optim_step());
        let waiter = desk.run(2 * key + 1, publish(&format!("v{key}")));
        desk.done(waiter);
        policies.extend(live(&mut desk));
    }
    let retired = desk.count(|m| matches!(m, CoordinatorMessage::Retire { .. }));
    assert!((8..16).contains(&retired), "memory holds a few versions: {retired} left it");
    let waiter = desk.ask(ClientRequest::Sample(request(SampleTarget::Policy(policies[0]))));
    serve(&mut desk);
    let Some(ClientResponse::Sample { policy, result }) = desk.answer(waiter) else { panic!("no sample") };
    assert_eq!((*policy, result.policy_version), (Some(policies[0]), 1));
}

#[test]
fn a_checkpoint_is_served_under_its_own_policy() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let save = crate::protocol::Operation::SaveWeightsForSampler {
        name: "kept".into(),
        publish: false,
        ttl_seconds: None,
    };
    for (key, operation) in [optim_step(), save, optim_step()].into_iter().enumerate() {
        let waiter = desk.run(key as u8, operation);
        desk.done(waiter);
    }
    assert_eq!(live(&mut desk), None);
    let path = format!("bt://loops:{RUN}/sampler_weights/kept");
    let waiter = desk.ask(ClientRequest::Sample(request(SampleTarget::Checkpoint { path })));
    serve(&mut desk);
    assert!(
        matches!(desk.answer(waiter), Some(ClientResponse::Sample { result, .. }) if result.policy_version == 1)
    );
    let absent = SampleTarget::Checkpoint { path: format!("bt://loops:{RUN}/sampler_weights/other") };
    assert_eq!(desk.refused(ClientRequest::Sample(request(absent))).kind, ErrorKind::NotFound);
    let trainer = SampleTarget::Checkpoint { path: format!("bt://loops:{RUN}/weights/kept") };
    assert_eq!(desk.refused(ClientRequest::Sample(request(trainer))).kind, ErrorKind::InvalidInput);
}

#[test]
fn a_floor_is_waited_for_and_then_refused() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let floor = |min_version| ClientRequest::Sample(request(SampleTarget::Live { run: RUN, min_version }));
    let (one, two) = (desk.ask(floor(1)), desk.ask(floor(2)));
    desk.run(1, optim_step());
    desk.run(2, publish("v1"));
    serve(&mut desk);
    assert!(matches!(desk.answer(one), Some(ClientResponse::Sample { .. })));
    desk.pass(26_000);
    let Some(ClientResponse::Error(error)) = desk.answer(two) else { panic!("still waits") };
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    assert!(error.message.contains("is 1, behind the 2"), "{error}");
}

#[test]
fn requests_go_to_the_idlest_replica() {
    let mut desk = Desk::with_run(&[(1, 1), (0, 3)], None);
    for _ in 0..8 {
        desk.ask(ClientRequest::Sample(request(base())));
    }
    let on_first = desk.generated.iter().filter(|(node, ..)| *node == NodeId(1)).count();
    assert_eq!(on_first, 2, "one replica of four");
}

#[test]
fn a_lost_node_s_requests_are_asked_elsewhere_with_the_same_seed() {
    let mut desk = Desk::with_run(&[(1, 0), (0, 1), (0, 1)], None);
    let waiter = desk.ask(ClientRequest::Sample(request(base())));
    let (node, attempt, first) = desk.generated.pop().unwrap();
    desk.lose(node.0);
    let (other, second, again) = desk.generated.pop().unwrap();
    assert_ne!(node, other);
    assert_eq!((again.seed, again.policy, again.request), (first.seed, first.policy, first.request));
    assert!(desk.others.contains(&Effect::CancelGenerate { request: first.request }));
    // The first stream's end is no news.
    desk.feed(Event::Generated { request: first.request, attempt, reply: Err("reset".into()) });
    assert_eq!(desk.answer(waiter), None);
    desk.feed(Event::Generated { request: first.request, attempt: second, reply: reply(0) });
    assert!(matches!(desk.answer(waiter), Some(ClientResponse::Sample { .. })));
}

#[test]
fn a_request_is_tried_three_times() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let waiter = desk.ask(ClientRequest::Sample(request(base())));
    for _ in 0..3 {
        assert_eq!(desk.answer(waiter), None);
        let (_, attempt, generate) = desk.generated.pop().unwrap();
        desk.feed(Event::Generated { request: generate.request, attempt, reply: Err("reset".into()) });
    }
    assert!(
        matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.kind == ErrorKind::Unavailable)
    );
}

#[test]
fn a_request_without_a_node_is_held_for_a_while() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let waiter = desk.ask(ClientRequest::Sample(request(base())));
    desk.pass(29_000);
    assert_eq!(desk.answer(waiter), None);
    desk.pass(2_000);
    assert!(
        matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.kind == ErrorKind::Unavailable)
    );
}

#[test]
fn a_wrong_version_is_never_passed_on() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let waiter = desk.ask(ClientRequest::Sample(request(base())));
    let (_, attempt, generate) = desk.generated.pop().unwrap();
    desk.feed(Event::Generated { request: generate.request, attempt, reply: reply(7) });
    assert!(matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.kind == ErrorKind::Internal));
}

#[test]
fn a_caller_that_leaves_cancels_its_request() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let waiter = desk.ask(ClientRequest::Sample(request(base())));
    let generate = desk.generated.pop().unwrap().2;
    desk.feed(Event::RequestGone { waiter });
    assert_eq!(desk.others, [Effect::CancelGenerate { request: generate.request }]);
}

#[test]
fn refuses_what_can_not_be_sampled() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let mut refused = |change: fn(&mut SampleRequest)| {
        let mut request = request(base());
        change(&mut request);
        desk.refused(ClientRequest::Sample(request)).message
    };
    assert!(refused(|r| r.prompt = text(vec![])).starts_with("`prompt`: is empty"));
    assert!(
        refused(|r| r.prompt = text(vec![1, 100]))
            .starts_with("`prompt[1]`: token id 100 is outside the vocabulary of 100")
    );
    assert!(
        refused(|r| r.prompt = text(vec![1; 32]))
            .starts_with("`prompt`: must be shorter than the context of 32")
    );
    assert!(refused(|r| r.num_samples = 0).starts_with("`num_samples`: must be 1 to 128, got 0"));
    assert!(refused(|r| r.num_samples = 129).starts_with("`num_samples`"));
    assert!(refused(|r| r.params.top_p = 0.0).starts_with("`top_p`"));
    assert!(refused(|r| r.flags.topk_prompt_logprobs = 21).starts_with("`topk_prompt_logprobs`"));
    assert!(
        refused(|r| r.target = SampleTarget::Live { run: crate::types::RunId(9), min_version: 0 })
            .contains("run-9")
    );
    let image =
        ModelInputChunk::Image(ImageChunk { data: vec![], format: ImageFormat::Png, expected_tokens: 1 });
    let mut with_image = request(base());
    with_image.prompt.chunks.push(image);
    assert!(
        desk.refused(ClientRequest::Sample(with_image))
            .message
            .starts_with("`prompt.chunks[1]`: is an image")
    );
}

fn slots(desk: &mut Desk) -> (Option<PolicyId>, Option<PolicyId>) {
    match desk.asked(ClientRequest::RunInfo { run: RUN }) {
        ClientResponse::Run(info) => (info.initial, info.live),
        other => panic!("no run: {other:?}"),
    }
}

fn do_all(desk: &mut Desk, from: u8, operations: Vec<crate::protocol::Operation>) {
    for (key, operation) in operations.into_iter().enumerate() {
        let waiter = desk.run(from + key as u8, operation);
        desk.done(waiter);
    }
}

/// The weights that a sample of `target` was served.
fn served(desk: &mut Desk, target: SampleTarget) -> Option<PolicyId> {
    let waiter = desk.ask(ClientRequest::Sample(request(target)));
    serve(desk);
    match desk.answer(waiter) {
        Some(ClientResponse::Sample { policy, .. }) => *policy,
        other => panic!("no sample: {other:?}"),
    }
}

#[test]
fn version_zero_stays_beside_what_is_published_later() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let initial = SampleTarget::Initial { run: RUN };
    assert_eq!(served(&mut desk, initial.clone()), None, "the base model");
    do_all(&mut desk, 1, vec![publish("v0")]);
    let (Some(zero), None) = slots(&mut desk) else { panic!("published at step 0") };
    do_all(&mut desk, 2, vec![optim_step(), publish("v1")]);
    let (_, Some(one)) = slots(&mut desk) else { panic!("published at step 1") };
    assert_eq!((zero.step, one.step), (0, 1));
    assert_eq!(served(&mut desk, initial.clone()), Some(zero));
    assert_eq!(served(&mut desk, SampleTarget::Live { run: RUN, min_version: 0 }), Some(one));

    // A fresh adapter is another policy under the same name.
    let fresh = crate::protocol::Operation::Init { lora: crate::types::LoraConfig::new(4, 1) };
    do_all(&mut desk, 4, vec![fresh]);
    assert_eq!(slots(&mut desk), (None, None));
    assert_eq!(served(&mut desk, initial), None);
    assert_eq!(served(&mut desk, SampleTarget::Policy(one)), Some(one), "it is still known by its identity");
}

#[test]
fn a_checkpoint_goes_when_its_time_is_up_and_what_is_served_stays() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let save = |name: &str, ttl_seconds| crate::protocol::Operation::SaveWeightsForSampler {
        name: name.into(),
        publish: true,
        ttl_seconds,
    };
    do_all(&mut desk, 1, vec![optim_step(), save("short", Some(10)), save("kept", None)]);
    let names = |desk: &mut Desk| match desk.asked(ClientRequest::ListCheckpoints { run: None }) {
        ClientResponse::Checkpoints(found) => found.into_iter().map(|c| c.checkpoint_id).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(names(&mut desk), ["kept", "short"]);
    desk.pass(9_000);
    assert_eq!(names(&mut desk).len(), 2);
    desk.pass(2_000);
    assert_eq!(names(&mut desk), ["kept"]);
    let path = format!("bt://loops:{RUN}/sampler_weights/short");
    let gone = ClientRequest::Sample(request(SampleTarget::Checkpoint { path }));
    assert_eq!(desk.refused(gone).kind, ErrorKind::NotFound);

    let checkpoint = crate::types::CheckpointId(2);
    assert_eq!(desk.asked(ClientRequest::DeleteCheckpoint { checkpoint }), ClientResponse::Deleted);
    assert_eq!(names(&mut desk), Vec::<String>::new());
    assert_eq!(desk.refused(ClientRequest::DeleteCheckpoint { checkpoint }).kind, ErrorKind::NotFound);
    let live = SampleTarget::Live { run: RUN, min_version: 1 };
    assert_eq!(served(&mut desk, live).map(|policy| policy.step), Some(1));
    for ttl_seconds in [0, u64::MAX] {
        let refused = desk.submit(9, save("never", Some(ttl_seconds)));
        let ClientResponse::Error(error) = refused else { panic!("{refused:?}") };
        assert!(error.message.starts_with("`ttl_seconds`"), "{error}");
    }
}

#[test]
fn a_publish_that_an_init_overtakes_is_reported_and_not_served() {
    let (mut desk, waiter, policy) = publishing();
    let fresh = crate::protocol::Operation::Init { lora: crate::types::LoraConfig::new(4, 1) };
    let init = desk.run(3, fresh);
    let (node, token, operation) = desk.executed().pop().unwrap();
    let prepared = desk.prepared(token, crate::protocol::RankIndex(0), &operation);
    desk.say(node, prepared);
    desk.done(init);
    for message in [NodeMessage::Staged { policy }, NodeMessage::Activated { policy }] {
        desk.say(NodeId(2), message.clone());
        desk.say(NodeId(3), message);
    }
    desk.done(waiter);
    assert_eq!(slots(&mut desk), (None, None));
}

#[test]
fn a_checkpoint_answers_until_the_floor_is_reached() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let save = crate::protocol::Operation::SaveWeightsForSampler {
        name: "kept".into(),
        publish: false,
        ttl_seconds: None,
    };
    do_all(&mut desk, 1, vec![optim_step(), publish("v1"), save, optim_step()]);
    let path = format!("bt://loops:{RUN}/sampler_weights/kept");
    let from = |min_version| SampleTarget::LiveOrCheckpoint { run: RUN, min_version, path: path.clone() };
    let kept = served(&mut desk, SampleTarget::Checkpoint { path: path.clone() });
    assert_eq!(served(&mut desk, from(2)), kept, "at once, though nothing of version 2 is live");
    do_all(&mut desk, 5, vec![publish("v2")]);
    assert_eq!(served(&mut desk, from(2)).map(|policy| policy.step), Some(2));
    let absent = SampleTarget::LiveOrCheckpoint {
        run: RUN,
        min_version: 2,
        path: format!("bt://loops:{RUN}/sampler_weights/other"),
    };
    assert_eq!(desk.refused(ClientRequest::Sample(request(absent))).kind, ErrorKind::NotFound);
}

#[test]
fn more_requests_than_a_replica_takes_wait_their_turn() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let waiters: Vec<_> = (0..1_300).map(|_| desk.ask(ClientRequest::Sample(request(base())))).collect();
    assert_eq!(desk.generated.len(), HANDED_MAX);
    // Longer than a request would wait for a node.
    for _ in 0..40 {
        desk.pass(1_000);
    }
    assert!(waiters.iter().all(|waiter| desk.answer(*waiter).is_none()));
    let (_, attempt, generate) = desk.generated.remove(7);
    desk.feed(Event::Generated { request: generate.request, attempt, reply: reply(0) });
    let next = desk.generated.last().unwrap().2.request;
    assert_eq!(next.0, desk.generated[0].2.request.0 + HANDED_MAX as u64, "the first of those that wait");
    desk.feed(Event::RequestGone { waiter: waiters[0] });
    assert_eq!(desk.generated.len(), HANDED_MAX + 1, "a cancelled request leaves its room");
    while !desk.generated.is_empty() {
        serve(&mut desk);
    }
    let sampled = |waiter: &&_| matches!(desk.answer(**waiter), Some(ClientResponse::Sample { .. }));
    assert_eq!(waiters.iter().filter(sampled).count(), 1_299);
}

#[test]
fn requests_that_wait_for_room_wait_for_a_node_when_theirs_is_lost() {
    let mut desk = Desk::with_run(&[(1, 0), (0, 1)], None);
    let waiters: Vec<_> =
        (0..=HANDED_MAX).map(|_| desk.ask(ClientRequest::Sample(request(base())))).collect();
    desk.lose(2);
    desk.pass(29_000);
    assert!(waiters.iter().all(|waiter| desk.answer(*waiter).is_none()));
    desk.pass(2_000);
    for waiter in waiters {
        assert!(
            matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.kind == ErrorKind::Unavailable)
        );
    }
}

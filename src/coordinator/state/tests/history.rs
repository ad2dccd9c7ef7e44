//! What is forgotten, and what never is.

use crate::{
    coordinator::{Limits, state::Event},
    journal::{Record, RecoveredRun, RecoveredSnapshot, Standing},
    protocol::{
        ClientRequest, ClientResponse, CoordinatorMessage, NodeId, Operation, OperationKey, OperationSeq,
        OperationStatus, SampleTarget, SubmitOperation,
    },
    types::{CheckpointId, Digest, ErrorKind, LoraConfig, LossFn, LossSpec, SessionId},
};

use super::{
    desk::{Desk, RUN, blob, create, disk_full, init, load, nothing, optim_step, publish, save_state},
    samplers::{reply, request},
};

/// A desk with one node, one run and little memory.
fn forgetful(change: impl FnOnce(&mut Limits)) -> Desk {
    let mut limits = Limits { results_kept: 4, publishes_kept: 2, ..Limits::default() };
    change(&mut limits);
    let mut desk = Desk::limited(limits, nothing());
    desk.join(1, 1, 1);
    assert!(matches!(desk.create(None), ClientResponse::Run(_)));
    desk
}

fn all_done(desk: &mut Desk, keys: std::ops::RangeInclusive<u8>, operation: impl Fn(u8) -> Operation) {
    for key in keys {
        let waiter = desk.run(key, operation(key));
        desk.done(waiter);
    }
}

fn prunes(desk: &Desk) -> Vec<(u64, u64)> {
    let prunes = desk.records.iter().filter_map(|record| match record {
        Record::Prune { run: RUN, base, upto } => Some((base.0, upto.0)),
        _ => None,
    });
    prunes.collect()
}

fn dropped(desk: &Desk) -> Vec<u64> {
    let dropped = desk.records.iter().filter_map(|record| match record {
        Record::DropCheckpoint { checkpoint } => Some(checkpoint.0),
        _ => None,
    });
    dropped.collect()
}

#[test]
fn what_is_older_than_the_last_two_snapshots_is_forgotten() {
    let mut desk = forgetful(|_| {});
    all_done(&mut desk, 1..=16, |_| optim_step());
    desk.pass(20_000);
    assert_eq!(prunes(&desk), [(8, 8)], "results, though both snapshots are kept");
    all_done(&mut desk, 17..=34, |_| optim_step());
    desk.pass(30_000);
    assert_eq!(prunes(&desk)[1..], [(16, 16), (24, 24)], "one piece after the other");
    let wait = |seq| ClientRequest::WaitOperation { run: RUN, seq: OperationSeq(seq), hold_ms: 0 };
    assert_eq!(desk.refused(wait(24)).kind, ErrorKind::NotFound);
    let kept = desk.asked(wait(25));
    assert!(matches!(kept, ClientResponse::Operation(OperationStatus::Done(_))), "{kept:?}");
    assert_eq!(desk.submit(25, optim_step()), ClientResponse::Accepted { seq: OperationSeq(25) });
    assert_eq!(desk.submit(35, optim_step()), ClientResponse::Accepted { seq: OperationSeq(35) });
}

#[test]
fn results_are_kept_longer_than_what_they_came_from() {
    let mut desk = forgetful(|limits| limits.results_kept = 20);
    all_done(&mut desk, 1..=24, |_| optim_step());
    desk.pass(20_000);
    assert_eq!(prunes(&desk), [(16, 4)]);
}

#[test]
fn a_past_that_can_not_be_forgotten_now_is_forgotten_later() {
    let mut desk = forgetful(|_| {});
    all_done(&mut desk, 1..=24, |_| optim_step());
    desk.durable = false;
    desk.pass(10_000);
    let Some(crate::coordinator::state::Effect::Append { append, .. }) = desk.others.pop() else {
        panic!("nothing is written")
    };
    desk.feed(Event::Appended { append, result: Err(disk_full()) });
    desk.durable = true;
    desk.pass(10_000);
    assert_eq!(prunes(&desk), [(16, 16)]);
}

#[test]
fn histories_over_the_bound_are_cut_to_the_newest_snapshot() {
    // The desk's snapshots have some ten bytes.
    let mut desk = forgetful(|limits| limits.history_bytes = 15);
    all_done(&mut desk, 1..=16, |_| optim_step());
    desk.pass(20_000);
    assert_eq!(prunes(&desk), [(16, 12)]);
}

#[test]
fn a_run_that_only_evaluates_has_a_snapshot_to_forget_up_to() {
    let mut desk = forgetful(|_| {});
    let evaluate = || Operation::Forward {
        loss: LossSpec::new(LossFn::CrossEntropy),
        data: crate::protocol::Payload::Inline(vec![1]),
    };
    for i in 0..512_u64 {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&i.to_le_bytes());
        let submit = SubmitOperation { run: RUN, key: OperationKey(key), operation: evaluate() };
        assert!(matches!(desk.asked(ClientRequest::Submit(submit)), ClientResponse::Accepted { .. }));
    }
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::TakeSnapshot { .. })), 1);
    desk.pass(10_000);
    assert_eq!(prunes(&desk), [(512, 508)]);
}

#[test]
fn a_run_stands_where_its_snapshot_says_when_everything_before_is_forgotten() {
    let standing = Standing { incarnation: 3, step: 40, lora: LoraConfig::new(4, 9) };
    let snapshot =
        RecoveredSnapshot { seq: OperationSeq(90), blob: blob("snapshot"), standing, payload_bytes: 0 };
    let mut recovered = nothing();
    recovered.sessions.push(SessionId(1));
    recovered.runs.push(RecoveredRun {
        run: RUN,
        create: crate::protocol::CreateRun {
            base_model: super::desk::MODEL.to_owned(),
            ..create(SessionId(1), Some(1))
        },
        model_digest: Digest::of(b"model"),
        key: None,
        created_at_ms: 5,
        snapshots: vec![snapshot],
        operations: Vec::new(),
        slots: Vec::new(),
    });
    let mut desk = Desk::recovered(recovered);
    let ClientResponse::Run(info) = desk.asked(ClientRequest::RunInfo { run: RUN }) else { panic!("no run") };
    assert_eq!((info.incarnation, info.step, info.lora.rank), (3, 40, 4));
    desk.join(1, 1, 0);
    let waiter = desk.run(1, init());
    desk.done(waiter);
    let (_, token, _) = desk.executed().pop().unwrap();
    assert_eq!((token.seq, token.incarnation), (OperationSeq(91), 4), "no number comes again");
}

#[test]
fn publishes_push_out_older_ones_but_none_that_is_in_use() {
    let mut desk = forgetful(|_| {});
    all_done(&mut desk, 1..=2, |key| if key == 1 { optim_step() } else { publish("first") });
    let first = super::samplers::live(&mut desk).unwrap();
    let sample = desk.ask(ClientRequest::Sample(request(SampleTarget::Policy(first))));
    all_done(&mut desk, 3..=10, |key| match key % 2 {
        0 => publish(&format!("publish {key}").replace(' ', "-")),
        _ => optim_step(),
    });
    let waiter = desk
        .run(11, Operation::SaveWeightsForSampler { name: "kept".into(), publish: false, ttl_seconds: None });
    desk.done(waiter);
    desk.pass(10_000);
    assert_eq!(dropped(&desk), [2, 3], "the first is sampled from, and the last two stay");
    let (_, attempt, generate) = desk.generated.pop().unwrap();
    desk.feed(Event::Generated { request: generate.request, attempt, reply: reply(1) });
    assert!(matches!(desk.answer(sample), Some(ClientResponse::Sample { .. })));
    desk.pass(10_000);
    assert_eq!(dropped(&desk), [2, 3, 1]);
    let checkpoints = desk.asked(ClientRequest::ListCheckpoints { run: None });
    let ClientResponse::Checkpoints(left) = checkpoints else { panic!("{checkpoints:?}") };
    assert_eq!(left.iter().map(|c| c.id).collect::<Vec<_>>(), [6, 5, 4].map(CheckpointId));
}

#[test]
fn a_checkpoint_that_is_being_loaded_is_needed_though_its_name_has_moved() {
    let mut desk = forgetful(|_| {});
    all_done(&mut desk, 1..=2, |key| if key == 1 { optim_step() } else { save_state("a") });
    let first = blob("state at 1 as a").digest;
    let unknown = blob("of nobody").digest;
    assert_eq!(desk.state.unneeded(vec![first, unknown]), [unknown]);
    desk.answering = false;
    desk.run(3, load(&format!("bt://loops:{RUN}/weights/a")));
    let (node, token, operation) = desk.executed().pop().unwrap();
    assert_eq!(node, NodeId(1));
    assert_eq!(desk.state.unneeded(vec![first]), []);
    let prepared = desk.prepared(token, crate::protocol::RankIndex(0), &operation);
    desk.answering = true;
    desk.say(node, prepared);
    all_done(&mut desk, 4..=5, |key| if key == 4 { optim_step() } else { save_state("a") });
    // Repeated, it would be loaded again: until a snapshot covers the load.
    assert_eq!(desk.state.unneeded(vec![first]), []);
    all_done(&mut desk, 6..=13, |_| optim_step());
    assert_eq!(desk.state.unneeded(vec![first]), [first]);
}

//! Publishes that no sampler serves.

use crate::{
    coordinator::{Limits, state::Effect, state::Event},
    journal::Record,
    protocol::{
        ClientRequest, ClientResponse, CoordinatorMessage, NodeId, NodeMessage, OperationSeq, OperationStatus,
    },
    types::{ErrorKind, OperationError},
};

use super::{
    desk::{Desk, MODEL, RUN, disk_full, optim_step, publish},
    samplers::live,
};

/// Lets time pass, all nodes answering.
fn pass(desk: &mut Desk, nodes: &[u32], seconds: u64) {
    for _ in 0..seconds {
        for node in nodes {
            desk.say(NodeId(*node), NodeMessage::Pong { nonce: 0 });
        }
        desk.pass(1_000);
    }
}

fn status(desk: &mut Desk, seq: u64) -> OperationStatus {
    match desk.asked(ClientRequest::WaitOperation { run: RUN, seq: OperationSeq(seq), hold_ms: 0 }) {
        ClientResponse::Operation(status) => status,
        other => panic!("no status: {other:?}"),
    }
}

#[test]
fn where_no_sampler_has_been_for_a_while_a_publish_is_refused_and_the_next_operation_runs() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let waiter = desk.run(1, publish("v0"));
    let next = desk.run(2, optim_step());
    desk.pass(29_000);
    assert_eq!((desk.status(waiter), desk.status(next)), (None, None), "one may come");
    desk.pass(2_000);
    let error = desk.failed(waiter);
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains(&format!("no node with a sampler for {MODEL:?}")), "{error}");
    desk.done(next);
    let again = desk.run(3, publish("v1"));
    assert!(
        desk.failed(again).message.contains("has been there for 30 s"),
        "at once, as nothing has changed"
    );
}

#[test]
fn a_sampler_that_has_just_left_is_waited_for() {
    let mut desk = Desk::with_run(&[(1, 0), (0, 1)], None);
    desk.pass(60_000);
    desk.lose(2);
    let waiter = desk.run(1, publish("v0"));
    desk.pass(20_000);
    assert_eq!(desk.status(waiter), None);
    desk.join(3, 0, 1);
    desk.done(waiter);
}

/// A desk whose first version is live and whose second no sampler manages to stage.
fn unstageable() -> (Desk, OperationSeq) {
    let mut desk = Desk::with_run(&[(1, 0), (0, 1)], None);
    for (key, operation) in [(1, optim_step()), (2, publish("v1")), (3, optim_step())] {
        let waiter = desk.run(key, operation);
        desk.done(waiter);
    }
    desk.answering = false;
    desk.run(4, publish("v2"));
    let (node, token, operation) = desk.executed().pop().unwrap();
    let prepared = desk.prepared(token, crate::protocol::RankIndex(0), &operation);
    desk.say(node, prepared);
    (desk, token.seq)
}

fn fail_staging(desk: &mut Desk) {
    let staged = std::mem::take(&mut desk.sent).into_iter().filter_map(|(_, message)| match message {
        CoordinatorMessage::Stage { policy, .. } => Some(policy),
        _ => None,
    });
    for policy in staged.collect::<Vec<_>>() {
        let error = OperationError::new(ErrorKind::ResourceExhausted, "no memory");
        desk.say(NodeId(2), NodeMessage::StageFailed { policy, error });
    }
}

#[test]
fn a_publish_that_nobody_serves_in_time_fails_with_the_reasons_and_stays_saved() {
    let (mut desk, seq) = unstageable();
    let before = live(&mut desk);
    for _ in 0..181 {
        fail_staging(&mut desk);
        assert_eq!(status(&mut desk, seq.0), OperationStatus::Pending);
        pass(&mut desk, &[1, 2], 1);
        if desk.records.iter().any(|record| matches!(record, Record::PublishFailed { .. })) {
            break;
        }
    }
    let OperationStatus::Failed(error) = status(&mut desk, seq.0) else { panic!("not failed") };
    assert_eq!(error.kind, ErrorKind::Unavailable);
    for part in ["was saved, but not published", "within 180 s", "node node2: ", "no memory"] {
        assert!(error.message.contains(part), "{error}");
    }
    let [.., Record::PublishFailed { seq: failed, .. }, Record::Slot { policy, .. }] = &desk.records[..]
    else {
        panic!("{:?}", desk.records.last())
    };
    assert_eq!((*failed, Some(*policy)), (seq, before), "the slot holds what it held");
    assert_eq!(live(&mut desk), before);
    let checkpoints = desk.asked(ClientRequest::ListCheckpoints { run: Some(RUN) });
    assert!(matches!(checkpoints, ClientResponse::Checkpoints(kept) if kept.len() == 2));
    desk.answering = true;
    let next = desk.run(5, publish("v3"));
    desk.done(next);
}

#[test]
fn a_failure_that_can_not_be_written_is_written_again() {
    let (mut desk, seq) = unstageable();
    desk.durable = false;
    pass(&mut desk, &[1, 2], 179);
    desk.others.clear();
    fail_staging(&mut desk);
    pass(&mut desk, &[1, 2], 10);
    let failure = desk.others.iter().find_map(|effect| match effect {
        Effect::Append { append, records } if matches!(records[0], Record::PublishFailed { .. }) => {
            Some(*append)
        }
        _ => None,
    });
    desk.feed(Event::Appended { append: failure.expect("a failure"), result: Err(disk_full()) });
    assert_eq!(status(&mut desk, seq.0), OperationStatus::Pending);
    desk.durable = true;
    pass(&mut desk, &[1, 2], 2);
    assert!(matches!(status(&mut desk, seq.0), OperationStatus::Failed(_)));
}

#[test]
fn a_publish_that_was_done_before_a_restart_is_not_failed_by_it() {
    let mut desk = Desk::limited(Limits::default(), super::recovery::published());
    desk.join(1, 1, 0);
    assert_eq!(status(&mut desk, 1), OperationStatus::Pending, "nobody serves it yet");
    pass(&mut desk, &[1], 181);
    assert!(matches!(status(&mut desk, 1), OperationStatus::Done(_)));
    assert!(desk.records.is_empty());
}

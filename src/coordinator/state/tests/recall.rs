//! Forks and replays: what becomes of what the journal says of a run's past.

use crate::{
    coordinator::state::{Effect, Event, WaiterId},
    journal::{Goal, Outcome, Record, RecoveredOperation, RecoveredSnapshot, Standing, Way},
    protocol::{
        ClientRequest, ClientResponse, CoordinatorMessage, NodeId, Operation, OperationKey, OperationResult,
        OperationSeq, Replayed, encode,
    },
    types::{Digest, ErrorKind, LoraConfig, OptimStepResponse, RunId},
};

use super::desk::{Desk, RUN, blob, init, optim_step};

const OTHER: RunId = RunId(2);

fn fork(step: u64) -> ClientRequest {
    ClientRequest::ForkRun { run: RUN, step, name: Some("another".into()) }
}

fn replay(step: u64) -> ClientRequest {
    ClientRequest::ReplayRun { run: RUN, step }
}

/// Operation `seq`, which left `state`.
fn entry(seq: u64, operation: Operation, state: &str, step: u64) -> RecoveredOperation {
    let result = OperationResult::OptimStep(OptimStepResponse { metrics: [].into() });
    RecoveredOperation {
        seq: OperationSeq(seq),
        key: OperationKey([seq as u8; 16]),
        incarnation: 1,
        digest: Digest::of(&encode(&operation)),
        operation: Some(operation),
        outcome: Some(Outcome::Done { result, state: Digest::of(state.as_bytes()), step }),
    }
}

/// From the beginning to step 2, of which the last left `last`.
fn way(last: &str) -> Way {
    let operations = vec![
        entry(1, init(), "state 1", 0),
        entry(2, optim_step(), "state 2", 1),
        entry(3, optim_step(), last, 2),
    ];
    Way::To { from: None, operations }
}

/// Asks, and answers what the journal is asked for.
fn recalled(desk: &mut Desk, request: ClientRequest, way: Way) -> WaiterId {
    let waiter = desk.ask(request);
    let asked = desk.others.pop().expect("the journal is asked");
    assert!(matches!(asked, Effect::Recall { waiter: w, run: RUN, .. } if w == waiter), "{asked:?}");
    desk.feed(Event::Recalled { waiter, way: Ok(way) });
    waiter
}

#[test]
fn a_fork_is_journaled_whole_and_goes_on_from_there() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let written = desk.records.len();
    let waiter = recalled(&mut desk, fork(2), way("state 3"));
    let Some(ClientResponse::Run(info)) = desk.answer(waiter) else { panic!("no fork") };
    assert_eq!((info.run, info.step, info.name.as_str()), (OTHER, 2, "another"));
    let kinds: Vec<bool> =
        desk.records[written..].iter().map(|record| matches!(record, Record::Operation { .. })).collect();
    assert_eq!(kinds, [false, true, false, true, false, true, false], "the run, then pairs");

    // Its first operation has its ranks repeat what led there.
    desk.sent.clear();
    let submit =
        crate::protocol::SubmitOperation { run: OTHER, key: OperationKey([9; 16]), operation: optim_step() };
    let accepted = desk.asked(ClientRequest::Submit(submit));
    assert!(matches!(accepted, ClientResponse::Accepted { seq: OperationSeq(4) }), "{accepted:?}");
    let executed: Vec<u64> = desk.executed().iter().map(|(_, token, _)| token.seq.0).collect();
    assert_eq!(executed, [1, 2, 3, 4]);
}

#[test]
fn a_fork_that_is_asked_for_again_is_the_same() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let call = crate::protocol::Call { key: Some(OperationKey([7; 16])), ..Default::default() };
    let first = desk.call(call, fork(2));
    desk.others.clear();
    desk.feed(Event::Recalled { waiter: first, way: Ok(way("state 3")) });
    let again = desk.call(call, fork(2));
    assert!(matches!(desk.answer(again), Some(ClientResponse::Run(info)) if info.run == OTHER));
    assert_eq!(desk.others, []);
}

#[test]
fn a_replay_that_comes_out_equal_says_so_and_leaves_nothing() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let written = desk.records.len();
    let waiter = recalled(&mut desk, replay(2), way("state 3"));
    let found = Replayed { from_step: 0, to_step: 2, operations: 3, difference: None };
    assert_eq!(desk.answer(waiter), Some(&ClientResponse::Replayed(found)));
    assert_eq!(desk.records.len(), written, "nothing of it is journaled");
    let released = |m: &CoordinatorMessage| matches!(m, CoordinatorMessage::ReleaseRanks { run: OTHER, .. });
    assert_eq!(desk.count(released), 1);
    assert_eq!(desk.refused(ClientRequest::RunInfo { run: OTHER }).kind, ErrorKind::NotFound);
}

#[test]
fn a_replay_names_the_first_operation_that_differs() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let waiter = recalled(&mut desk, replay(2), way("another state"));
    let Some(ClientResponse::Replayed(found)) = desk.answer(waiter) else { panic!("no report") };
    let difference = found.difference.as_deref().expect("a difference");
    let [journaled, computed] =
        ["another state", "state 3"].map(|state| Digest::of(state.as_bytes()).short());
    assert!(
        difference.contains("operation 3")
            && difference.contains(&journaled)
            && difference.contains(&computed),
        "{difference}"
    );
    // The run itself goes on.
    let waiter = desk.run(5, optim_step());
    desk.done(waiter);
}

#[test]
fn a_replay_takes_no_operations_and_ends_with_whoever_asked() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.answering = false;
    let waiter = recalled(&mut desk, replay(2), way("state 3"));
    let submit =
        crate::protocol::SubmitOperation { run: OTHER, key: OperationKey([9; 16]), operation: optim_step() };
    assert_eq!(desk.refused(ClientRequest::Submit(submit)).kind, ErrorKind::NotFound);
    assert!(matches!(desk.asked(ClientRequest::RunInfo { run: OTHER }), ClientResponse::Run(_)));
    desk.feed(Event::RequestGone { waiter });
    assert_eq!(desk.refused(ClientRequest::RunInfo { run: OTHER }).kind, ErrorKind::NotFound);
}

#[test]
fn a_replay_whose_ranks_are_lost_again_and_again_is_given_up() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.kills = Some(OperationSeq(3));
    let waiter = recalled(&mut desk, replay(2), way("state 3"));
    for node in 1..=8 {
        if desk.answer(waiter).is_some() {
            break;
        }
        desk.lose(node);
        desk.join(node + 1, 1, 0);
        desk.pass(40_000);
    }
    let Some(ClientResponse::Error(error)) = desk.answer(waiter) else { panic!("it goes on for ever") };
    assert!(error.message.contains("replay of run-1 to step 2"), "{error}");
}

#[test]
fn beyond_history_both_refuse_and_name_what_is_reached() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    for request in [fork(3), replay(3)] {
        let waiter = recalled(&mut desk, request, Way::Beyond { reach: Some((9, 20)) });
        let Some(ClientResponse::Error(error)) = desk.answer(waiter) else { panic!("not refused") };
        assert_eq!(error.kind, ErrorKind::InvalidInput);
        assert!(error.message.contains("the oldest step that it reaches is 9, the newest 20"), "{error}");
    }
    let unknown = ClientRequest::ReplayRun { run: OTHER, step: 1 };
    assert_eq!(desk.refused(unknown).kind, ErrorKind::NotFound);
}

#[test]
fn a_snapshot_that_was_forgotten_meanwhile_is_looked_for_again() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let snapshot = RecoveredSnapshot {
        seq: OperationSeq(8),
        blob: blob("snapshot 8"),
        standing: Standing { incarnation: 1, step: 8, lora: LoraConfig::new(8, 1) },
        payload_bytes: 0,
    };
    let way = Way::To { from: Some(snapshot), operations: vec![entry(9, optim_step(), "state 9", 9)] };
    let waiter = recalled(&mut desk, fork(9), way);
    assert_eq!(desk.answer(waiter), None);
    let goal = Goal { step: 9, recompute: false };
    assert_eq!(desk.others, [Effect::Recall { waiter, run: RUN, goal }]);
}

#[test]
fn what_is_asked_at_once_is_bounded() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    for _ in 0..8 {
        desk.ask(replay(2));
    }
    assert_eq!(desk.refused(replay(2)).kind, ErrorKind::ResourceExhausted);
    assert!(desk.sent.iter().all(|(node, _)| *node == NodeId(1)));
}

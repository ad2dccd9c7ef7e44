//! Snapshots, restarts, drains, and runs that give their ranks back.

use crate::{
    coordinator::state::{Effect, Event},
    journal::{Outcome, Record, Recovered, RecoveredOperation, RecoveredRun, Standing},
    protocol::{
        Blame, ClientRequest, ClientResponse, CoordinatorMessage, Epoch, Generation, NodeId, NodeMessage,
        Operation, OperationKey, OperationSeq, RankIndex, encode,
    },
    types::{Digest, ErrorKind, LoraConfig, OperationError, SessionId},
};

use super::desk::{Desk, MODEL, RUN, blob, create, init, optim_step, save_state};

#[test]
fn a_snapshot_is_taken_every_eight_steps() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    for key in 0..8 {
        assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::TakeSnapshot { .. })), 0);
        let waiter = desk.run(key, optim_step());
        desk.done(waiter);
    }
    let standing = Standing { incarnation: 0, step: 8, lora: LoraConfig::new(8, 1) };
    let seq = OperationSeq(8);
    let snapshot = Record::Snapshot { run: RUN, seq, snapshot: blob("snapshot 8"), standing };
    let taken = |record: &Record| *record == snapshot;
    assert!(desk.records.iter().any(taken));
}

fn recovered(outcome: Option<Outcome>) -> Recovered {
    let mut create = create(SessionId(1), Some(1));
    create.base_model = MODEL.to_owned();
    let operation = |seq: u64, operation: Operation, outcome| RecoveredOperation {
        seq: OperationSeq(seq),
        key: OperationKey([seq as u8; 16]),
        incarnation: 1,
        digest: Digest::of(&encode(&operation)),
        operation: Some(operation),
        outcome,
    };
    let state = |seq: u64| Digest::of(format!("state {seq}").as_bytes());
    let done = |seq, step| {
        let result = crate::protocol::OperationResult::OptimStep(crate::types::OptimStepResponse {
            metrics: [].into(),
        });
        Some(Outcome::Done { result, state: state(seq), step })
    };
    let run = RecoveredRun {
        run: RUN,
        create,
        model_digest: Digest::of(b"model"),
        key: None,
        created_at_ms: 5,
        snapshots: Vec::new(),
        operations: vec![
            operation(1, init(), done(1, 0)),
            operation(2, save_state("a"), done(2, 0)),
            operation(3, optim_step(), outcome),
            operation(4, optim_step(), None),
        ],
        slots: Vec::new(),
    };
    Recovered {
        epoch: Epoch(2),
        sessions: vec![SessionId(1)],
        owners: Default::default(),
        runs: vec![run],
        last_run: 1,
        checkpoints: Vec::new(),
        drained: Default::default(),
        certificates: Vec::new(),
        revoked: Default::default(),
    }
}

/// A journal whose run has published at step 1.
pub(super) fn published() -> Recovered {
    let path = format!("bt://loops:{RUN}/sampler_weights/v1");
    let result = crate::protocol::OperationResult::SaveWeightsForSampler(
        crate::types::SaveWeightsForSamplerResponse { path, version: 1 },
    );
    let mut recovered = recovered(None);
    let run = &mut recovered.runs[0];
    run.operations.truncate(1);
    let operation = super::desk::publish("v1");
    run.operations[0].digest = Digest::of(&encode(&operation));
    run.operations[0].operation = Some(operation);
    run.operations[0].outcome = Some(Outcome::Done { result, state: Digest::of(b"state 1"), step: 1 });
    let policy = crate::types::PolicyId { run: RUN, incarnation: 1, step: 1, digest: Digest::of(b"adapter") };
    run.slots.push((policy, blob("adapter")));
    recovered
}

#[test]
fn a_restart_repeats_what_changed_the_state_and_goes_on() {
    let result =
        crate::protocol::OperationResult::OptimStep(crate::types::OptimStepResponse { metrics: [].into() });
    let state = Digest::of(b"state 3");
    let mut desk = Desk::recovered(recovered(Some(Outcome::Done { result, state, step: 1 })));
    desk.join(1, 1, 0);
    let executed = desk.executed();
    let seqs: Vec<u64> = executed.iter().map(|(_, token, _)| token.seq.0).collect();
    assert_eq!(seqs, [1, 3, 4], "a save changes no state");
    assert!(
        executed.iter().all(|(_, token, _)| token.epoch == Epoch(2) && token.generation == Generation(1))
    );
    let waiter = desk.ask(ClientRequest::WaitOperation { run: RUN, seq: OperationSeq(4), hold_ms: 0 });
    desk.done(waiter);
    assert_eq!(desk.submit(4, optim_step()), ClientResponse::Accepted { seq: OperationSeq(4) });
    assert_eq!(desk.submit(5, optim_step()), ClientResponse::Accepted { seq: OperationSeq(5) });
}

#[test]
fn a_replay_that_comes_out_differently_quarantines_the_run() {
    let result =
        crate::protocol::OperationResult::OptimStep(crate::types::OptimStepResponse { metrics: [].into() });
    let state = Digest::of(b"of another build");
    let mut desk = Desk::recovered(recovered(Some(Outcome::Done { result, state, step: 1 })));
    desk.join(1, 1, 0);
    let waiter = desk.ask(ClientRequest::WaitOperation { run: RUN, seq: OperationSeq(4), hold_ms: 0 });
    let error = desk.failed(waiter);
    assert!(error.message.contains("repeating operation 3 gave state"), "{error}");
}

#[test]
fn a_step_that_was_not_finite_is_repeated_and_discarded() {
    let error = OperationError::new(ErrorKind::NotFinite, "the gradient norm is not finite");
    let mut desk = Desk::recovered(recovered(Some(Outcome::Failed { error: error.clone() })));
    desk.join(1, 1, 0);
    // The desk's ranks prepare it: a difference.
    let waiter = desk.ask(ClientRequest::WaitOperation { run: RUN, seq: OperationSeq(4), hold_ms: 0 });
    assert!(desk.failed(waiter).message.contains("repeating operation 3"));

    let mut desk = Desk::recovered(recovered(Some(Outcome::Failed { error: error.clone() })));
    desk.answering = false;
    desk.join(1, 1, 0);
    desk.say(NodeId(1), NodeMessage::RanksReady { run: RUN, generation: Generation(1) });
    let (node, token, operation) = desk.executed().pop().unwrap();
    let prepared = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, prepared);
    let (node, token, _) = desk.executed().pop().unwrap();
    assert_eq!(token.seq, OperationSeq(3));
    desk.say(
        node,
        NodeMessage::OperationFailed { token, rank: RankIndex(0), error, blame: Blame::Operation },
    );
    assert_eq!(desk.sent[0], (node, CoordinatorMessage::Discard { token }));
    assert_eq!(desk.executed()[0].1.seq, OperationSeq(4));
}

#[test]
fn a_configuration_that_no_rank_can_hold_fails_what_is_asked_with_the_reason_and_no_more() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    desk.answering = false;
    desk.create(None);
    let error = OperationError::new(ErrorKind::InvalidInput, "`rank`: must be at most 16, got 512");
    desk.say(
        NodeId(1),
        NodeMessage::RanksFailed { run: RUN, generation: Generation(1), error, blame: Blame::Environment },
    );
    desk.pass(10_000);
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::FormRanks { .. })), 1, "nobody asks for it");
    let waiter = desk.run(1, init());
    let error = OperationError::new(ErrorKind::InvalidInput, "`rank`: must be at most 16, got 512");
    desk.say(
        NodeId(1),
        NodeMessage::RanksFailed { run: RUN, generation: Generation(2), error, blame: Blame::Environment },
    );
    let error = desk.failed(waiter);
    assert!(error.kind == ErrorKind::InvalidInput && error.message.contains("must be at most 16"), "{error}");
    desk.answering = true;
    let waiter = desk.run(2, init());
    desk.pass(2_000);
    desk.done(waiter);
}

#[test]
fn a_drain_finishes_what_executes_and_takes_snapshots() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    desk.answering = false;
    let waiter = desk.run(1, optim_step());
    let behind = desk.run(2, optim_step());
    let (node, token, operation) = desk.executed().pop().unwrap();
    desk.feed(Event::Drain);
    assert_eq!(desk.refused(ClientRequest::CreateSession).kind, ErrorKind::Unavailable);
    assert_eq!(desk.others, []);
    desk.answering = true;
    let prepared = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, prepared);
    desk.done(waiter);
    assert_eq!(desk.status(behind), None, "it runs after the next start");
    assert!(matches!(desk.records.last(), Some(Record::Snapshot { seq: OperationSeq(1), .. })));
    assert_eq!(desk.sent.last(), Some(&(node, CoordinatorMessage::Shutdown)));
    assert_eq!(desk.others, [Effect::Stop]);
}

#[test]
fn a_drain_does_not_wait_for_ever() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.answering = false;
    desk.run(1, optim_step());
    desk.feed(Event::Drain);
    for _ in 0..31 {
        desk.say(NodeId(1), NodeMessage::Pong { nonce: 0 });
        desk.pass(1_000);
    }
    assert_eq!(desk.others, [Effect::Stop]);
}

#[test]
fn an_idle_run_gives_its_ranks_back_and_wakes_from_its_snapshot() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let waiter = desk.run(1, optim_step());
    desk.done(waiter);
    desk.sent.clear();
    desk.pass(31 * 60_000);
    assert!(desk.records.iter().any(|r| matches!(r, Record::Snapshot { seq: OperationSeq(1), .. })));
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::ReleaseRanks { .. })), 1);
    desk.sent.clear();
    let waiter = desk.run(2, optim_step());
    desk.done(waiter);
    let restored = |m: &CoordinatorMessage| matches!(m, CoordinatorMessage::FormRanks { restore: Some(blob), .. } if *blob == super::desk::blob("snapshot 1"));
    assert_eq!(desk.count(restored), 1);
    let seqs: Vec<u64> = desk.executed().into_iter().map(|(_, token, _)| token.seq.0).collect();
    assert_eq!(seqs, [2], "nothing is repeated");
}

#[test]
fn a_full_slot_makes_room_for_the_next_run() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    for _ in 0..60 {
        desk.create(None);
    }
    let formed = |desk: &Desk| desk.count(|m| matches!(m, CoordinatorMessage::FormRanks { .. }));
    assert_eq!(formed(&desk), 60);
    desk.pass(1_000);
    assert_eq!(formed(&desk), 61);
    let ClientResponse::Run(first) = desk.asked(ClientRequest::RunInfo { run: RUN }) else {
        panic!("no run")
    };
    assert_eq!(first.phase, "asleep");
}

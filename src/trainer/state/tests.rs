use super::*;
use crate::{
    protocol::{LoadSource, OperationResult},
    types::{CheckpointTarget, Digest, LoadWeightsResponse, LoraConfig, LoraTarget},
};

const RUN: RunId = RunId(7);

fn formation(run: RunId, epoch: u64, generation: u32) -> Formation {
    Formation {
        spec: RunSpec {
            run,
            base_model: "tiny".to_owned(),
            max_seq_len: 64,
            micro_batch_tokens: 16,
            lora: LoraConfig { rank: 4, alpha: 32.0, seed: 0, targets: vec![LoraTarget::QProj] },
        },
        epoch: Epoch(epoch),
        generation: Generation(generation),
        rank: RankIndex(0),
        roster: Vec::new(),
        restore: None,
    }
}

fn token(seq: u64) -> OpToken {
    OpToken { run: RUN, epoch: Epoch(1), generation: Generation(1), seq: OperationSeq(seq), incarnation: 1 }
}

fn operation() -> Operation {
    Operation::SaveState { name: "a".to_owned(), ttl_seconds: None }
}

fn execute(token: OpToken) -> Event {
    Event::Execute { token, operation: operation() }
}

fn prepared(step: u64) -> Prepared {
    Prepared {
        state: Digest::of(&step.to_le_bytes()),
        result: OperationResult::LoadState(LoadWeightsResponse { step }),
        saved: None,
        step,
    }
}

fn prepared_message(token: OpToken, step: u64) -> Effect {
    let Prepared { state, result, saved, step } = prepared(step);
    message(NodeMessage::Prepared { token, rank: RankIndex(0), state, result, saved, step })
}

fn error(text: &str) -> OperationError {
    OperationError::new(ErrorKind::Unavailable, text)
}

fn formed(formation: &Formation) -> Event {
    Event::Done(Done::Formed {
        run: formation.spec.run,
        epoch: formation.epoch,
        generation: formation.generation,
        result: Ok(()),
    })
}

fn executed(token: OpToken, step: u64) -> Event {
    Event::Done(Done::Executed { token, result: Ok(prepared(step)) })
}

fn report_formed(generation: u32, result: Result<(), OperationError>) -> Effect {
    Effect::Report(RankReport::Formed {
        run: RUN,
        generation: Generation(generation),
        result: result.map_err(Into::into),
    })
}

fn stale_effect(what: &'static str, token: OpToken) -> Vec<Effect> {
    vec![Effect::Ignore(Ignored::Stale { what, token })]
}

const APPLIED: Event = Event::Done(Done::Applied);

/// A slot that holds run 7 of epoch 1, generation 1, idle.
fn ready() -> RankState {
    let mut state = RankState::default();
    let form = formation(RUN, 1, 1);
    assert_eq!(state.handle(Event::Form(form.clone())), vec![Effect::Run(Job::Form(form.clone()))]);
    assert_eq!(state.handle(formed(&form)), vec![report_formed(1, Ok(()))]);
    state
}

/// The same, with operation 1 prepared.
fn with_prepared() -> RankState {
    let mut state = ready();
    state.handle(execute(token(1)));
    assert_eq!(state.handle(executed(token(1), 1)), vec![prepared_message(token(1), 1)]);
    state
}

#[test]
fn prepare_then_commit_then_the_next() {
    let mut state = ready();
    assert_eq!(
        state.handle(execute(token(1))),
        vec![Effect::Run(Job::Execute { token: token(1), operation: operation() })]
    );
    assert_eq!(state.handle(executed(token(1), 1)), vec![prepared_message(token(1), 1)]);
    assert_eq!(
        state.handle(Event::Commit { token: token(1) }),
        vec![Effect::Run(Job::Commit { token: token(1) })]
    );
    // The commit is still being applied: the next operation waits behind it.
    assert_eq!(state.handle(execute(token(2))), vec![]);
    assert_eq!(
        state.handle(APPLIED),
        vec![Effect::Run(Job::Execute { token: token(2), operation: operation() })]
    );
}

#[test]
fn a_discarded_operation_is_not_committed() {
    let mut state = with_prepared();
    assert_eq!(
        state.handle(Event::Discard { token: token(1) }),
        vec![Effect::Run(Job::Discard { token: token(1) })]
    );
    assert_eq!(
        state.handle(Event::Commit { token: token(1) }),
        vec![Effect::Ignore(Ignored::NotPending { what: "commit", token: token(1) })]
    );
}

#[test]
fn commit_is_refused_before_anything_is_prepared() {
    let mut state = ready();
    state.handle(execute(token(1)));
    assert_eq!(
        state.handle(Event::Commit { token: token(1) }),
        vec![Effect::Ignore(Ignored::NotPending { what: "commit", token: token(1) })]
    );
}

#[test]
fn commit_twice_is_applied_once() {
    let mut state = with_prepared();
    state.handle(Event::Commit { token: token(1) });
    assert_eq!(
        state.handle(Event::Commit { token: token(1) }),
        vec![Effect::Ignore(Ignored::NotPending { what: "commit", token: token(1) })]
    );
}

#[test]
fn a_failed_operation_waits_for_its_discard() {
    let mut state = ready();
    state.handle(execute(token(1)));
    let failure = Failure { error: error("no memory"), blame: Blame::Environment };
    assert_eq!(
        state.handle(Event::Done(Done::Executed { token: token(1), result: Err(failure) })),
        vec![message(NodeMessage::OperationFailed {
            token: token(1),
            rank: RankIndex(0),
            error: error("no memory"),
            blame: Blame::Environment,
        })]
    );
    assert_eq!(
        state.handle(Event::Discard { token: token(1) }),
        vec![Effect::Run(Job::Discard { token: token(1) })]
    );
}

#[test]
fn an_execute_drops_what_the_last_one_left() {
    let mut state = with_prepared();
    assert_eq!(state.handle(execute(token(2))), vec![Effect::Run(Job::Discard { token: token(1) })]);
    assert_eq!(
        state.handle(APPLIED),
        vec![Effect::Run(Job::Execute { token: token(2), operation: operation() })]
    );
}

#[test]
fn a_discard_while_computing_silences_the_result() {
    let mut state = ready();
    state.handle(execute(token(1)));
    assert_eq!(state.handle(Event::Discard { token: token(1) }), vec![]);
    assert_eq!(state.handle(executed(token(1), 1)), vec![Effect::Run(Job::Discard { token: token(1) })]);
}

#[test]
fn execute_is_refused_once_a_later_sequence_was_seen() {
    let mut state = with_prepared();
    assert_eq!(state.handle(execute(token(1))), stale_effect("execute", token(1)));
    state.handle(Event::Commit { token: token(1) });
    assert_eq!(state.handle(execute(token(1))), stale_effect("execute", token(1)));
}

#[test]
fn execute_is_refused_once_a_later_incarnation_was_seen() {
    let mut state = ready();
    let second_life = OpToken { incarnation: 2, ..token(1) };
    state.handle(execute(second_life));
    state.handle(executed(second_life, 0));
    state.handle(Event::Commit { token: second_life });
    state.handle(APPLIED);
    assert_eq!(state.handle(execute(token(2))), stale_effect("execute", token(2)));
}

#[test]
fn every_message_of_an_older_generation_or_epoch_is_refused() {
    let older_generation = OpToken { generation: Generation(0), ..token(1) };
    let older_epoch = OpToken { epoch: Epoch(0), generation: Generation(9), ..token(1) };
    for old in [older_generation, older_epoch] {
        let mut state = with_prepared();
        assert_eq!(state.handle(execute(old)), stale_effect("execute", old));
        assert_eq!(state.handle(Event::Commit { token: old }), stale_effect("commit", old));
        assert_eq!(state.handle(Event::Discard { token: old }), stale_effect("discard", old));
        assert_eq!(state.handle(Event::TakeSnapshot { token: old }), stale_effect("snapshot", old));
        // What is prepared is still there to be committed.
        assert_eq!(
            state.handle(Event::Commit { token: token(1) }),
            vec![Effect::Run(Job::Commit { token: token(1) })]
        );
    }
}

#[test]
fn execute_for_a_rank_set_that_was_never_formed_is_answered() {
    let unknown = OpToken { generation: Generation(2), ..token(1) };
    assert_eq!(
        ready().handle(execute(unknown)),
        vec![refuse(unknown, RankIndex(0), "this node holds no such rank")]
    );
}

#[test]
fn execute_while_computing_or_forming_is_answered() {
    let mut state = ready();
    state.handle(execute(token(1)));
    assert_eq!(
        state.handle(execute(token(2))),
        vec![refuse(token(2), RankIndex(0), &format!("the rank still computes {}", token(1)))]
    );
    let mut forming = RankState::default();
    forming.handle(Event::Form(formation(RUN, 1, 1)));
    assert_eq!(
        forming.handle(execute(token(1))),
        vec![refuse(token(1), RankIndex(0), "the rank is still being formed")]
    );
}

#[test]
fn a_formation_not_newer_than_the_last_is_refused() {
    let mut state = ready();
    for (epoch, generation) in [(1, 1), (1, 0), (0, 5)] {
        assert_eq!(
            state.handle(Event::Form(formation(RUN, epoch, generation))),
            vec![Effect::Ignore(Ignored::StaleFormation {
                run: RUN,
                epoch: Epoch(epoch),
                generation: Generation(generation),
            })]
        );
    }
}

#[test]
fn a_released_run_remembers_its_generation() {
    let mut state = ready();
    assert_eq!(
        state.handle(Event::Release { run: RUN, generation: Generation(1) }),
        vec![
            Effect::Abort { run: RUN, generation: Generation(1) },
            Effect::Run(Job::Drop { run: RUN, generation: Generation(1) }),
        ]
    );
    assert_eq!(state.handle(execute(token(1))), stale_effect("execute", token(1)));
    assert!(matches!(
        state.handle(Event::Form(formation(RUN, 1, 1)))[..],
        [Effect::Ignore(Ignored::StaleFormation { .. })]
    ));
}

#[test]
fn releasing_an_older_generation_leaves_the_present_one() {
    assert_eq!(ready().handle(Event::Release { run: RUN, generation: Generation(0) }), vec![]);
}

#[test]
fn a_release_breaks_what_runs_and_takes_back_what_waits() {
    let mut state = ready();
    state.handle(execute(token(1)));
    state.handle(Event::TakeSnapshot { token: token(1) });
    assert_eq!(
        state.handle(Event::Release { run: RUN, generation: Generation(1) }),
        vec![Effect::Abort { run: RUN, generation: Generation(1) }]
    );
    // The broken operation's result is nobody's, and the snapshot is gone from the queue.
    let failure = Failure { error: error("called off"), blame: Blame::Environment };
    assert_eq!(
        state.handle(Event::Done(Done::Executed { token: token(1), result: Err(failure) })),
        vec![Effect::Run(Job::Drop { run: RUN, generation: Generation(1) })]
    );
    assert_eq!(state.handle(APPLIED), vec![]);
}

#[test]
fn a_new_generation_replaces_the_old_while_it_computes() {
    let mut state = ready();
    state.handle(execute(token(1)));
    let second = formation(RUN, 1, 2);
    assert_eq!(
        state.handle(Event::Form(second.clone())),
        vec![Effect::Abort { run: RUN, generation: Generation(1) }]
    );
    assert_eq!(
        state.handle(executed(token(1), 1)),
        vec![Effect::Run(Job::Drop { run: RUN, generation: Generation(1) })]
    );
    assert_eq!(state.handle(APPLIED), vec![Effect::Run(Job::Form(second.clone()))]);
    assert_eq!(state.handle(formed(&second)), vec![report_formed(2, Ok(()))]);
}

#[test]
fn a_failed_formation_is_reported_and_forgotten() {
    let mut state = RankState::default();
    state.handle(Event::Form(formation(RUN, 1, 1)));
    let (epoch, generation) = (Epoch(1), Generation(1));
    let result = Err(error("no such model"));
    assert_eq!(
        state.handle(Event::Done(Done::Formed {
            run: RUN,
            epoch,
            generation,
            result: result.clone().map_err(Into::into)
        })),
        vec![
            Effect::Abort { run: RUN, generation },
            report_formed(1, result),
            Effect::Run(Job::Drop { run: RUN, generation }),
        ]
    );
}

#[test]
fn losing_the_coordinator_drops_every_run() {
    let mut state = ready();
    let other = Formation { epoch: Epoch(1), ..formation(RunId(8), 1, 3) };
    state.handle(Event::Form(other));
    assert_eq!(
        state.handle(Event::Disconnected),
        vec![
            Effect::Abort { run: RUN, generation: Generation(1) },
            Effect::Abort { run: RunId(8), generation: Generation(3) },
        ]
    );
    // The next coordinator numbers its generations as it likes, but may not be an older one.
    assert!(matches!(
        state.handle(Event::Form(formation(RUN, 0, 9)))[..],
        [Effect::Ignore(Ignored::StaleFormation { .. })]
    ));
    assert_eq!(state.handle(Event::Form(formation(RUN, 1, 1))), vec![]);
}

#[test]
fn a_snapshot_is_taken_in_the_order_of_the_messages() {
    let mut state = with_prepared();
    state.handle(Event::Commit { token: token(1) });
    assert_eq!(state.handle(Event::TakeSnapshot { token: token(1) }), vec![]);
    assert_eq!(state.handle(execute(token(2))), vec![]);
    assert_eq!(state.handle(APPLIED), vec![Effect::Run(Job::Snapshot { token: token(1) })]);
    // Storing it takes its time; the next operation does not wait.
    assert_eq!(
        state.handle(Event::Done(Done::Snapshot { token: token(1), result: Ok(()) })),
        vec![Effect::Run(Job::Execute { token: token(2), operation: operation() })]
    );
    let snapshot = BlobRef { digest: Digest::of(b"state"), size: 5 };
    assert_eq!(
        state.handle(Event::SnapshotStored { token: token(1), result: Ok(snapshot) }),
        vec![message(NodeMessage::SnapshotTaken { token: token(1), snapshot })]
    );
}

#[test]
fn one_snapshot_of_a_run_at_a_time() {
    let mut state = with_prepared();
    state.handle(Event::TakeSnapshot { token: token(1) });
    assert!(matches!(
        &state.handle(Event::TakeSnapshot { token: token(1) })[..],
        [Effect::Report(RankReport::Message(NodeMessage::SnapshotFailed { error, .. }))]
            if error.kind == ErrorKind::Unavailable
    ));
}

#[test]
fn a_snapshot_that_cannot_be_stored_is_reported_and_the_next_may_be_taken() {
    let mut state = with_prepared();
    let take = Event::TakeSnapshot { token: token(1) };
    state.handle(take.clone());
    state.handle(Event::Done(Done::Snapshot { token: token(1), result: Ok(()) }));
    assert_eq!(
        state.handle(Event::SnapshotStored { token: token(1), result: Err(error("disk full")) }),
        vec![message(NodeMessage::SnapshotFailed { token: token(1), error: error("disk full") })]
    );
    assert_eq!(state.handle(take), vec![Effect::Run(Job::Snapshot { token: token(1) })]);
}

#[test]
fn a_snapshot_is_left_to_rank_zero() {
    let mut state = RankState::default();
    let form = Formation { rank: RankIndex(1), ..formation(RUN, 1, 1) };
    state.handle(Event::Form(form.clone()));
    state.handle(formed(&form));
    assert_eq!(
        state.handle(Event::TakeSnapshot { token: token(1) }),
        vec![Effect::Ignore(Ignored::NotRankZero { token: token(1) })]
    );
}

#[test]
fn a_slot_holds_a_bounded_number_of_runs() {
    let mut state = RankState::default();
    for run in 0..MAX_RUNS as u64 {
        state.handle(Event::Form(formation(RunId(run), 1, 1)));
    }
    assert!(matches!(
        &state.handle(Event::Form(formation(RunId(999), 1, 1)))[..],
        [Effect::Report(RankReport::Formed { result: Err(error), .. })]
            if error.error.kind == ErrorKind::ResourceExhausted
    ));
}

#[test]
fn the_thread_gets_one_job_at_a_time_whatever_comes() {
    // A load is like any other operation to the state; two runs share the one thread.
    let source =
        LoadSource { target: CheckpointTarget::Trainer, blob: BlobRef { digest: Digest::of(b"x"), size: 1 } };
    let load = Operation::LoadState { path: "p".to_owned(), with_optimizer: true, source: Some(source) };
    let mut state = ready();
    let other = formation(RunId(8), 1, 1);
    let events = vec![
        Event::Execute { token: token(1), operation: load },
        Event::Form(other.clone()),
        Event::TakeSnapshot { token: token(0) },
        executed(token(1), 0),
        Event::Commit { token: token(1) },
        formed(&other),
        Event::Release { run: RUN, generation: Generation(1) },
        APPLIED,
        APPLIED,
    ];
    let mut running = 0;
    for event in events {
        running -= i32::from(matches!(event, Event::Done(_)));
        let effects = state.handle(event);
        running += effects.iter().filter(|effect| matches!(effect, Effect::Run(_))).count() as i32;
        assert!((0..=1).contains(&running), "{running} jobs at once after {effects:?}");
    }
}

use super::*;

/// A journal with one run, and what it says to `records`.
fn refused(before: Vec<Record>, records: Vec<Record>) -> (String, String) {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![session(1), run(1), run(2)]).unwrap();
    if !before.is_empty() {
        write(&journal, before).unwrap();
    }
    match write(&journal, records).unwrap_err() {
        JournalError::Refused { record, reason } => (record, reason),
        other => panic!("{other}"),
    }
}

#[test]
fn a_key_used_twice_in_a_run_is_refused() {
    let (record, _) = refused(vec![operation(1, 1, 7, step())], vec![operation(1, 2, 7, step())]);
    assert_eq!(record, "operation 2 of run-1");
}

#[test]
fn a_key_may_be_used_in_another_run() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![session(1), run(1), run(2)]).unwrap();
    write(&journal, vec![operation(1, 1, 7, step()), operation(2, 1, 7, step())]).unwrap();
}

#[test]
fn a_number_given_to_another_operation_is_refused() {
    let (_, reason) = refused(vec![operation(1, 1, 7, step())], vec![operation(1, 1, 8, step())]);
    assert!(reason.contains("another operation"), "{reason}");
    let other_kind = Operation::SaveState { name: "a".into(), ttl_seconds: None };
    let (_, reason) = refused(vec![operation(1, 1, 7, step())], vec![operation(1, 1, 7, other_kind)]);
    assert!(reason.contains("another operation"), "{reason}");
}

#[test]
fn an_operation_of_no_run_is_refused() {
    assert_eq!(refused(vec![], vec![operation(9, 1, 1, step())]).0, "operation 1 of run-9");
}

#[test]
fn a_run_of_no_session_is_refused() {
    let orphan = Record::Run {
        run: RunId(5),
        create: create(9),
        model_digest: Digest::of(b""),
        key: None,
        created_at_ms: 0,
    };
    assert_eq!(refused(vec![], vec![orphan]).0, "run-5");
}

#[test]
fn a_session_or_run_given_out_twice_is_refused() {
    assert_eq!(refused(vec![], vec![session(1)]).0, "session-1");
    assert_eq!(refused(vec![], vec![run(1)]).0, "run-1");
}

#[test]
fn an_outcome_of_nothing_is_refused() {
    assert_eq!(refused(vec![], vec![failed(1, 1)]).0, "the outcome of operation 1 of run-1");
}

#[test]
fn a_second_outcome_is_refused() {
    let before = vec![operation(1, 1, 1, step()), done(1, 1, stepped())];
    assert_eq!(refused(before, vec![failed(1, 1)]).0, "the outcome of operation 1 of run-1");
}

#[test]
fn pruning_without_a_snapshot_to_go_on_from_is_refused() {
    let before = vec![operation(1, 1, 1, step()), snapshot(1, 1, 1), operation(1, 2, 2, step())];
    let prune = |base, upto| {
        vec![Record::Prune { run: RunId(1), base: OperationSeq(base), upto: OperationSeq(upto) }]
    };
    let (_, reason) = refused(before.clone(), prune(2, 1));
    assert!(reason.contains("no snapshot"), "{reason}");
    let (_, reason) = refused(before, prune(1, 2));
    assert!(reason.contains("are needed"), "{reason}");
}

#[test]
fn a_payload_over_the_limit_is_refused() {
    let huge = Payload::Inline(vec![0; crate::protocol::MAX_MESSAGE]);
    let (_, reason) = refused(vec![], vec![operation(1, 1, 1, forward_backward(huge))]);
    assert!(reason.contains("over the limit"), "{reason}");
}

#[test]
fn a_number_past_what_sqlite_holds_is_refused() {
    assert!(refused(vec![], vec![session(1 << 63)]).1.contains("over the limit"));
}

#[test]
fn a_refused_append_leaves_nothing_and_disturbs_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let (answer, answers) = mpsc::channel();
    let appends = [
        vec![session(1)],
        vec![session(2), operation(1, 1, 1, step())],
        vec![session(3)],
        vec![session(4), session(3)],
        vec![session(5)],
    ];
    for (i, records) in appends.into_iter().enumerate() {
        let answer = answer.clone();
        journal.append(records, Box::new(move |outcome| answer.send((i, outcome.is_ok())).unwrap()));
    }
    journal.close();
    drop(answer);
    let verdicts: Vec<_> = answers.into_iter().collect();
    assert_eq!(verdicts, [(0, true), (1, false), (2, true), (3, false), (4, true)]);
    assert_eq!(recover(directory.path()).sessions, [1, 3, 5].map(SessionId));
}

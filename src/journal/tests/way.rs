//! How a run came to a step, and copies.

use super::*;

/// Run 3 with steps 1 to 6, of which 5 was not finite, a pass without effect before step 4, and snapshots
/// after 2 and 4. The numbers of operations and steps are the same but for the last.
fn history(journal: &Journal) {
    let forward =
        Operation::Forward { loss: LossSpec::new(LossFn::CrossEntropy), data: Payload::Blob(blob(1)) };
    let output = OperationResult::ForwardBackward(Payload::Inline(vec![1]));
    let facts = vec![
        session(1),
        run(3),
        operation(3, 1, 1, step()),
        done(3, 1, stepped()),
        operation(3, 2, 2, step()),
        done(3, 2, stepped()),
        snapshot(3, 2, 12),
        operation(3, 3, 3, forward),
        done(3, 3, output),
        operation(3, 4, 4, step()),
        done(3, 4, stepped()),
        snapshot(3, 4, 14),
        operation(3, 5, 5, step()),
        failed(3, 5),
        operation(3, 6, 6, step()),
        done(3, 6, stepped()),
        operation(3, 7, 7, step()),
    ];
    write(journal, facts).unwrap();
}

fn way_to(journal: &Journal, step: u64, recompute: bool) -> Way {
    let (answer, answered) = mpsc::channel();
    journal.way_to(RunId(3), Goal { step, recompute }, move |way| answer.send(way).unwrap());
    answered.recv().unwrap().unwrap()
}

/// The snapshot's operation, and the operations behind it.
fn numbers(way: Way) -> (Option<u64>, Vec<u64>) {
    match way {
        Way::To { from, operations } => {
            assert!(operations.iter().all(|entry| entry.operation.is_some() && entry.outcome.is_some()));
            (from.map(|snapshot| snapshot.seq.0), operations.iter().map(|entry| entry.seq.0).collect())
        }
        Way::Beyond { reach } => panic!("beyond {reach:?}"),
    }
}

#[test]
fn the_way_to_a_step_begins_at_the_nearest_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    history(&journal);
    assert_eq!(numbers(way_to(&journal, 2, false)), (Some(2), vec![]));
    assert_eq!(numbers(way_to(&journal, 4, false)), (Some(4), vec![]));
    // Without the pass that changed nothing.
    assert_eq!(numbers(way_to(&journal, 4, true)), (Some(2), vec![4]));
    // With the step that was not finite: it cleared the gradient.
    assert_eq!(numbers(way_to(&journal, 6, true)), (Some(4), vec![5, 6]));
}

#[test]
fn a_run_without_snapshots_is_followed_from_its_beginning() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![session(1), run(3), operation(3, 1, 1, step()), done(3, 1, stepped())]).unwrap();
    assert_eq!(numbers(way_to(&journal, 1, true)), (None, vec![1]));
    assert_eq!(way_to(&journal, 2, true), Way::Beyond { reach: Some((1, 1)) });
}

#[test]
fn beyond_history_it_says_how_far_that_goes() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![session(1), run(3)]).unwrap();
    assert_eq!(way_to(&journal, 0, false), Way::Beyond { reach: None });
    drop(journal);
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    history(&journal);
    assert_eq!(way_to(&journal, 7, false), Way::Beyond { reach: Some((2, 6)) });
    assert_eq!(way_to(&journal, 1, false), Way::Beyond { reach: Some((2, 6)) });
    // The oldest snapshot is where it begins: what led to it is not kept.
    assert_eq!(way_to(&journal, 2, true), Way::Beyond { reach: Some((4, 6)) });
    let prune = Record::Prune { run: RunId(3), base: OperationSeq(4), upto: OperationSeq(2) };
    write(&journal, vec![prune]).unwrap();
    assert_eq!(way_to(&journal, 2, false), Way::Beyond { reach: Some((4, 6)) });
    assert_eq!(way_to(&journal, 4, true), Way::Beyond { reach: Some((6, 6)) });
}

#[test]
fn a_copy_is_a_journal_that_names_the_same_blobs() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    history(&journal);
    let copies = tempfile::tempdir().unwrap();
    let copy = copies.path().join(FILE);
    let (answer, answered) = mpsc::channel();
    journal.copy(&copy, move |result| answer.send(result).unwrap());
    answered.recv().unwrap().unwrap();
    let named_by_copy = named_blobs(&copy).unwrap();
    assert_eq!(named_by_copy, by_digest([1, 12, 14]));
    // What came after it is not in it.
    write(&journal, vec![done(3, 7, stepped())]).unwrap();
    journal.close();
    let (original, copied) = (recover(directory.path()), recover(copies.path()));
    assert_eq!(copied.runs[0].operations[..6], original.runs[0].operations[..6]);
    assert_eq!(copied.runs[0].operations[6].outcome, None);
    assert_eq!(copied.epoch, original.epoch, "each start raises it, here as there");
    // Over a file that is there, nothing is written.
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let (answer, answered) = mpsc::channel();
    journal.copy(&copy, move |result| answer.send(result).unwrap());
    assert!(answered.recv().unwrap().is_err());
}

use std::collections::BTreeSet;

use crate::transport::Role;

use super::*;

#[test]
fn every_record_is_recovered_as_it_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, first) = Journal::open(directory.path()).unwrap();
    let empty = Recovered {
        epoch: Epoch(1),
        sessions: vec![],
        owners: Default::default(),
        runs: vec![],
        last_run: 0,
        checkpoints: vec![],
        drained: Default::default(),
        certificates: vec![],
        revoked: Default::default(),
    };
    assert_eq!(first, empty);

    let inline = forward_backward(Payload::Inline(vec![0; 64 << 10]));
    let large = forward_backward(Payload::Blob(blob(1)));
    let output = OperationResult::ForwardBackward(Payload::Blob(blob(2)));
    let path = SaveWeightsResponse { path: "bt://loops:run-3/weights/a".into() };
    let facts = vec![
        session(1),
        run(3),
        operation(3, 1, 1, inline.clone()),
        done(3, 1, stepped()),
        operation(3, 2, 2, large.clone()),
        done(3, 2, output.clone()),
        operation(3, 3, 3, step()),
        failed(3, 3),
        operation(3, 4, 4, step()),
        snapshot(3, 1, 3),
        snapshot(3, 2, 4),
        saved(1, 3, CheckpointTarget::Trainer, "a", &[5]),
        saved(2, 3, CheckpointTarget::Sampler, "a", &[6, 7, 7]),
        slot(3, 0, 9),
        slot(3, 1, 8),
    ];
    for fact in facts {
        write(&journal, vec![fact]).unwrap();
    }
    write(&journal, vec![operation(3, 5, 5, step()), done(3, 5, OperationResult::SaveState(path.clone()))])
        .unwrap();
    journal.close();

    let recovered = recover(directory.path());
    assert_eq!((recovered.epoch, recovered.sessions), (Epoch(2), vec![SessionId(1)]));
    let expected = |seq: u64, operation: Operation, outcome: Option<Outcome>| RecoveredOperation {
        seq: OperationSeq(seq),
        key: OperationKey([seq as u8; 16]),
        incarnation: 1,
        digest: Digest::of(&crate::protocol::encode(&operation)),
        operation: Some(operation),
        outcome,
    };
    let without_data = |operation| RecoveredOperation { operation: None, ..operation };
    let snapshot = |seq, n, payload_bytes| RecoveredSnapshot {
        seq: OperationSeq(seq),
        blob: blob(n),
        standing: standing(seq),
        payload_bytes,
    };
    let outcome = |record: Record| match record {
        Record::Outcome { outcome, .. } => Some(outcome),
        _ => None,
    };
    let [found] = recovered.runs.try_into().unwrap();
    assert_eq!(
        found,
        RecoveredRun {
            run: RunId(3),
            create: create(1),
            model_digest: Digest::of(b"model"),
            key: None,
            created_at_ms: 5,
            // Operation 2 holds the blobs of 1 and 2 bytes.
            snapshots: vec![snapshot(1, 3, 0), snapshot(2, 4, 3)],
            operations: vec![
                without_data(expected(1, inline, outcome(done(3, 1, stepped())))),
                without_data(expected(2, large, outcome(done(3, 2, output)))),
                expected(3, step(), outcome(failed(3, 3))),
                expected(4, step(), None),
                expected(5, step(), outcome(done(3, 5, OperationResult::SaveState(path)))),
            ],
            slots: vec![(policy(3, 0), blob(9)), (policy(3, 1), blob(8))],
        }
    );
    let names: Vec<_> = recovered
        .checkpoints
        .iter()
        .map(|c| (c.checkpoint.id.0, c.files.len(), c.policy.is_some(), c.published))
        .collect();
    assert_eq!(names, [(1, 1, false, false), (2, 3, true, true)]);
    assert_eq!(named(directory.path()), by_digest(1..=9));
}

#[test]
fn a_journaled_load_is_replaced_by_its_resolved_form() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let load = |source| Operation::LoadState {
        path: "bt://loops:run-1/weights/a".into(),
        with_optimizer: true,
        source,
    };
    let source = LoadSource { target: CheckpointTarget::Trainer, blob: blob(9) };
    write(&journal, vec![session(1), run(1), operation(1, 1, 1, load(None))]).unwrap();
    write(&journal, vec![operation(1, 1, 1, load(Some(source))), done(1, 1, stepped())]).unwrap();
    journal.close();
    let recovered = recover(directory.path());
    assert_eq!(recovered.runs[0].operations[0].operation, Some(load(Some(source))));
    assert_eq!(named(directory.path()), [blob(9)]);
}

#[test]
fn a_load_that_waits_for_its_turn_holds_the_blob_that_its_path_names() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let load = Operation::LoadState { path: blob(9).load_path(), with_optimizer: false, source: None };
    write(&journal, vec![session(1), run(1), operation(1, 1, 1, load)]).unwrap();
    journal.close();
    assert_eq!(named(directory.path()), [blob(9)]);
}

#[test]
fn a_checkpoint_saved_again_replaces_the_first_and_frees_its_blobs() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![saved(1, 1, CheckpointTarget::Trainer, "a", &[1, 2])]).unwrap();
    write(&journal, vec![saved(2, 1, CheckpointTarget::Trainer, "b", &[2])]).unwrap();
    write(&journal, vec![saved(3, 1, CheckpointTarget::Trainer, "a", &[3])]).unwrap();
    journal.close();
    let recovered = recover(directory.path());
    let ids: Vec<_> = recovered.checkpoints.iter().map(|saved| saved.checkpoint.id.0).collect();
    assert_eq!(ids, [2, 3]);
    assert_eq!(named(directory.path()), by_digest([2, 3]));
}

#[test]
fn a_dropped_checkpoint_frees_its_blobs_and_dropping_it_again_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![saved(1, 1, CheckpointTarget::Sampler, "a", &[1, 2])]).unwrap();
    write(&journal, vec![saved(2, 1, CheckpointTarget::Sampler, "b", &[2])]).unwrap();
    for _ in 0..2 {
        write(&journal, vec![Record::DropCheckpoint { checkpoint: CheckpointId(1) }]).unwrap();
    }
    journal.close();
    assert_eq!(recover(directory.path()).checkpoints[0].checkpoint.id, CheckpointId(2));
    assert_eq!(named(directory.path()), [blob(2)]);
}

#[test]
fn a_publish_replaces_the_slot_and_frees_its_blob() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![session(1), run(1), slot(1, 1, 1)]).unwrap();
    write(&journal, vec![slot(1, 2, 2)]).unwrap();
    journal.close();
    let recovered = recover(directory.path());
    assert_eq!(recovered.runs[0].slots, [(policy(1, 2), blob(2))]);
    assert_eq!(named(directory.path()), [blob(2)]);
}

#[test]
fn version_zero_keeps_its_slot_until_both_are_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, vec![session(1), run(1), run(2), slot(2, 1, 3)]).unwrap();
    write(&journal, vec![slot(1, 0, 1), slot(1, 1, 2)]).unwrap();
    journal.close();
    let (journal, recovered) = Journal::open(directory.path()).unwrap();
    assert_eq!(recovered.runs[0].slots, [(policy(1, 0), blob(1)), (policy(1, 1), blob(2))]);
    write(&journal, vec![Record::DropSlots { run: RunId(1) }]).unwrap();
    journal.close();
    let recovered = recover(directory.path());
    assert_eq!(recovered.runs[0].slots, []);
    assert_eq!(recovered.runs[1].slots, [(policy(2, 1), blob(3))], "another run's stays");
    assert_eq!(named(directory.path()), [blob(3)]);
}

#[test]
fn pruning_forgets_up_to_a_snapshot_and_frees_the_blobs() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let data = |n| forward_backward(Payload::Blob(blob(n)));
    let output = |n| OperationResult::ForwardBackward(Payload::Blob(blob(n)));
    let mut facts = vec![session(1), run(1)];
    for seq in 1..=4 {
        let n = seq as u8;
        facts.extend([operation(1, seq, n, data(n)), done(1, seq, output(10 + n)), snapshot(1, seq, 20 + n)]);
    }
    facts.push(operation(1, 5, 5, data(5)));
    write(&journal, facts).unwrap();
    let (base, upto) = (OperationSeq(3), OperationSeq(2));
    write(&journal, vec![Record::Prune { run: RunId(1), base, upto }]).unwrap();
    journal.close();
    let recovered = recover(directory.path());
    let left: Vec<_> = recovered.runs[0].operations.iter().map(|operation| operation.seq.0).collect();
    assert_eq!(left, [3, 4, 5], "3 is not forgotten, though nothing repeats it");
    let snapshots: Vec<_> = recovered.runs[0].snapshots.iter().map(|s| (s.seq.0, s.blob)).collect();
    assert_eq!(snapshots, [(3, blob(23)), (4, blob(24))]);
    assert_eq!(named(directory.path()), by_digest([13, 4, 14, 5, 23, 24]), "3 has let go of its data");
}

#[test]
fn a_publish_that_failed_after_all_has_that_outcome_and_no_slot() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let save = |seq, publish| {
        operation(
            1,
            seq,
            seq as u8,
            Operation::SaveWeightsForSampler { name: "a".into(), publish, ttl_seconds: None },
        )
    };
    let path = "bt://loops:run-1/sampler_weights/a".to_owned();
    let response = crate::types::SaveWeightsForSamplerResponse { path, version: 2 };
    let saved = OperationResult::SaveWeightsForSampler(response);
    let facts = vec![session(1), run(1), save(1, true), done(1, 1, saved), slot(1, 2, 2), slot(1, 0, 1)];
    write(&journal, facts).unwrap();
    let error = OperationError::new(ErrorKind::Unavailable, "no sampler");
    let fails = |seq, step| Record::PublishFailed {
        run: RunId(1),
        seq: OperationSeq(seq),
        policy: policy(1, step),
        error: error.clone(),
    };
    write(&journal, vec![fails(1, 2), slot(1, 1, 3)]).unwrap();
    assert!(
        matches!(write(&journal, vec![fails(1, 2)]), Err(JournalError::Refused { .. })),
        "it failed before"
    );
    write(&journal, vec![operation(1, 2, 2, step()), done(1, 2, stepped())]).unwrap();
    assert!(
        matches!(write(&journal, vec![fails(2, 2)]), Err(JournalError::Refused { .. })),
        "it is no publish"
    );
    journal.close();
    let recovered = recover(directory.path());
    assert_eq!(recovered.runs[0].operations[0].outcome, Some(Outcome::Failed { error }));
    assert_eq!(recovered.runs[0].slots, [(policy(1, 0), blob(1)), (policy(1, 1), blob(3))]);
    assert_eq!(named(directory.path()), by_digest([1, 3]));
}

#[test]
fn the_epoch_rises_at_every_open() {
    let directory = tempfile::tempdir().unwrap();
    let epochs: Vec<_> = (0..3).map(|_| recover(directory.path()).epoch.0).collect();
    assert_eq!(epochs, [1, 2, 3]);
}

#[test]
fn a_dropped_run_leaves_nothing_but_its_number() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    for run_id in [1, 2] {
        let pass = forward_backward(Payload::Blob(blob(run_id as u8)));
        let records = vec![
            run(run_id),
            operation(run_id, 1, 1, pass),
            done(run_id, 1, stepped()),
            snapshot(run_id, 1, 3 + run_id as u8),
            saved(run_id, run_id, CheckpointTarget::Trainer, "a", &[6 + run_id as u8]),
            slot(run_id, 1, 8 + run_id as u8),
        ];
        let begin = if run_id == 1 { vec![session(1)] } else { vec![] };
        write(&journal, [begin, records].concat()).unwrap();
    }
    write(&journal, vec![Record::DropRun { run: RunId(2) }]).unwrap();
    journal.close();
    let recovered = recover(directory.path());
    assert_eq!((recovered.runs.len(), recovered.checkpoints.len(), recovered.last_run), (1, 1, 2));
    assert_eq!(named(directory.path()), by_digest([1, 4, 7, 9]));
}

#[test]
fn what_is_known_of_nodes_and_certificates_is_recovered() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let known = |role, name: &str, issued_at| KnownCertificate {
        role,
        name: name.into(),
        ca: Digest::of(b"a CA"),
        issued_at,
        expires_at: issued_at + 100,
    };
    let revoked = |name: &str, upto| Record::Revoked { role: Role::Node, name: name.into(), upto };
    let drained = |node: &str, drained| Record::Drained { node: node.into(), drained };
    let facts = vec![
        drained("a", true),
        drained("b", true),
        drained("b", true),
        drained("a", false),
        drained("never", false),
        Record::Certificate(known(Role::Node, "a", 1)),
        Record::Certificate(known(Role::Client, "a", 2)),
        Record::Certificate(known(Role::Node, "a", 3)),
        Record::Certificate(known(Role::Gateway, "gone", 4)),
        Record::ForgetCertificate { role: Role::Gateway, name: "gone".into() },
        revoked("a", 7),
        revoked("b", 8),
        revoked("a", 9),
    ];
    write(&journal, facts).unwrap();
    journal.close();
    let recovered = recover(directory.path());
    assert_eq!(recovered.drained, BTreeSet::from(["b".to_owned()]));
    assert_eq!(recovered.certificates, [known(Role::Client, "a", 2), known(Role::Node, "a", 3)]);
    let upto = |name: &str, upto| ((Role::Node, name.to_owned()), upto);
    assert_eq!(recovered.revoked, BTreeMap::from([upto("a", 9), upto("b", 8)]));
}

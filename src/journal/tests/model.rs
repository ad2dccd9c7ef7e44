//! Random facts against a journal and against the same rules over maps.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// What the journal should hold.
#[derive(Debug, Clone, Default)]
struct Model {
    sessions: BTreeSet<u64>,
    runs: BTreeSet<u64>,
    operations: BTreeMap<(u64, u64), ModelOperation>,
    snapshots: BTreeMap<(u64, u64), (BlobRef, Standing)>,
    checkpoints: BTreeMap<(u64, CheckpointTarget, String), SavedCheckpoint>,
    /// By run, and whether it is not of version 0.
    slots: BTreeMap<(u64, bool), (PolicyId, BlobRef)>,
    last_deleted: u64,
    drained: BTreeSet<String>,
}

#[derive(Debug, Clone)]
struct ModelOperation {
    key: u8,
    operation: Operation,
    outcome: Option<Outcome>,
    /// Its data is still held.
    holds: bool,
}

impl ModelOperation {
    fn held(&self) -> Vec<BlobRef> {
        let mut held = Vec::new();
        if let Operation::ForwardBackward { data: Payload::Blob(blob), .. } = &self.operation
            && self.holds
        {
            held.push(*blob);
        }
        if let Some(Outcome::Done { result: OperationResult::ForwardBackward(Payload::Blob(blob)), .. }) =
            &self.outcome
        {
            held.push(*blob);
        }
        held
    }

    fn is_pass(&self) -> bool {
        matches!(self.operation, Operation::ForwardBackward { .. })
    }
}

impl Model {
    /// Whether the facts follow from what is there; if one does not, none is taken.
    fn append(&mut self, records: &[Record]) -> bool {
        let mut next = self.clone();
        let taken = records.iter().all(|record| next.take(record));
        if taken {
            *self = next;
        }
        taken
    }

    fn take(&mut self, record: &Record) -> bool {
        match record.clone() {
            Record::Session { session, .. } => self.sessions.insert(session.0),
            Record::Run { run, create, .. } => {
                self.sessions.contains(&create.session.0) && self.runs.insert(run.0)
            }
            Record::Operation { run, seq, key, operation, .. } => {
                let key = key.0[0];
                let at = (run.0, seq.0);
                let elsewhere =
                    |((r, s), o): (&(u64, u64), &ModelOperation)| *r == run.0 && *s != seq.0 && o.key == key;
                if !self.runs.contains(&run.0) || self.operations.iter().any(elsewhere) {
                    return false;
                }
                let same_kind =
                    |old: &Operation| std::mem::discriminant(old) == std::mem::discriminant(&operation);
                match self.operations.get_mut(&at) {
                    Some(old) if old.key == key && same_kind(&old.operation) => {
                        (old.operation, old.holds) = (operation, true);
                    }
                    Some(_) => return false,
                    None => {
                        let new = ModelOperation { key, operation, outcome: None, holds: true };
                        self.operations.insert(at, new);
                    }
                }
                true
            }
            Record::Outcome { run, seq, outcome } => match self.operations.get_mut(&(run.0, seq.0)) {
                Some(ModelOperation { outcome: ended @ None, .. }) => {
                    *ended = Some(outcome);
                    true
                }
                _ => false,
            },
            Record::Snapshot { run, seq, snapshot, standing } => {
                self.snapshots.insert((run.0, seq.0), (snapshot, standing));
                self.runs.contains(&run.0)
            }
            Record::Checkpoint(saved) => {
                let checkpoint = &saved.checkpoint;
                let name = (checkpoint.run_id.0, checkpoint.target, checkpoint.checkpoint_id.clone());
                let id = checkpoint.id;
                let taken = self.checkpoints.iter().any(|(other, c)| c.checkpoint.id == id && *other != name);
                self.checkpoints.insert(name, saved);
                !taken
            }
            Record::DropCheckpoint { checkpoint } => {
                self.checkpoints.retain(|_, saved| saved.checkpoint.id != checkpoint);
                true
            }
            Record::Slot { policy, adapter, .. } => {
                self.slots.insert((policy.run.0, policy.step > 0), (policy, adapter));
                self.runs.contains(&policy.run.0)
            }
            Record::PublishFailed { .. } => unreachable!("never drawn; see `recovery`"),
            Record::DropRun { run } => {
                self.runs.remove(&run.0);
                self.operations.retain(|(r, _), _| *r != run.0);
                self.snapshots.retain(|(r, _), _| *r != run.0);
                self.slots.retain(|(r, _), _| *r != run.0);
                self.checkpoints.retain(|(r, ..), _| *r != run.0);
                self.last_deleted = self.last_deleted.max(run.0);
                true
            }
            Record::DropSlots { run } => {
                self.slots.retain(|(r, _), _| *r != run.0);
                true
            }
            Record::Drained { node, drained } => {
                if drained {
                    self.drained.insert(node)
                } else {
                    self.drained.remove(&node)
                };
                true
            }
            Record::Certificate(_) | Record::ForgetCertificate { .. } | Record::Revoked { .. } => {
                unreachable!("never drawn; see `recovery`")
            }
            Record::Prune { run, base, upto } => {
                self.operations.retain(|(r, seq), _| *r != run.0 || *seq > upto.0);
                for (_, operation) in self.operations.range_mut((run.0, 0)..=(run.0, base.0)) {
                    operation.holds = false;
                }
                let known = self.snapshots.contains_key(&(run.0, base.0));
                self.snapshots.retain(|(r, seq), _| *r != run.0 || *seq >= base.0);
                known && upto <= base
            }
        }
    }

    fn recovered(&self, epoch: Epoch) -> Recovered {
        let run = |n: &u64| RecoveredRun {
            run: RunId(*n),
            create: create(1),
            model_digest: Digest::of(b"model"),
            key: None,
            created_at_ms: 5,
            snapshots: self.recovered_snapshots(*n),
            operations: self
                .operations
                .range((*n, 0)..(*n + 1, 0))
                .map(|((_, seq), operation)| RecoveredOperation {
                    seq: OperationSeq(*seq),
                    key: OperationKey([operation.key; 16]),
                    incarnation: 1,
                    operation: Some(operation.operation.clone())
                        .filter(|_| !operation.is_pass() || *seq > self.covered(*n)),
                    digest: Digest::of(&crate::protocol::encode(&operation.operation)),
                    outcome: operation.outcome.clone(),
                })
                .collect(),
            slots: self.slots.range((*n, false)..=(*n, true)).map(|(_, slot)| *slot).collect(),
        };
        let mut checkpoints: Vec<_> = self.checkpoints.values().cloned().collect();
        checkpoints.sort_by_key(|saved| saved.checkpoint.id);
        Recovered {
            epoch,
            sessions: self.sessions.iter().copied().map(SessionId).collect(),
            owners: self.sessions.iter().filter_map(|n| Some((SessionId(*n), owner(*n)?))).collect(),
            runs: self.runs.iter().map(run).collect(),
            last_run: self.runs.iter().copied().max().unwrap_or(0).max(self.last_deleted),
            checkpoints,
            drained: self.drained.clone(),
            certificates: Vec::new(),
            revoked: Default::default(),
        }
    }

    fn covered(&self, run: u64) -> u64 {
        let newest = self.snapshots.range((run, 0)..(run + 1, 0)).next_back();
        newest.map_or(0, |((_, seq), _)| *seq)
    }

    fn recovered_snapshots(&self, run: u64) -> Vec<RecoveredSnapshot> {
        let mut after = 0;
        let snapshots = self.snapshots.range((run, 0)..(run + 1, 0));
        snapshots
            .map(|((_, seq), (blob, standing))| {
                let since = self.operations.range((run, after + 1)..=(run, *seq));
                after = *seq;
                RecoveredSnapshot {
                    seq: OperationSeq(*seq),
                    blob: *blob,
                    standing: standing.clone(),
                    payload_bytes: since.flat_map(|(_, o)| o.held()).map(|blob| blob.size).sum(),
                }
            })
            .collect()
    }

    fn named(&self) -> Vec<BlobRef> {
        let mut live = BTreeMap::new();
        let mut hold = |blob: &BlobRef| {
            live.insert(blob.digest, *blob);
        };
        self.operations.values().flat_map(ModelOperation::held).for_each(|blob| hold(&blob));
        self.snapshots.values().for_each(|(blob, _)| hold(blob));
        self.checkpoints.values().flat_map(|saved| &saved.files).for_each(|file| hold(&file.blob));
        self.slots.values().for_each(|(_, adapter)| hold(adapter));
        live.into_values().collect()
    }
}

/// A fact from a small world, so that facts meet.
fn any_record() -> impl Strategy<Value = Record> {
    let run_id = 1..3u64;
    let seq = 1..5u64;
    let operations = (run_id.clone(), seq.clone(), 0..4u8, 0..4u8).prop_map(|(r, s, k, n)| match n {
        0 => operation(r, s, s as u8, step()),
        1 => operation(r, s, k, step()),
        n => operation(r, s, s as u8, forward_backward(Payload::Blob(blob(n)))),
    });
    let outcomes = (run_id.clone(), seq.clone(), 0..6u8).prop_map(|(r, s, n)| match n {
        0 => failed(r, s),
        1 => done(r, s, stepped()),
        n => done(r, s, OperationResult::ForwardBackward(Payload::Blob(blob(n)))),
    });
    let checkpoints = (1..9u64, run_id.clone(), any::<bool>(), 0..2u8, prop::collection::vec(0..9u8, 0..3))
        .prop_map(|(id, r, sampler, name, blobs)| {
            let target = if sampler { CheckpointTarget::Sampler } else { CheckpointTarget::Trainer };
            saved(id, r, target, ["a", "b"][usize::from(name)], &blobs)
        });
    prop_oneof![
        1 => (1..4u64).prop_map(session),
        1 => run_id.clone().prop_map(run),
        6 => operations,
        6 => outcomes,
        2 => (run_id.clone(), seq.clone(), 0..9u8).prop_map(|(r, s, n)| snapshot(r, s, n)),
        2 => checkpoints,
        1 => (run_id.clone(), 0..3u64, 0..9u8).prop_map(|(r, s, n)| slot(r, s, n)),
        1 => run_id.clone().prop_map(|r| Record::DropSlots { run: RunId(r) }),
        1 => run_id.clone().prop_map(|r| Record::DropRun { run: RunId(r) }),
        1 => (1..9u64).prop_map(|id| Record::DropCheckpoint { checkpoint: CheckpointId(id) }),
        2 => (run_id, seq, 0..5u64).prop_map(|(r, base, upto)| {
            Record::Prune { run: RunId(r), base: OperationSeq(base), upto: OperationSeq(upto) }
        }),
    ]
}

proptest! {
    // Each case opens a journal twice, at some 30 ms of syncing.
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_journal_recovers_what_the_rules_say(
        appends in prop::collection::vec(prop::collection::vec(any_record(), 1..4), 1..60)
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut model = Model::default();
        let begin = vec![session(1), run(1)];
        prop_assert!(model.append(&begin));
        let (journal, _) = Journal::open(directory.path()).unwrap();
        write(&journal, begin).unwrap();

        let (answer, answers) = mpsc::channel();
        for (i, records) in appends.iter().enumerate() {
            let answer = answer.clone();
            journal.append(records.clone(), Box::new(move |outcome| answer.send((i, outcome)).unwrap()));
        }
        for (i, records) in appends.iter().enumerate() {
            let (answered, outcome) = answers.recv().unwrap();
            prop_assert_eq!(answered, i);
            prop_assert_eq!(outcome.is_ok(), model.append(records), "{:?}: {:?}", records, outcome);
        }
        journal.close();
        prop_assert_eq!(recover(directory.path()), model.recovered(Epoch(2)));
        prop_assert_eq!(named(directory.path()), model.named());
    }
}

//! The journal as a value: what is durable, and appends on their way there.

use std::collections::{BTreeMap, VecDeque};

use lockstep::{
    coordinator::state::AppendId,
    journal::{Outcome, Record, Recovered, RecoveredOperation, RecoveredRun},
    protocol::{BlobRef, CreateRun, Epoch, Operation, OperationSeq, SavedFile},
    types::{Checkpoint, CheckpointTarget, Digest, PolicyId, RunId, SessionId},
};

use super::{rank::Weights, world::Blobs};

#[derive(Default)]
pub struct ModelJournal {
    /// Queued and not written; a crash loses it.
    pub queue: VecDeque<(AppendId, Vec<Record>)>,
    epoch: u64,
    sessions: Vec<SessionId>,
    runs: BTreeMap<RunId, ModelRun>,
    checkpoints: BTreeMap<(RunId, CheckpointTarget, String), Saved>,
}

type Saved = (Checkpoint, Vec<SavedFile>, Option<PolicyId>);

pub struct ModelRun {
    create: CreateRun,
    model_digest: Digest,
    pub operations: BTreeMap<OperationSeq, RecoveredOperation>,
    snapshot: Option<(OperationSeq, BlobRef)>,
    /// Of version 0, then of later ones.
    slots: BTreeMap<bool, (PolicyId, BlobRef)>,
    /// The operation that filled a slot last, and which.
    published: Option<(OperationSeq, PolicyId)>,
    /// Computed from the outcomes alone.
    pub state: Weights,
    /// What `state` was after each operation.
    states: BTreeMap<OperationSeq, Weights>,
}

impl ModelJournal {
    /// Makes records durable, checking each against the reference state.
    pub fn write(&mut self, records: Vec<Record>, blobs: &mut Blobs) {
        for record in records {
            self.write_record(record, blobs);
        }
    }

    fn write_record(&mut self, record: Record, blobs: &mut Blobs) {
        match record {
            Record::Session { session, .. } => {
                assert!(!self.sessions.contains(&session), "{session} twice");
                self.sessions.push(session);
            }
            Record::Run { run, create, model_digest, .. } => {
                let state = Weights::fresh();
                let run_row = ModelRun {
                    create,
                    model_digest,
                    operations: BTreeMap::new(),
                    snapshot: None,
                    slots: BTreeMap::new(),
                    published: None,
                    state,
                    states: BTreeMap::new(),
                };
                assert!(self.runs.insert(run, run_row).is_none(), "{run} twice");
            }
            Record::Operation { run, seq, key, incarnation, operation } => {
                let operations = &mut self.runs.get_mut(&run).expect("a run of its own").operations;
                if let Some(first) = operations.get(&seq) {
                    assert_eq!(first.key, key, "{run}: operation {} was given out twice", seq.0);
                    assert!(first.outcome.is_none(), "{run}: operation {} changed after its end", seq.0);
                } else {
                    assert!(operations.values().all(|o| o.key != key), "{run}: one key, two operations");
                    assert!(operations.keys().all(|s| *s < seq), "{run}: operation {} came late", seq.0);
                }
                operations
                    .insert(seq, RecoveredOperation { seq, key, incarnation, operation, outcome: None });
            }
            Record::Outcome { run, seq, outcome } => self.write_outcome(run, seq, outcome, blobs),
            Record::Snapshot { run, seq, snapshot } => {
                let run_row = self.runs.get_mut(&run).expect("a run of its own");
                let then = run_row.states.get(&seq).expect("an operation with an outcome");
                assert_eq!(
                    blobs.get(snapshot),
                    then,
                    "{run}: the snapshot after {} is of another state",
                    seq.0
                );
                if run_row.snapshot.is_none_or(|(newest, _)| newest < seq) {
                    run_row.snapshot = Some((seq, snapshot));
                }
            }
            Record::Checkpoint { checkpoint, files, policy } => {
                let key = (checkpoint.run_id, checkpoint.target, checkpoint.checkpoint_id.clone());
                let taken = self.checkpoints.values().any(|(other, ..)| other.id == checkpoint.id);
                assert!(!taken, "{} twice", checkpoint.id);
                self.checkpoints.insert(key, (checkpoint, files, policy));
            }
            Record::Slot { policy, adapter, .. } => {
                let run = self.runs.get_mut(&policy.run).expect("a run of its own");
                assert_eq!(run.state.step, policy.step, "{policy} is not of the present step");
                assert_eq!(run.state.weights, policy.digest, "{policy} is not of the present weights");
                run.slots.insert(policy.step > 0, (policy, adapter));
                run.published = run.states.keys().last().map(|seq| (*seq, policy));
            }
            Record::DropSlots { run } => {
                let run = self.runs.get_mut(&run).expect("a run of its own");
                assert_eq!(run.state.step, 0, "only a fresh adapter drops what was published");
                run.slots.clear();
                run.published = None;
            }
            Record::Prune { .. } => panic!("nothing prunes yet"),
        }
    }

    fn write_outcome(&mut self, id: RunId, seq: OperationSeq, outcome: Outcome, blobs: &mut Blobs) {
        let run = self.runs.get_mut(&id).expect("a run of its own");
        for (earlier, operation) in run.operations.range(..seq) {
            assert!(operation.outcome.is_some(), "{id}: {} ended before {}", seq.0, earlier.0);
        }
        let operation = run.operations.get_mut(&seq).expect("accepted before it ended");
        assert!(operation.outcome.is_none(), "{id}: operation {} ended twice", seq.0);
        run.state.follow(id, &operation.operation, &outcome, blobs);
        operation.outcome = Some(outcome);
        run.states.insert(seq, run.state.clone());
    }

    pub fn outcome(&self, run: RunId, seq: OperationSeq) -> Option<&Outcome> {
        self.runs.get(&run)?.operations.get(&seq)?.outcome.as_ref()
    }

    pub fn operation(&self, run: RunId, seq: OperationSeq) -> Option<&Operation> {
        Some(&self.runs.get(&run)?.operations.get(&seq)?.operation)
    }

    /// The run's slot, if this operation filled it.
    pub fn published_by(&self, run: RunId, seq: OperationSeq) -> Option<PolicyId> {
        let run = self.runs.get(&run)?;
        run.published.filter(|(by, _)| *by == seq).map(|(_, policy)| policy)
    }

    /// What a restarted coordinator reads.
    pub fn recover(&mut self) -> Recovered {
        self.queue.clear();
        self.epoch += 1;
        let runs = self.runs.iter().map(|(id, run)| RecoveredRun {
            run: *id,
            create: run.create.clone(),
            model_digest: run.model_digest,
            created_at_ms: 0,
            snapshot: run.snapshot,
            operations: run.operations.values().cloned().collect(),
            slots: run.slots.values().copied().collect(),
        });
        let mut checkpoints: Vec<_> = self.checkpoints.values().cloned().collect();
        checkpoints.sort_by_key(|(checkpoint, ..)| checkpoint.id);
        Recovered {
            epoch: Epoch(self.epoch),
            sessions: self.sessions.clone(),
            runs: runs.collect(),
            checkpoints,
            live_blobs: Vec::new(),
        }
    }
}

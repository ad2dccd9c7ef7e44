//! The journal as a value: what is durable, and appends on their way there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lockstep::{
    coordinator::state::AppendId,
    journal::{
        Outcome, Record, Recovered, RecoveredOperation, RecoveredRun, RecoveredSnapshot, SavedCheckpoint,
        Standing, blobs_of_operation,
    },
    protocol::{BlobRef, CreateRun, Epoch, Operation, OperationKey, OperationSeq, encode},
    types::{CheckpointTarget, Digest, PolicyId, RunId, SessionId},
};

use super::{blobs::Blobs, rank::Weights};

#[derive(Default)]
pub struct ModelJournal {
    /// Queued and not written; a crash loses it.
    pub queue: VecDeque<(AppendId, Vec<Record>)>,
    pub pruned: u64,
    pub unpublished: u64,
    epoch: u64,
    sessions: Vec<SessionId>,
    runs: BTreeMap<RunId, ModelRun>,
    checkpoints: BTreeMap<(RunId, CheckpointTarget, String), SavedCheckpoint>,
    drained: BTreeSet<String>,
}

pub struct ModelRun {
    create: CreateRun,
    model_digest: Digest,
    key: Option<OperationKey>,
    pub operations: BTreeMap<OperationSeq, RecoveredOperation>,
    snapshots: BTreeMap<OperationSeq, (BlobRef, Standing)>,
    /// Nothing up to here is left but in `operations`, for comparison.
    forgotten: OperationSeq,
    /// The last operation whose outcome the present coordinator has read, not written.
    recovered: OperationSeq,
    /// Of version 0, then of later ones.
    slots: BTreeMap<bool, (PolicyId, BlobRef)>,
    /// What each slot held before.
    replaced: BTreeMap<bool, (PolicyId, BlobRef)>,
    /// The slot whose publish has just failed, so that it may be put right.
    failed: Option<bool>,
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
        self.runs.values_mut().for_each(|run| run.failed = None);
    }

    fn write_record(&mut self, record: Record, blobs: &mut Blobs) {
        match record {
            Record::Session { session, .. } => {
                assert!(!self.sessions.contains(&session), "{session} twice");
                self.sessions.push(session);
            }
            Record::Run { run, create, model_digest, key, .. } => {
                let made = |other: &ModelRun| other.create.session == create.session && other.key == key;
                assert!(!self.runs.values().any(made), "{run}: made twice for one request");
                let state = Weights::fresh();
                let run_row = ModelRun {
                    create,
                    model_digest,
                    key,
                    operations: BTreeMap::new(),
                    snapshots: BTreeMap::new(),
                    forgotten: OperationSeq(0),
                    recovered: OperationSeq(0),
                    slots: BTreeMap::new(),
                    replaced: BTreeMap::new(),
                    failed: None,
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
                let digest = Digest::of(&encode(&operation));
                let operation = Some(operation);
                operations.insert(
                    seq,
                    RecoveredOperation { seq, key, incarnation, operation, digest, outcome: None },
                );
            }
            Record::Outcome { run, seq, outcome } => self.write_outcome(run, seq, outcome, blobs),
            Record::Snapshot { run, seq, snapshot, standing } => {
                let run_row = self.runs.get_mut(&run).expect("a run of its own");
                let then = run_row.states.get(&seq).expect("an operation with an outcome");
                assert_eq!(
                    blobs.get(snapshot),
                    then,
                    "{run}: the snapshot after {} is of another state",
                    seq.0
                );
                assert_eq!(
                    standing.step, then.step,
                    "{run}: the snapshot after {} is of another step",
                    seq.0
                );
                assert_eq!(standing.incarnation, run_row.incarnation_at(seq), "{run}: of another life");
                run_row.snapshots.insert(seq, (snapshot, standing));
            }
            Record::Checkpoint(saved) => {
                let checkpoint = &saved.checkpoint;
                let key = (checkpoint.run_id, checkpoint.target, checkpoint.checkpoint_id.clone());
                let taken = self.checkpoints.values().any(|other| other.checkpoint.id == checkpoint.id);
                assert!(!taken, "{} twice", checkpoint.id);
                self.checkpoints.insert(key, saved);
            }
            Record::DropCheckpoint { checkpoint } => {
                self.checkpoints.retain(|_, saved| saved.checkpoint.id != checkpoint);
            }
            Record::Slot { policy, adapter, .. } => {
                let run = self.runs.get_mut(&policy.run).expect("a run of its own");
                let slot = policy.step > 0;
                if run.failed.take() == Some(slot) {
                    let before = run.replaced.get(&slot);
                    assert_eq!(before, Some(&(policy, adapter)), "{policy} was not in the slot before");
                    run.slots.insert(slot, (policy, adapter));
                    return;
                }
                assert_eq!(run.state.step, policy.step, "{policy} is not of the present step");
                assert_eq!(run.state.weights, policy.digest, "{policy} is not of the present weights");
                let replaced = run.slots.insert(slot, (policy, adapter));
                run.replaced.remove(&slot);
                run.replaced.extend(replaced.map(|replaced| (slot, replaced)));
                run.published = run.states.keys().last().map(|seq| (*seq, policy));
            }
            Record::PublishFailed { run, seq, policy, error } => {
                let run = self.runs.get_mut(&run).expect("a run of its own");
                let operation = run.operations.get_mut(&seq).expect("a publish");
                assert!(matches!(operation.outcome, Some(Outcome::Done { .. })), "failed twice");
                operation.outcome = Some(Outcome::Failed { error });
                run.slots.retain(|_, (held, _)| *held != policy);
                run.failed = Some(policy.step > 0);
                run.published = None;
                self.unpublished += 1;
            }
            Record::DropRun { run } => {
                self.runs.remove(&run).expect("a run that is there");
                self.checkpoints.retain(|(of, ..), _| *of != run);
            }
            Record::DropSlots { run } => {
                let run = self.runs.get_mut(&run).expect("a run of its own");
                assert_eq!(run.state.step, 0, "only a fresh adapter drops what was published");
                run.slots.clear();
                run.replaced.clear();
                run.published = None;
            }
            Record::Drained { node, drained } => {
                if drained {
                    self.drained.insert(node)
                } else {
                    self.drained.remove(&node)
                };
            }
            Record::Certificate(_) | Record::ForgetCertificate { .. } | Record::Revoked { .. } => {
                unreachable!("nobody has a certificate in here")
            }
            Record::Prune { run, base, upto } => {
                let run = self.runs.get_mut(&run).expect("a run of its own");
                assert!(run.snapshots.contains_key(&base) && upto <= base, "nothing to go on from");
                run.snapshots = run.snapshots.split_off(&base);
                run.forgotten = run.forgotten.max(upto);
                self.pruned += 1;
            }
        }
    }

    /// Whether a row needs this blob.
    pub fn names(&self, digest: Digest) -> bool {
        let of_run = |run: &ModelRun| {
            let replayed = run.snapshots.keys().next().copied().unwrap_or(OperationSeq(0));
            let operations = run.operations.range(OperationSeq(replayed.0 + 1)..);
            let operations =
                operations.filter_map(|(_, o)| o.operation.as_ref()).flat_map(blobs_of_operation);
            let snapshots = run.snapshots.values().map(|(blob, _)| *blob);
            let slots = run.slots.values().map(|(_, adapter)| *adapter);
            let mut blobs = operations.chain(snapshots).chain(slots);
            blobs.any(|blob| blob.digest == digest)
        };
        let saved = self.checkpoints.values().flat_map(|saved| &saved.files);
        saved.map(|file| file.blob.digest).any(|other| other == digest) || self.runs.values().any(of_run)
    }

    /// Whether the policy's weights are kept: by a checkpoint, or because it is live.
    pub fn keeps(&self, policy: PolicyId) -> bool {
        let live = self.runs.values().flat_map(|run| run.slots.values()).any(|(live, _)| *live == policy);
        live || self.checkpoints.values().any(|saved| saved.policy == Some(policy))
    }

    fn write_outcome(&mut self, id: RunId, seq: OperationSeq, outcome: Outcome, blobs: &mut Blobs) {
        let run = self.runs.get_mut(&id).expect("a run of its own");
        for (earlier, operation) in run.operations.range(..seq) {
            assert!(operation.outcome.is_some(), "{id}: {} ended before {}", seq.0, earlier.0);
        }
        let operation = run.operations.get_mut(&seq).expect("accepted before it ended");
        assert!(operation.outcome.is_none(), "{id}: operation {} ended twice", seq.0);
        let submitted = operation.operation.as_ref().expect("kept for comparison");
        run.state.follow(id, submitted, &outcome, blobs);
        operation.outcome = Some(outcome);
        run.states.insert(seq, run.state.clone());
    }

    pub fn outcome(&self, run: RunId, seq: OperationSeq) -> Option<&Outcome> {
        self.runs.get(&run)?.operations.get(&seq)?.outcome.as_ref()
    }

    pub fn operation(&self, run: RunId, seq: OperationSeq) -> Option<&Operation> {
        self.runs.get(&run)?.operations.get(&seq)?.operation.as_ref()
    }

    /// The run's slot, if this operation filled it.
    pub fn published_by(&self, run: RunId, seq: OperationSeq) -> Option<PolicyId> {
        let run = self.runs.get(&run)?;
        run.published.filter(|(by, _)| *by == seq).map(|(_, policy)| policy)
    }

    /// Whether the operation ended in an earlier life of the coordinator.
    pub fn is_recovered(&self, run: RunId, seq: OperationSeq) -> bool {
        self.runs.get(&run).is_some_and(|run| seq <= run.recovered)
    }

    /// What a restarted coordinator reads.
    pub fn recover(&mut self) -> Recovered {
        self.queue.clear();
        self.epoch += 1;
        for run in self.runs.values_mut() {
            run.recovered = run.states.keys().next_back().copied().unwrap_or(OperationSeq(0));
        }
        let runs = self.runs.iter().map(|(id, run)| RecoveredRun {
            run: *id,
            create: run.create.clone(),
            model_digest: run.model_digest,
            key: run.key,
            created_at_ms: 0,
            snapshots: run.recovered_snapshots(),
            operations: run.recovered_operations(),
            slots: run.slots.values().copied().collect(),
        });
        let mut checkpoints: Vec<_> = self.checkpoints.values().cloned().collect();
        checkpoints.sort_by_key(|saved| saved.checkpoint.id);
        Recovered {
            epoch: Epoch(self.epoch),
            sessions: self.sessions.clone(),
            owners: BTreeMap::new(),
            runs: runs.collect(),
            last_run: self.runs.keys().last().map_or(0, |run| run.0),
            checkpoints,
            drained: self.drained.clone(),
            certificates: Vec::new(),
            revoked: BTreeMap::new(),
        }
    }
}

impl ModelRun {
    fn incarnation_at(&self, seq: OperationSeq) -> u32 {
        let done = |o: &&RecoveredOperation| matches!(o.outcome, Some(Outcome::Done { .. }));
        let last = self.operations.range(..=seq).rev().map(|(_, o)| o).find(done);
        last.map_or(0, |operation| operation.incarnation)
    }

    fn recovered_snapshots(&self) -> Vec<RecoveredSnapshot> {
        let snapshots = self.snapshots.iter().map(|(seq, (blob, standing))| RecoveredSnapshot {
            seq: *seq,
            blob: *blob,
            standing: standing.clone(),
            payload_bytes: 0,
        });
        snapshots.collect()
    }

    fn recovered_operations(&self) -> Vec<RecoveredOperation> {
        let covered = self.snapshots.keys().next_back().copied().unwrap_or(OperationSeq(0));
        let left = self.operations.range(OperationSeq(self.forgotten.0 + 1)..).map(|(_, o)| o.clone());
        let pass = |operation: &Operation| {
            matches!(operation, Operation::Forward { .. } | Operation::ForwardBackward { .. })
        };
        let left = left.map(|o| match o.operation {
            Some(operation) if o.seq <= covered && pass(&operation) => {
                RecoveredOperation { operation: None, ..o }
            }
            operation => RecoveredOperation { operation, ..o },
        });
        left.collect()
    }
}

//! From what the ranks prepared to what clients see: outcome and what hangs on it durable in
//! one append, then commit, then the waiters.

use crate::{
    journal::{JournalError, Outcome, Record, SavedCheckpoint},
    protocol::{
        ADAPTER_FILE, BlobRef, CoordinatorMessage, OpToken, Operation, OperationResult, OperationSeq, Saved,
    },
    types::{Checkpoint, CheckpointPath, CheckpointTarget, OperationError, PolicyId, RunId},
};

use super::{
    Appending, Effect, Ended, State, fault,
    run::{Conclusion, Work},
};

/// How long to wait before an outcome is written again that could not be made durable.
const WRITE_AGAIN_MS: u64 = 1_000;

/// What a save adds to the journal beside its outcome.
#[derive(Default)]
struct Leftovers {
    checkpoint: Option<SavedCheckpoint>,
    publish: Option<(PolicyId, BlobRef)>,
}

impl State {
    /// Journals an outcome. `token`: of the ranks that hold the operation prepared or refused.
    pub(super) fn conclude(
        &mut self,
        id: RunId,
        seq: OperationSeq,
        outcome: Outcome,
        token: Option<OpToken>,
        saved: Option<Saved>,
        resolved: Option<Operation>,
    ) {
        let (outcome, left) = match self.leftovers(id, seq, &outcome, saved) {
            Ok(left) => (outcome, left),
            Err(error) => (Outcome::Failed { error }, Leftovers::default()),
        };
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Some(entry) = run.operations.get(&seq) else { return };
        let mut records = Vec::new();
        if let Some(operation) = &resolved {
            let (key, incarnation, operation) = (entry.key, entry.incarnation, operation.clone());
            records.push(Record::Operation { run: id, seq, key, incarnation, operation });
        }
        records.push(Record::Outcome { run: id, seq, outcome: outcome.clone() });
        records.extend(left.checkpoint.clone().map(Record::Checkpoint));
        let fresh =
            matches!((&entry.operation, &outcome), (Some(Operation::Init { .. }), Outcome::Done { .. }));
        if fresh && run.has_published() {
            records.push(Record::DropSlots { run: id });
        }
        if let Some((policy, adapter)) = left.publish {
            let base_model = run.create.base_model.clone();
            records.push(Record::Slot { policy, base_model, adapter });
        }
        let Leftovers { checkpoint, publish } = left;
        run.work = Work::Conclude(Box::new(Conclusion {
            seq,
            outcome,
            token,
            resolved,
            checkpoint,
            publish,
            records,
            retry_ms: None,
        }));
        self.write_conclusion(id);
    }

    /// Writes the outcome, also for another time.
    pub(super) fn write_conclusion(&mut self, id: RunId) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Work::Conclude(conclusion) = &mut run.work else { return };
        conclusion.retry_ms = None;
        let (seq, records) = (conclusion.seq, conclusion.records.clone());
        self.append(records, Appending::Outcome { run: id, seq });
    }

    /// The checkpoint and the publish of a save that went well.
    fn leftovers(
        &mut self,
        id: RunId,
        seq: OperationSeq,
        outcome: &Outcome,
        saved: Option<Saved>,
    ) -> Result<Leftovers, OperationError> {
        let Outcome::Done { step, .. } = outcome else { return Ok(Leftovers::default()) };
        let run = &self.runs[&id];
        let entry = &run.operations[&seq];
        let (name, target, publish, ttl_seconds) = match &entry.operation {
            Some(Operation::SaveState { name, ttl_seconds }) => {
                (name.clone(), CheckpointTarget::Trainer, false, *ttl_seconds)
            }
            Some(Operation::SaveWeightsForSampler { name, publish, ttl_seconds }) => {
                (name.clone(), CheckpointTarget::Sampler, *publish, *ttl_seconds)
            }
            _ => return Ok(Leftovers::default()),
        };
        let saved = saved.ok_or_else(|| fault(format!("the ranks of {id} saved {name:?} without files")))?;
        let path = CheckpointPath { run: id, target, name: name.clone() };
        let size_bytes = saved.files.iter().map(|file| file.blob.size).sum();
        self.admit_checkpoint(id, &entry.call.quota, &path, size_bytes)?;
        let path = path.to_string();
        let checkpoint = Checkpoint {
            id: self.checkpoints.next_id(),
            run_id: id,
            checkpoint_id: name,
            checkpoint_type: "lora".to_owned(),
            target,
            created_at_ms: self.wall_ms,
            base_model: run.create.base_model.clone(),
            lora_rank: run.lora.rank,
            lora_alpha: run.lora.alpha,
            step: *step,
            size_bytes,
            path,
            expires_at_ms: ttl_seconds.map(|seconds| self.wall_ms + seconds * 1_000),
        };
        let policy = PolicyId { run: id, incarnation: entry.incarnation, step: *step, digest: saved.digest };
        let policy = (target == CheckpointTarget::Sampler).then_some(policy);
        let stored = SavedCheckpoint { checkpoint, files: saved.files, policy, published: publish };
        let publish = match (policy, publish) {
            (Some(policy), true) => {
                let adapter = stored.file(ADAPTER_FILE);
                let adapter = adapter.ok_or_else(|| fault(format!("{policy} was saved without adapter")))?;
                Some((policy, adapter))
            }
            _ => None,
        };
        Ok(Leftovers { checkpoint: Some(stored), publish })
    }

    /// The outcome is durable: ranks commit, waiters see it; a publish waits for the samplers.
    pub(super) fn outcome_durable(&mut self, id: RunId, seq: OperationSeq, result: Result<(), JournalError>) {
        let now_ms = self.now_ms;
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Work::Conclude(conclusion) = &mut run.work else { return };
        if conclusion.seq != seq {
            return;
        }
        match result {
            Ok(()) => {}
            Err(JournalError::Refused { reason, .. }) if run.broken.is_none() => {
                return self.quarantine_refused(id, seq, &reason);
            }
            Err(why) => {
                tracing::error!(run = %id, operation = seq.0, "an outcome is not durable, trying again: {why}");
                conclusion.retry_ms = Some(now_ms + WRITE_AGAIN_MS);
                return;
            }
        }
        let Work::Conclude(conclusion) = std::mem::replace(&mut run.work, Work::Idle) else { return };
        run.last_used_ms = now_ms;
        let Conclusion { outcome, token, resolved, checkpoint, publish, .. } = *conclusion;
        let ended = run.ended(seq, &outcome, now_ms);
        run.finish(seq, outcome.clone(), resolved);
        self.effects.extend(ended.map(Effect::Ended));
        if let Some(token) = token {
            let message = match &outcome {
                Outcome::Done { .. } => CoordinatorMessage::Commit { token },
                Outcome::Failed { .. } => CoordinatorMessage::Discard { token },
            };
            self.settle(id, token, message);
        }
        if matches!(outcome, Outcome::Done { .. }) {
            self.adopt_lora(id, seq);
            self.begin_anew(id, seq);
        }
        if let Some(stored) = checkpoint {
            if let (Some(policy), Some(adapter)) = (stored.policy, stored.file(ADAPTER_FILE)) {
                self.policies.learn(policy, &stored.checkpoint.base_model, adapter);
            }
            self.checkpoints.insert(stored);
        }
        match publish {
            Some((policy, _)) => self.publish(id, seq, policy),
            None => self.show(id, seq),
        }
        self.advance(id);
    }

    /// After an `Init`, nothing that was published before it is served under the run's name.
    pub(super) fn begin_anew(&mut self, id: RunId, seq: OperationSeq) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Some(entry) = run.operations.get(&seq) else { return };
        if let Some(Operation::Init { .. }) = entry.operation {
            run.begin_anew(entry.incarnation);
        }
    }

    /// Writing it again would be refused again: the run's state here is not what the journal holds.
    /// Its operation, and those behind it, end with that.
    fn quarantine_refused(&mut self, id: RunId, seq: OperationSeq, reason: &str) {
        let error = fault(format!("{id} is quarantined: its journal refuses operation {}: {reason}", seq.0));
        if let Some(run) = self.runs.get_mut(&id) {
            run.work = Work::Idle;
        }
        self.quarantine(id, error);
        self.advance(id);
    }

    /// Keeps what the run's checkpoints say of its adapter true.
    pub(super) fn adopt_lora(&mut self, id: RunId, seq: OperationSeq) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        match run.operations.get(&seq).and_then(|entry| entry.operation.as_ref()) {
            Some(Operation::Init { lora }) => run.lora = lora.clone(),
            Some(Operation::LoadState { source: Some(source), .. }) => {
                if let Some(stored) = self.checkpoints.holding(&source.blob) {
                    run.lora.rank = stored.checkpoint.lora_rank;
                    run.lora.alpha = stored.checkpoint.lora_alpha;
                }
            }
            _ => {}
        }
    }
}

impl super::run::Run {
    /// What the end of an operation is counted by.
    fn ended(&self, seq: OperationSeq, outcome: &Outcome, now_ms: u64) -> Option<Ended> {
        let entry = self.operations.get(&seq)?;
        let tokens = match outcome {
            Outcome::Done { result: OperationResult::OptimStep(step), .. } => step.metrics.get("tokens"),
            _ => None,
        };
        Some(Ended {
            run: self.id,
            seq,
            operation: entry.operation.as_ref()?.name(),
            error: match outcome {
                Outcome::Done { .. } => None,
                Outcome::Failed { error } => Some(error.kind),
            },
            took_ms: now_ms.saturating_sub(entry.since_ms),
            trained_tokens: tokens.map_or(0, |tokens| *tokens as u64),
            trace: entry.call.trace,
        })
    }

    /// Takes in a durable outcome.
    pub(super) fn finish(&mut self, seq: OperationSeq, outcome: Outcome, resolved: Option<Operation>) {
        self.finished = seq;
        let Some(entry) = self.operations.get_mut(&seq) else { return };
        if resolved.is_some() {
            entry.operation = resolved;
        }
        if let Outcome::Done { step, .. } = &outcome {
            self.step = *step;
            self.incarnation = entry.incarnation;
            self.setbacks = 0;
        }
        entry.outcome = Some(outcome);
    }
}

//! A run's past: a new run that begins there, or that part of it computed again.
//!
//! ```text
//!   fork, replay ─► Recall ─► the nearest snapshot and what followed it
//!                               ├─ fork: journaled as a run of its own; its ranks repeat it when wanted
//!                               └─ replay: a run that is in no journal repeats it, reports, and is gone
//! ```
//!
//! Neither is a mechanism of its own: ranks are restored and repeat operations as after a loss, and
//! whatever comes out otherwise than it is journaled ends the run.

use crate::{
    journal::{Goal, JournalError, Record, RecoveredRun, Way, blobs_of_operation, blobs_of_result},
    protocol::{BlobRef, ClientResponse, OperationKey, Replayed},
    types::{ErrorKind, OperationError, RunId},
};

use super::{Appending, Effect, Refusal, State, WaiterId, admission, run::Run};

/// Looks into the past, and replays, at once: each replay takes ranks.
const RECALLS_MAX: usize = 8;

/// What is to become of a part of a run's history.
#[derive(Debug, Clone)]
pub(super) struct Recall {
    run: RunId,
    goal: Goal,
    /// Under which the fork was asked for.
    key: Option<OperationKey>,
    /// Of the fork; absent: it is computed again.
    name: Option<String>,
}

/// A run that only repeats what another did.
#[derive(Debug, Clone)]
pub(super) struct Replaying {
    pub waiter: WaiterId,
    found: Replayed,
}

impl State {
    pub(super) fn fork_run(
        &mut self,
        waiter: WaiterId,
        key: Option<OperationKey>,
        (id, step, name): (RunId, u64, Option<String>),
    ) -> Result<Option<ClientResponse>, Refusal> {
        let source = self.past_of(id)?;
        let (info, session) = (source.info(), source.create.session);
        let made = |run: &&Run| run.create.session == session && run.key == key;
        if let Some(made) = self.runs.values().find(made).filter(|_| key.is_some()) {
            return Ok(Some(ClientResponse::Run(self.described(made))));
        }
        let name = admission::display_name(name, &format!("{} from step {step}", info.name))?;
        let goal = Goal { step, recompute: false };
        self.recall(waiter, Recall { run: id, goal, key, name: Some(name) });
        Ok(None)
    }

    pub(super) fn replay_run(
        &mut self,
        waiter: WaiterId,
        id: RunId,
        step: u64,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.past_of(id)?;
        let goal = Goal { step, recompute: true };
        self.recall(waiter, Recall { run: id, goal, key: None, name: None });
        Ok(None)
    }

    /// The run, if it may be looked into now.
    fn past_of(&self, id: RunId) -> Result<&Run, Refusal> {
        self.refuse_while_draining()?;
        let replays = self.runs.values().filter(|run| run.replaying.is_some()).count();
        if self.recalls.len() + replays >= RECALLS_MAX {
            return Err(Refusal::Overloaded { what: "forks and replays", bound: RECALLS_MAX });
        }
        self.refuse_more_runs()?;
        self.runs.get(&id).filter(|run| !run.deleting).ok_or(Refusal::UnknownRun(id))
    }

    fn recall(&mut self, waiter: WaiterId, recall: Recall) {
        self.effects.push(Effect::Recall { waiter, run: recall.run, goal: recall.goal });
        self.recalls.insert(waiter, recall);
    }

    /// The journal has looked.
    pub(super) fn recalled(&mut self, waiter: WaiterId, way: Result<Way, JournalError>) {
        let Some(recall) = self.recalls.remove(&waiter) else { return };
        let Some(source) = self.runs.get(&recall.run).filter(|run| !run.deleting) else {
            return self.refuse(waiter, Refusal::UnknownRun(recall.run));
        };
        let (from, operations) = match way {
            Err(why) => return self.refuse(waiter, why),
            Ok(Way::Beyond { reach }) => {
                let Recall { run, goal, .. } = recall;
                return self.refuse(waiter, Refusal::BeyondHistory { run, step: goal.step, reach });
            }
            Ok(Way::To { from, operations }) => (from, operations),
        };
        let kept = |seq| source.history.iter().any(|kept| kept.seq == seq);
        if from.as_ref().is_some_and(|snapshot| !kept(snapshot.seq)) {
            // It was forgotten in the moment in which it was read.
            return self.recall(waiter, recall);
        }
        let mut create = source.create.clone();
        let again = format!("replay of {} to step {}", recall.run, recall.goal.step);
        create.name = Some(recall.name.clone().unwrap_or(again));
        let new = RecoveredRun {
            run: RunId(self.next_run),
            create,
            model_digest: source.model_digest,
            key: recall.key,
            created_at_ms: self.wall_ms,
            snapshots: from.into_iter().collect(),
            operations,
            slots: Vec::new(),
        };
        self.next_run += 1;
        match recall.name {
            Some(_) => {
                let records = records_of(&new);
                self.append(records, Appending::Fork { run: Box::new(new), waiter });
            }
            None => self.begin_replay(waiter, recall.goal.step, new),
        }
    }

    pub(super) fn fork_durable(
        &mut self,
        new: RecoveredRun,
        waiter: WaiterId,
        result: Result<(), JournalError>,
    ) {
        if let Err(why) = result {
            return self.refuse(waiter, Refusal::NotDurable(why.to_string()));
        }
        let id = new.run;
        self.recover_run(new);
        if let Some(run) = self.runs.get_mut(&id) {
            run.last_used_ms = self.now_ms;
        }
        self.respond(waiter, ClientResponse::Run(self.described(&self.runs[&id])));
    }

    fn begin_replay(&mut self, waiter: WaiterId, to_step: u64, new: RecoveredRun) {
        let id = new.run;
        let found = Replayed {
            from_step: new.snapshots.first().map_or(0, |snapshot| snapshot.standing.step),
            to_step,
            operations: u32::try_from(new.operations.len()).unwrap_or(u32::MAX),
            difference: None,
        };
        self.recover_run(new);
        let Some(run) = self.runs.get_mut(&id) else { return };
        run.replaying = Some(Replaying { waiter, found });
        // It takes nothing else.
        (run.deleting, run.wanted, run.last_used_ms) = (true, true, self.now_ms);
        self.advance(id);
    }

    /// All of it was repeated and came out as journaled, or something did not (`difference`).
    pub(super) fn end_replay(&mut self, id: RunId, difference: Option<String>) {
        if let Some(Replaying { waiter, found }) = self.drop_replay(id) {
            self.respond(waiter, ClientResponse::Replayed(Replayed { difference, ..found }));
        }
    }

    /// It could not be computed, which says nothing about what it would have been.
    pub(super) fn give_up_replay(&mut self, id: RunId, cause: OperationError) {
        if let Some(Replaying { waiter, .. }) = self.drop_replay(id) {
            self.refuse(waiter, cause);
        }
    }

    /// Nobody waits for it any more.
    pub(super) fn cancel_recall(&mut self, waiter: WaiterId) {
        self.recalls.remove(&waiter);
        let waits = |run: &&Run| run.replaying.as_ref().is_some_and(|replaying| replaying.waiter == waiter);
        if let Some(id) = self.runs.values().find(waits).map(|run| run.id) {
            self.drop_replay(id);
        }
    }

    fn drop_replay(&mut self, id: RunId) -> Option<Replaying> {
        self.runs.get(&id)?.replaying.as_ref()?;
        self.release(id);
        self.runs.remove(&id)?.replaying
    }
}

impl Run {
    /// What to say of a replay that lost its ranks too often.
    pub(super) fn replay_lost(&self, cause: &OperationError) -> OperationError {
        let name = self.create.name.as_deref().unwrap_or_default();
        OperationError::new(ErrorKind::Unavailable, format!("the {name} was given up: {}", cause.message))
    }
}

/// What makes a run of its own of it.
fn records_of(new: &RecoveredRun) -> Vec<Record> {
    let run = new.run;
    let mut records = vec![Record::Run {
        run,
        create: new.create.clone(),
        model_digest: new.model_digest,
        key: new.key,
        created_at_ms: new.created_at_ms,
    }];
    records.extend(new.snapshots.iter().map(|snapshot| Record::Snapshot {
        run,
        seq: snapshot.seq,
        snapshot: snapshot.blob,
        standing: snapshot.standing.clone(),
    }));
    for entry in &new.operations {
        if let (Some(operation), Some(outcome)) = (entry.operation.clone(), entry.outcome.clone()) {
            let (seq, key, incarnation) = (entry.seq, entry.key, entry.incarnation);
            records.push(Record::Operation { run, seq, key, incarnation, operation });
            records.push(Record::Outcome { run, seq, outcome });
        }
    }
    records
}

/// Blobs that a run which is being journaled names.
pub(super) fn blobs_of(new: &RecoveredRun) -> impl Iterator<Item = BlobRef> {
    let operations = new.operations.iter().filter_map(|entry| entry.operation.as_ref());
    let results = new.operations.iter().filter_map(|entry| match &entry.outcome {
        Some(crate::journal::Outcome::Done { result, .. }) => Some(blobs_of_result(result)),
        _ => None,
    });
    let snapshots = new.snapshots.iter().map(|snapshot| snapshot.blob);
    snapshots.chain(operations.flat_map(blobs_of_operation)).chain(results.flatten())
}

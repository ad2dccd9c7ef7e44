//! What is forgotten, and when: snapshots of a run past the last few, with the data of the
//! operations before them; results that nobody waits for; checkpoints that were made by a publish
//! and that later publishes have pushed out; checkpoints whose time is up, or that a caller deletes.
//!
//! ```text
//!   operations   1 ─────────── upto ────────── base ───────────── newest snapshot ───── finished
//!                nothing       key and outcome │ what replay from `base` needs: snapshots and data
//!                is left       are left        └─ the oldest snapshot that is kept
//! ```
//!
//! Rows go here; the blobs that no row names any more are swept from the store in the background
//! ([`State::unneeded`] says which of them this state still counts on).

use std::collections::HashSet;

use crate::{
    journal::{JournalError, Outcome, Record, blobs_of_operation, blobs_of_result},
    protocol::{BlobRef, ClientResponse, OperationSeq},
    types::{CheckpointId, Digest, PolicyId, RunId},
};

use super::{
    Appending, Refusal, State, WaiterId,
    recall::blobs_of,
    run::{Answer, Entry, Run, Work, after},
};

/// How often what may be forgotten is looked for.
const TENDING_MS: u64 = 10_000;

/// Operations that one append forgets: some milliseconds of the writer thread.
const PIECE: usize = 1_024;

/// A snapshot that replay can start from.
pub(super) struct Kept {
    pub seq: OperationSeq,
    pub blob: BlobRef,
    /// Of the operations since the snapshot before it.
    pub payload_bytes: u64,
}

impl State {
    /// Forgets the next piece of whatever is too old.
    pub(super) fn tend_history(&mut self) {
        if self.now_ms < self.next_tending_ms || self.drain.is_some() {
            return;
        }
        self.next_tending_ms = self.now_ms + TENDING_MS;
        let crowded = self.run_with_too_much_history();
        let journaled = self.runs.values().filter(|run| run.replaying.is_none());
        for id in journaled.map(|run| run.id).collect::<Vec<_>>() {
            self.prune(id, crowded == Some(id));
            self.drop_publishes(id);
        }
        self.forget_policies();
    }

    /// If all histories together are over the bound: the run with the most beyond its newest
    /// snapshot, which alone is enough to go on.
    fn run_with_too_much_history(&self) -> Option<RunId> {
        let all: u64 = self.runs.values().flat_map(|run| &run.history).map(Kept::bytes).sum();
        if all <= self.limits.history_bytes {
            return None;
        }
        let older = |run: &Run| run.history.iter().rev().skip(1).map(Kept::bytes).sum::<u64>();
        let largest = self.runs.values().max_by_key(|run| older(run))?;
        (largest.history.len() > 1).then_some(largest.id)
    }

    fn prune(&mut self, id: RunId, crowded: bool) {
        let keep = self.limits.history_snapshots.max(1);
        let results = self.limits.results_kept;
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Some(oldest) = run.history.first().map(|kept| kept.seq) else { return };
        let too_old = crowded || run.history.len() > keep;
        let base = match run.history.get(1) {
            Some(next) if too_old => next.seq,
            _ => oldest,
        };
        let upto = run.forgettable(base, results);
        if run.pruning || (base == oldest && upto.is_none()) {
            return;
        }
        run.pruning = true;
        let upto = upto.unwrap_or(OperationSeq(0));
        let record = Record::Prune { run: id, base, upto };
        self.append(vec![record], Appending::Prune { run: id, base, upto });
    }

    pub(super) fn pruned(
        &mut self,
        id: RunId,
        base: OperationSeq,
        upto: OperationSeq,
        result: Result<(), JournalError>,
    ) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        run.pruning = false;
        if let Err(why) = result {
            return tracing::warn!(run = %id, "its past can't be forgotten now: {why}");
        }
        run.history.retain(|kept| kept.seq >= base);
        let kept = run.operations.split_off(&after(upto));
        for entry in std::mem::replace(&mut run.operations, kept).into_values() {
            run.keys.remove(&entry.key);
        }
    }

    /// Of the checkpoints that were saved to be served, drops the oldest that are too many, but
    /// none that is served now.
    fn drop_publishes(&mut self, id: RunId) {
        let published: Vec<_> =
            self.checkpoints.published(id).map(|saved| (saved.checkpoint.id, saved.policy)).collect();
        let surplus = published.len().saturating_sub(self.limits.publishes_kept);
        let unused = |policy: PolicyId| !self.is_in_use(policy);
        let checkpoints: Vec<CheckpointId> = published[..surplus]
            .iter()
            .filter(|(_, policy)| policy.is_none_or(unused))
            .map(|(checkpoint, _)| *checkpoint)
            .collect();
        if !checkpoints.is_empty() {
            self.drop_checkpoints(checkpoints, None);
        }
    }

    /// Deletes a checkpoint for a caller.
    pub(super) fn delete_checkpoint(
        &mut self,
        waiter: WaiterId,
        checkpoint: CheckpointId,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.refuse_while_draining()?;
        self.checkpoints.by_id(checkpoint)?;
        self.drop_checkpoints(vec![checkpoint], Some(waiter));
        Ok(None)
    }

    /// Deletes those whose time is up.
    pub(super) fn expire_checkpoints(&mut self) {
        if self.drain.is_some() {
            return;
        }
        let expired = self.checkpoints.take_expired(self.wall_ms);
        if !expired.is_empty() {
            self.drop_checkpoints(expired, None);
        }
    }

    fn drop_checkpoints(&mut self, checkpoints: Vec<CheckpointId>, waiter: Option<WaiterId>) {
        let records = checkpoints.iter().map(|checkpoint| Record::DropCheckpoint { checkpoint: *checkpoint });
        self.append(records.collect(), Appending::Drop { checkpoints, waiter });
    }

    /// They are gone, or are tried again: publishes when history is tended, others in a while.
    pub(super) fn dropped(
        &mut self,
        checkpoints: Vec<CheckpointId>,
        waiter: Option<WaiterId>,
        result: Result<(), JournalError>,
    ) {
        match (result, waiter) {
            (Ok(()), waiter) => {
                checkpoints.into_iter().for_each(|checkpoint| self.checkpoints.remove(checkpoint));
                if let Some(waiter) = waiter {
                    self.respond(waiter, ClientResponse::Deleted);
                }
            }
            (Err(why), Some(waiter)) => self.refuse(waiter, Refusal::NotDurable(why.to_string())),
            (Err(why), None) => {
                tracing::warn!("old checkpoints can't be dropped now: {why}");
                self.checkpoints.expire_again(&checkpoints, self.wall_ms + TENDING_MS);
            }
        }
    }

    /// Whether a run publishes or serves the policy, or a request is pinned to it.
    fn is_in_use(&self, policy: PolicyId) -> bool {
        let in_a_slot = self.runs.get(&policy.run).is_some_and(|run| run.serves(policy));
        in_a_slot || self.policies.served.get(&policy).is_some_and(|served| served.pins > 0)
    }

    /// Forgets policies whose bytes nothing holds: no checkpoint, no slot, no replica.
    fn forget_policies(&mut self) {
        let saved: HashSet<PolicyId> = self.checkpoints.policies().map(|(policy, ..)| policy).collect();
        let runs = &self.runs;
        let in_a_slot = |policy: &PolicyId| runs.get(&policy.run).is_some_and(|run| run.serves(*policy));
        self.policies.forget_unless(|policy| saved.contains(policy) || in_a_slot(policy));
    }

    /// Those of `digests`, which no row names, that this state does not count on either.
    pub fn unneeded(&self, digests: Vec<Digest>) -> Vec<Digest> {
        let needed = self.needed_blobs();
        digests.into_iter().filter(|digest| !needed.contains(digest)).collect()
    }

    /// Every blob that may be asked for, or named in a row, because of what is known here. The
    /// journal may be ahead of this by what it has not told yet, but never behind: a checkpoint
    /// that was replaced there can still be found and loaded here.
    fn needed_blobs(&self) -> HashSet<Digest> {
        let mut needed: HashSet<Digest> = self.models.values().map(|offer| offer.tokenizer).collect();
        needed.extend(self.checkpoints.blobs().map(|blob| blob.digest));
        needed.extend(self.policies.adapters().map(|blob| blob.digest));
        let forks = self.appends.values().filter_map(|appending| match appending {
            Appending::Fork { run, .. } => Some(run),
            _ => None,
        });
        needed.extend(forks.flat_map(|run| blobs_of(run)).map(|blob| blob.digest));
        needed.extend(self.runs.values().flat_map(Run::needed_blobs).map(|blob| blob.digest));
        needed
    }
}

impl Kept {
    fn bytes(&self) -> u64 {
        self.blob.size + self.payload_bytes
    }
}

impl Run {
    /// The last operation that can be forgotten wholly, if one can: nothing replays it, later ones
    /// are enough for those who ask again, and it is not still to be shown.
    fn forgettable(&self, base: OperationSeq, results: usize) -> Option<OperationSeq> {
        let finished = self.operations.range(..=self.finished).count();
        let old = self.operations.range(..=base).take(finished.saturating_sub(results).min(PIECE));
        let shown = |entry: &Entry| entry.visible && entry.waiters.is_empty();
        old.take_while(|(_, entry)| shown(entry)).last().map(|(seq, _)| *seq)
    }

    /// Bytes of the blobs of operations since the newest snapshot, up to `upto`.
    pub(super) fn payload_bytes(&self, upto: OperationSeq) -> u64 {
        let from = self.snapshot.map_or(OperationSeq(0), |(seq, _)| seq);
        let entries = self.operations.range(after(from)..=upto).map(|(_, entry)| entry);
        entries.flat_map(Entry::blobs).map(|blob| blob.size).sum()
    }

    fn needed_blobs(&self) -> impl Iterator<Item = BlobRef> {
        let snapshots = self.history.iter().map(|kept| kept.blob);
        let operations = self.operations.values().flat_map(Entry::blobs);
        snapshots.chain(operations).chain(self.work.blobs())
    }
}

impl Entry {
    fn blobs(&self) -> Vec<BlobRef> {
        let mut blobs = self.operation.as_ref().map(blobs_of_operation).unwrap_or_default();
        if let Some(Outcome::Done { result, .. }) = &self.outcome {
            blobs.extend(blobs_of_result(result));
        }
        blobs
    }
}

impl Work {
    /// What it found or made and no row names yet.
    fn blobs(&self) -> Vec<BlobRef> {
        match self {
            Self::Idle => Vec::new(),
            Self::Conclude(conclusion) => conclusion.records.iter().flat_map(Record::blobs).collect(),
            Self::Execute(execution) => {
                let mut blobs = execution.resolved.as_ref().map(blobs_of_operation).unwrap_or_default();
                for answer in execution.answers.values() {
                    if let Answer::Prepared { result, saved, .. } = answer {
                        blobs.extend(blobs_of_result(result));
                        blobs.extend(saved.iter().flat_map(|saved| &saved.files).map(|file| file.blob));
                    }
                }
                blobs
            }
        }
    }
}

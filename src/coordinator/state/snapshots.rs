//! When rank 0 writes a run's state down, so that there is little to repeat after a loss.

use crate::{
    journal::{JournalError, Record},
    protocol::{BlobRef, CoordinatorMessage, NodeId, OpToken, OperationSeq},
    types::{OperationError, RunId},
};

use super::{
    Appending, State,
    history::Kept,
    run::{Ranks, Snapshotting, Unsaved, Work},
};

/// Operations that changed the state and that no snapshot covers: a run that only accumulates
/// has no steps to count, and its operations are kept in memory until a snapshot covers them.
const CHANGES_MAX: usize = 64;

/// Operations of any kind that no snapshot covers: a run that only evaluates changes nothing, and
/// its past can be forgotten only up to a snapshot.
const OPERATIONS_MAX: usize = 512;

/// How long rank 0 may take to write one.
const SNAPSHOT_DEADLINE_MS: u64 = 120_000;

/// How long to wait after one that failed.
const RETRY_MS: u64 = 30_000;

impl State {
    /// Asks for a snapshot if one is due; says whether the run may go on meanwhile. The next
    /// operation may: the state is taken in the order of the messages. A drain and a move to
    /// other nodes may not.
    pub(super) fn begin_snapshot_if_due(&mut self, id: RunId) -> bool {
        let now_ms = self.now_ms;
        let draining = self.drain.is_some();
        let every = self.limits.snapshot_every_steps as usize;
        let Some(run) = self.runs.get(&id) else { return false };
        let urgent = draining || run.refill || run.resting;
        if run.snapshotting.is_some() {
            return !urgent;
        }
        let Unsaved { operations, changes, steps } = run.unsaved();
        let many = steps >= every || changes >= CHANGES_MAX || operations >= OPERATIONS_MAX;
        let due = many || (urgent && changes > 0);
        if !due || now_ms < run.snapshot_retry_ms {
            return true;
        }
        let Ranks::Formed { set, .. } = &run.ranks else { return true };
        let Some(node) = set.roster.first().map(|seat| seat.node) else { return true };
        let token = self.token(id, run.finished);
        self.send(node, CoordinatorMessage::TakeSnapshot { token });
        if let Some(run) = self.runs.get_mut(&id) {
            let (standing, deadline_ms) = (run.standing(), now_ms + SNAPSHOT_DEADLINE_MS);
            run.snapshotting = Some(Snapshotting { token, standing, deadline_ms });
        }
        !urgent
    }

    pub(super) fn snapshot_taken(&mut self, node: NodeId, token: OpToken, snapshot: BlobRef) {
        if let Some(standing) = self.snapshotting(node, token).map(|s| s.standing.clone()) {
            let (run, seq) = (token.run, token.seq);
            let record = Record::Snapshot { run, seq, snapshot, standing };
            self.append(vec![record], Appending::Snapshot { run, seq, snapshot });
        }
    }

    pub(super) fn snapshot_failed(&mut self, node: NodeId, token: OpToken, error: &OperationError) {
        if self.snapshotting(node, token).is_some() {
            self.give_up_snapshot(token.run, &error.message);
        }
    }

    /// The snapshot under `token` that is awaited from `node`.
    fn snapshotting(&self, node: NodeId, token: OpToken) -> Option<&Snapshotting> {
        let run = self.runs.get(&token.run)?;
        let seated = run.rank_nodes().contains(&node);
        run.snapshotting.as_ref().filter(|s| s.token == token && seated)
    }

    pub(super) fn snapshot_durable(
        &mut self,
        id: RunId,
        seq: OperationSeq,
        snapshot: BlobRef,
        result: Result<(), JournalError>,
    ) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        match result {
            Ok(()) => {
                if run.snapshot.is_none_or(|(held, _)| held < seq) {
                    run.history.push(Kept { seq, blob: snapshot, payload_bytes: run.payload_bytes(seq) });
                    run.snapshot = Some((seq, snapshot));
                }
                if run.snapshotting.as_ref().is_some_and(|s| s.token.seq == seq) {
                    run.snapshotting = None;
                }
                let behind = run.ranks_lack(seq);
                run.forget_covered();
                if behind {
                    self.start_over(id);
                }
            }
            Err(why) => self.give_up_snapshot(id, &why.to_string()),
        }
        self.advance(id);
    }

    /// Ranks that were lost after they wrote a snapshot may have successors, made from an earlier one
    /// before it was durable. Those would repeat operations that are forgotten now.
    fn start_over(&mut self, id: RunId) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        if matches!(run.work, Work::Execute(_)) {
            run.work = Work::Idle;
        }
        self.release(id);
    }

    pub(super) fn expire_snapshot(&mut self, id: RunId) {
        let late = |s: &Snapshotting| s.deadline_ms <= self.now_ms;
        if self.runs.get(&id).is_some_and(|run| run.snapshotting.as_ref().is_some_and(late)) {
            self.give_up_snapshot(id, "not written within its deadline");
        }
    }

    fn give_up_snapshot(&mut self, id: RunId, why: &str) {
        tracing::warn!(run = %id, "no snapshot: {why}");
        let retry_ms = self.now_ms + RETRY_MS;
        if let Some(run) = self.runs.get_mut(&id) {
            run.snapshotting = None;
            run.snapshot_retry_ms = retry_ms;
            // A move without a fresh snapshot repeats more; it is still right.
        }
    }
}

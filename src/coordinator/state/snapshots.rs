//! When rank 0 writes a run's state down, so that there is little to repeat after a loss.

use crate::{
    journal::{JournalError, Record},
    protocol::{BlobRef, CoordinatorMessage, NodeId, OpToken, OperationSeq},
    types::{OperationError, RunId},
};

use super::{
    Appending, State,
    run::{Ranks, Snapshotting, Work},
};

/// Operations that changed the state and that no snapshot covers: a run that only accumulates
/// has no steps to count, and its operations are kept in memory until a snapshot covers them.
const CHANGES_MAX: usize = 64;

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
        let (steps, changes) = run.unsaved();
        let due = steps >= every || changes >= CHANGES_MAX || (urgent && changes > 0);
        if !due || now_ms < run.snapshot_retry_ms {
            return true;
        }
        let Ranks::Formed { set, .. } = &run.ranks else { return true };
        let Some(node) = set.roster.first().map(|seat| seat.node) else { return true };
        let token = self.token(id, run.finished);
        self.send(node, CoordinatorMessage::TakeSnapshot { token });
        if let Some(run) = self.runs.get_mut(&id) {
            run.snapshotting = Some(Snapshotting { token, deadline_ms: now_ms + SNAPSHOT_DEADLINE_MS });
        }
        !urgent
    }

    pub(super) fn snapshot_taken(&mut self, node: NodeId, token: OpToken, snapshot: BlobRef) {
        if self.is_snapshotting(node, token) {
            let (run, seq) = (token.run, token.seq);
            let record = Record::Snapshot { run, seq, snapshot };
            self.append(vec![record], Appending::Snapshot { run, seq, snapshot });
        }
    }

    pub(super) fn snapshot_failed(&mut self, node: NodeId, token: OpToken, error: &OperationError) {
        if self.is_snapshotting(node, token) {
            self.give_up_snapshot(token.run, &error.message);
        }
    }

    fn is_snapshotting(&self, node: NodeId, token: OpToken) -> bool {
        self.runs.get(&token.run).is_some_and(|run| {
            run.snapshotting.as_ref().is_some_and(|s| s.token == token) && run.rank_nodes().contains(&node)
        })
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
                    run.snapshot = Some((seq, snapshot));
                }
                if run.snapshotting.as_ref().is_some_and(|s| s.token.seq == seq) {
                    run.snapshotting = None;
                }
                run.forget_covered();
                self.start_over_if_behind(id, seq);
            }
            Err(why) => self.give_up_snapshot(id, &why.to_string()),
        }
        self.advance(id);
    }

    /// Ranks that were lost after they wrote a snapshot may have successors, made from an earlier one
    /// before it was durable. Those would repeat operations that are forgotten now.
    fn start_over_if_behind(&mut self, id: RunId, seq: OperationSeq) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let has = match &run.ranks {
            Ranks::Absent => return,
            Ranks::Forming { restored, .. } => *restored,
            Ranks::Formed { applied, .. } => *applied,
        };
        if has < seq {
            if matches!(run.work, Work::Execute(_)) {
                run.work = Work::Idle;
            }
            self.release(id);
        }
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

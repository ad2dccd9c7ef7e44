//! What the runs of one owner may take together. The gateway says how much that is; what they take is
//! counted here, where it is known.

use crate::{
    protocol::{Operation, Quota},
    types::{CheckpointPath, OperationError, RunId, SessionId},
};

use super::{Appending, Refusal, State, run::Run};

impl State {
    /// Whether the owner of `session` may have another run.
    pub(super) fn admit_run(&self, session: SessionId, quota: &Quota) -> Result<(), Refusal> {
        let Some(bound) = quota.runs else { return Ok(()) };
        let coming = self.appends.values().filter(
            |appending| matches!(appending, Appending::Run { run, .. } if self.share_owner(session, run.create.session)),
        );
        let there = self.runs_of(session).count() + coming.count();
        if there < bound as usize { Ok(()) } else { Err(Refusal::TooManyRuns { bound }) }
    }

    /// Whether it may have this operation in a queue: those that wait make it wait, a checkpoint that
    /// has no room never will.
    pub(super) fn admit_operation(
        &self,
        session: SessionId,
        quota: &Quota,
        operation: &Operation,
    ) -> Result<(), Refusal> {
        if let Some(bound) = quota.queued_operations {
            let queued: usize = self.runs_of(session).map(Run::unfinished).sum();
            if queued >= bound as usize {
                return Err(Refusal::TooManyQueued { bound });
            }
        }
        let saves =
            matches!(operation, Operation::SaveState { .. } | Operation::SaveWeightsForSampler { .. });
        match quota.checkpoint_bytes {
            Some(bound) if saves && self.checkpoint_bytes(session) >= bound => {
                Err(Refusal::DiskQuota { used: self.checkpoint_bytes(session), more: 0, bound })
            }
            _ => Ok(()),
        }
    }

    /// Whether a checkpoint of this size may stay. One of the same path goes at the same time.
    pub(super) fn admit_checkpoint(
        &self,
        id: RunId,
        quota: &Quota,
        path: &CheckpointPath,
        size_bytes: u64,
    ) -> Result<(), OperationError> {
        let (Some(bound), Some(run)) = (quota.checkpoint_bytes, self.runs.get(&id)) else { return Ok(()) };
        let replaced = self.checkpoints.find(path).map_or(0, |saved| saved.checkpoint.size_bytes);
        let used = self.checkpoint_bytes(run.create.session) - replaced;
        match used.saturating_add(size_bytes) > bound {
            true => Err(Refusal::DiskQuota { used, more: size_bytes, bound }.into()),
            false => Ok(()),
        }
    }

    fn runs_of(&self, session: SessionId) -> impl Iterator<Item = &Run> {
        self.runs.values().filter(move |run| self.share_owner(session, run.create.session))
    }

    /// Whether two sessions are of one owner; those of nobody are.
    fn share_owner(&self, one: SessionId, other: SessionId) -> bool {
        self.sessions.get(&one) == self.sessions.get(&other)
    }

    fn checkpoint_bytes(&self, session: SessionId) -> u64 {
        self.runs_of(session).map(|run| self.checkpoints.bytes_of(run.id)).sum()
    }
}

//! Shutting down: what executes may finish, runs with changes are written down, nodes are told
//! to go, and then nothing more happens.

use crate::protocol::CoordinatorMessage;

use super::{
    Appending, Effect, State, ms,
    run::{Ranks, Work},
};

/// A shutdown under way.
pub(super) struct Drain {
    deadline_ms: u64,
    stopped: bool,
}

impl State {
    pub(super) fn begin_drain(&mut self) {
        if self.drain.is_none() {
            let deadline_ms = self.now_ms + ms(self.limits.drain_deadline);
            self.drain = Some(Drain { deadline_ms, stopped: false });
            self.advance_all();
        }
    }

    /// Whether the last effect has been said.
    pub(super) fn has_stopped(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| drain.stopped)
    }

    /// Ends once nothing is left to wait for, or the time is up. What is not finished then is
    /// in the journal without an outcome and runs after the next start.
    pub(super) fn continue_drain(&mut self) {
        let Some(drain) = &self.drain else { return };
        if drain.stopped || (self.drain_waits() && self.now_ms < drain.deadline_ms) {
            return;
        }
        if let Some(drain) = &mut self.drain {
            drain.stopped = true;
        }
        for node in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.send(node, CoordinatorMessage::Shutdown);
        }
        self.effects.push(Effect::Stop);
    }

    /// Whether an operation, a snapshot or a write is still under way.
    fn drain_waits(&self) -> bool {
        let outcomes =
            self.appends.values().any(|a| !matches!(a, Appending::Session { .. } | Appending::Noted));
        outcomes
            || self.runs.values().any(|run| {
                let executing = match &run.work {
                    Work::Idle => false,
                    Work::Execute(execution) => !execution.replay,
                    Work::Conclude(_) => true,
                };
                let formed = matches!(run.ranks, Ranks::Formed { .. });
                executing || (formed && run.snapshotting.is_some())
            })
    }
}

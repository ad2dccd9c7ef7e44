//! A run that its owner deletes, with all that it saved. Nothing of it is lost before that is durable, and
//! nothing is left of it then.

use crate::{
    journal::{JournalError, Record},
    protocol::{ClientResponse, CoordinatorMessage},
    types::{OperationError, RunId},
};

use super::{Appending, Refusal, State, WaiterId};

impl State {
    pub(super) fn delete_run(
        &mut self,
        waiter: WaiterId,
        id: RunId,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.refuse_while_draining()?;
        let run = self.runs.get_mut(&id).filter(|run| !run.deleting).ok_or(Refusal::UnknownRun(id))?;
        // From here on nothing is accepted that the journal would have to hold after the run.
        run.deleting = true;
        self.append(vec![Record::DropRun { run: id }], Appending::DropRun { run: id, waiter });
        Ok(None)
    }

    /// The run is gone, or stays as it was.
    pub(super) fn run_dropped(&mut self, id: RunId, waiter: WaiterId, result: Result<(), JournalError>) {
        if let Err(why) = result {
            if let Some(run) = self.runs.get_mut(&id) {
                run.deleting = false;
            }
            return self.refuse(waiter, Refusal::NotDurable(why.to_string()));
        }
        let Some(run) = self.runs.remove(&id) else { return };
        for node in run.rank_nodes() {
            self.send(node, CoordinatorMessage::ReleaseRanks { run: id, generation: run.generation });
        }
        let gone = OperationError::from(Refusal::UnknownRun(id));
        for entry in run.operations.into_values() {
            let waiters = entry.waiters.into_iter().map(|(waiter, _)| waiter);
            for waiter in entry.accept_waiters.into_iter().chain(waiters) {
                self.refuse(waiter, gone.clone());
            }
        }
        self.checkpoints.remove_of(id);
        self.drop_samples_waiting_for(id);
        self.respond(waiter, ClientResponse::Deleted);
    }
}

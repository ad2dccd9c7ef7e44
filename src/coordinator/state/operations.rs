//! A run's queue: acceptance, idempotency, waiting for outcomes.

use crate::{
    journal::{JournalError, Record},
    protocol::{Call, ClientResponse, Operation, OperationSeq, SubmitOperation, encode},
    types::{Digest, InvalidInput, RunId},
};

use super::{
    Appending, Refusal, State, WaiterId, admission,
    run::{Entry, Run},
};

/// Operations of a run that are accepted and not finished: a client that submits ahead is
/// stopped here and not by memory.
pub(super) const QUEUE_MAX: usize = 256;

/// Waiters that one operation holds at once.
pub(super) const WAITERS_MAX: usize = 256;

/// Longest time for which a wait is held.
const HOLD_MAX_MS: u64 = 60_000;

impl State {
    /// Journals an operation; `Accepted` follows when it is durable.
    pub(super) fn submit(
        &mut self,
        waiter: WaiterId,
        call: Call,
        submit: SubmitOperation,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.refuse_while_draining()?;
        let SubmitOperation { run: id, key, mut operation } = submit;
        let run = self.runs.get_mut(&id).filter(|run| !run.deleting).ok_or(Refusal::UnknownRun(id))?;
        let session = run.create.session;
        admission::operation(&mut operation)?;
        if let (Operation::Init { lora }, Some(offer)) = (&operation, self.models.get(&run.create.base_model))
        {
            admission::rank(lora, offer)?;
            // It may take more memory than the adapter that the run was accepted with.
            if let Some(run) = self.runs.get(&id) {
                self.fits_adapter(run, lora)?;
            }
        }
        let Some(run) = self.runs.get_mut(&id) else { return Err(Refusal::UnknownRun(id)) };
        let body = Digest::of(&encode(&operation));
        if let Some(seq) = run.keys.get(&key) {
            return accept_again(run, *seq, waiter, body);
        }
        if let Some(error) = &run.broken {
            return Err(Refusal::Broken { run: id, reason: error.message.clone() });
        }
        if run.unfinished() >= QUEUE_MAX {
            return Err(Refusal::QueueFull { run: id, bound: QUEUE_MAX });
        }
        self.admit_operation(session, &call.quota, &operation)?;
        let Some(run) = self.runs.get_mut(&id) else { return Err(Refusal::UnknownRun(id)) };
        let since_ms = self.now_ms;
        (run.resting, run.last_used_ms) = (false, since_ms);
        let seq = OperationSeq(run.next_seq);
        run.next_seq += 1;
        run.accepted_incarnation += u32::from(begins_incarnation(&operation));
        let incarnation = run.accepted_incarnation;
        let record = Record::Operation { run: id, seq, key, incarnation, operation: operation.clone() };
        let entry = Entry {
            key,
            body,
            incarnation,
            operation: Some(operation),
            accepted: false,
            outcome: None,
            visible: false,
            since_ms,
            call,
            accept_waiters: vec![waiter],
            waiters: Vec::new(),
        };
        run.operations.insert(seq, entry);
        run.keys.insert(key, seq);
        self.append(vec![record], Appending::Operation { run: id, seq });
        Ok(None)
    }

    /// The operation is durable, or it never was.
    pub(super) fn operation_durable(
        &mut self,
        id: RunId,
        seq: OperationSeq,
        result: Result<(), JournalError>,
    ) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Some(entry) = run.operations.get_mut(&seq) else { return };
        let waiters = std::mem::take(&mut entry.accept_waiters);
        match result {
            Ok(()) => {
                entry.accepted = true;
                run.wanted = true;
                for waiter in waiters {
                    self.respond(waiter, ClientResponse::Accepted { seq });
                }
                self.advance(id);
            }
            Err(why) => {
                run.keys.remove(&entry.key);
                let held = entry.waiters.iter().map(|(waiter, _)| *waiter).collect::<Vec<_>>();
                run.operations.remove(&seq);
                for waiter in waiters.into_iter().chain(held) {
                    self.refuse(waiter, Refusal::NotDurable(why.to_string()));
                }
            }
        }
    }

    /// Answers with the outcome, or holds the waiter until there is one.
    pub(super) fn wait_operation(
        &mut self,
        waiter: WaiterId,
        id: RunId,
        seq: OperationSeq,
        hold_ms: u32,
    ) -> Result<Option<ClientResponse>, Refusal> {
        let now_ms = self.now_ms;
        let run = self.runs.get_mut(&id).ok_or(Refusal::UnknownRun(id))?;
        let entry = run.operations.get_mut(&seq).ok_or(Refusal::UnknownOperation { run: id, seq: seq.0 })?;
        if entry.visible || hold_ms == 0 {
            return Ok(Some(ClientResponse::Operation(entry.status())));
        }
        if entry.waiters.len() >= WAITERS_MAX {
            return Err(Refusal::Overloaded { what: "waits for one operation", bound: WAITERS_MAX });
        }
        entry.waiters.push((waiter, now_ms + u64::from(hold_ms).min(HOLD_MAX_MS)));
        Ok(None)
    }

    /// Lets the outcome be seen.
    pub(super) fn show(&mut self, id: RunId, seq: OperationSeq) {
        let Some(run) = self.runs.get_mut(&id) else { return };
        let Some(entry) = run.operations.get_mut(&seq) else { return };
        entry.visible = true;
        let status = entry.status();
        for (waiter, _) in std::mem::take(&mut entry.waiters) {
            self.respond(waiter, ClientResponse::Operation(status.clone()));
        }
    }

    /// Answers `Pending` to whoever was held long enough.
    pub(super) fn expire_waiters(&mut self, id: RunId) {
        let now_ms = self.now_ms;
        let Some(run) = self.runs.get_mut(&id) else { return };
        let from = run.publishing.as_ref().map_or(run.finished, |p| p.seq.min(run.finished));
        let mut due = Vec::new();
        for (_, entry) in run.operations.range_mut(from..) {
            let expired = entry.waiters.extract_if(.., |(_, until_ms)| *until_ms <= now_ms);
            due.extend(expired.map(|(waiter, _)| (waiter, crate::protocol::OperationStatus::Pending)));
        }
        for (waiter, status) in due {
            self.respond(waiter, ClientResponse::Operation(status));
        }
    }
}

/// Answers a retry with what the first try got; the same key for something else is refused.
fn accept_again(
    run: &mut Run,
    seq: OperationSeq,
    waiter: WaiterId,
    body: Digest,
) -> Result<Option<ClientResponse>, Refusal> {
    let entry = run.operations.get_mut(&seq).ok_or(Refusal::UnknownOperation { run: run.id, seq: seq.0 })?;
    if entry.body != body {
        let problem = format!("was used for another operation of {}, number {}", run.id, seq.0);
        return Err(InvalidInput::new("key", problem).into());
    }
    if entry.accepted {
        return Ok(Some(ClientResponse::Accepted { seq }));
    }
    if entry.accept_waiters.len() >= WAITERS_MAX {
        return Err(Refusal::Overloaded { what: "submits of one operation", bound: WAITERS_MAX });
    }
    entry.accept_waiters.push(waiter);
    Ok(None)
}

/// Whether the run's life counts anew from this operation on. It does so also if the operation
/// fails: numbers of lives may be left out, but never repeat.
fn begins_incarnation(operation: &crate::protocol::Operation) -> bool {
    use crate::protocol::Operation;
    matches!(operation, Operation::Init { .. } | Operation::LoadState { .. })
}

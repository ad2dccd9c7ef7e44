//! What one owner may take, and runs that are asked for twice.

use crate::{
    protocol::{Call, ClientRequest, ClientResponse, Operation, OperationKey, Quota, SubmitOperation},
    types::{ErrorKind, SessionId},
};

use super::{
    desk::{Desk, RUN, create, disk_full, optim_step, save_state},
    runs::session,
};

fn within(quota: Quota) -> Call {
    Call { quota, ..Call::default() }
}

fn session_of(desk: &mut Desk, owner: &str) -> SessionId {
    match desk.asked(ClientRequest::CreateSessionFor { owner: owner.to_owned() }) {
        ClientResponse::Session(session) => session,
        other => panic!("no session: {other:?}"),
    }
}

fn called(desk: &mut Desk, call: Call, request: ClientRequest) -> ClientResponse {
    let waiter = desk.call(call, request);
    desk.answer(waiter).cloned().expect("an answer at once")
}

fn submit(desk: &mut Desk, key: u8, call: Call, operation: Operation) -> ClientResponse {
    let submit = SubmitOperation { run: RUN, key: OperationKey([key; 16]), operation };
    called(desk, call, ClientRequest::Submit(submit))
}

fn kind(response: &ClientResponse) -> Option<ErrorKind> {
    match response {
        ClientResponse::Error(error) => Some(error.kind),
        _ => None,
    }
}

#[test]
fn an_owner_has_as_many_runs_as_the_quota_says() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    let (ada, again, bob) =
        (session_of(&mut desk, "ada"), session_of(&mut desk, "ada"), session_of(&mut desk, "bob"));
    let call = within(Quota { runs: Some(1), ..Quota::default() });
    let mut make = |session| called(&mut desk, call, ClientRequest::CreateRun(create(session, None)));
    assert!(matches!(make(ada), ClientResponse::Run(_)));
    let refused = make(again);
    assert_eq!(kind(&refused), Some(ErrorKind::PermissionDenied), "{refused:?}: nothing to wait for");
    assert!(matches!(make(bob), ClientResponse::Run(_)), "another's runs are not counted");
    let ClientResponse::Run(first) = desk.asked(ClientRequest::RunInfo { run: RUN }) else {
        panic!("no run")
    };
    assert_eq!(desk.asked(ClientRequest::DeleteRun { run: first.run }), ClientResponse::Deleted);
    let again = called(&mut desk, call, ClientRequest::CreateRun(create(again, None)));
    assert!(matches!(again, ClientResponse::Run(_)), "there is room again");
}

#[test]
fn runs_that_are_on_their_way_to_the_disk_are_counted() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    let session = session(&mut desk);
    desk.durable = false;
    let call = within(Quota { runs: Some(1), ..Quota::default() });
    let first = desk.call(call, ClientRequest::CreateRun(create(session, None)));
    let second = desk.call(call, ClientRequest::CreateRun(create(session, None)));
    assert!(desk.answer(first).is_none());
    assert_eq!(desk.answer(second).and_then(kind), Some(ErrorKind::PermissionDenied));
}

#[test]
fn operations_of_all_runs_together_wait_for_the_quota() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.lose(1);
    let call = within(Quota { queued_operations: Some(2), ..Quota::default() });
    for key in 1..=2 {
        assert!(matches!(submit(&mut desk, key, call, optim_step()), ClientResponse::Accepted { .. }));
    }
    let full = submit(&mut desk, 3, call, optim_step());
    assert_eq!(kind(&full), Some(ErrorKind::ResourceExhausted), "{full:?}: it will pass");
    let retry = submit(&mut desk, 2, call, optim_step());
    assert!(matches!(retry, ClientResponse::Accepted { .. }), "what was accepted stays accepted");
}

#[test]
fn a_checkpoint_that_has_no_room_is_not_kept() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    // A state of the desk's ranks is called after its step and name: `state at 0 as a`.
    let size = "state at 0 as a".len() as u64;
    let call = within(Quota { checkpoint_bytes: Some(2 * size), ..Quota::default() });
    let mut save = |key, name: &str| {
        let accepted = submit(&mut desk, key, call, save_state(name));
        let ClientResponse::Accepted { seq } = accepted else { return Err(kind(&accepted)) };
        let waiter = desk.ask(ClientRequest::WaitOperation { run: RUN, seq, hold_ms: 60_000 });
        match desk.status(waiter) {
            Some(crate::protocol::OperationStatus::Failed(error)) => Err(Some(error.kind)),
            _ => Ok(()),
        }
    };
    assert_eq!((save(1, "a"), save(2, "longer")), (Ok(()), Err(Some(ErrorKind::PermissionDenied))));
    assert_eq!((save(3, "a"), save(4, "b")), (Ok(()), Ok(())), "one that is replaced makes room");
    assert_eq!(save(5, "c"), Err(Some(ErrorKind::PermissionDenied)), "refused before it is saved");
    let ClientResponse::Checkpoints(kept) = desk.asked(ClientRequest::ListCheckpoints { run: None }) else {
        panic!("no list")
    };
    assert_eq!(kept.iter().map(|c| c.checkpoint_id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
}

#[test]
fn a_run_that_is_asked_for_twice_is_made_once() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    let (ours, other) = (session(&mut desk), session(&mut desk));
    let call = Call { key: Some(OperationKey([7; 16])), ..Call::default() };
    desk.durable = false;
    let waiters = [0, 1].map(|_| desk.call(call, ClientRequest::CreateRun(create(ours, Some(1)))));
    desk.wrote(Ok(()));
    let made = |waiter| match desk.answer(waiter) {
        Some(ClientResponse::Run(run)) => run.run,
        other => panic!("no run: {other:?}"),
    };
    assert_eq!(waiters.map(made), [RUN, RUN], "while the first is written");
    desk.durable = true;
    let mut ask = |session, rank| {
        let mut create = create(session, Some(1));
        create.lora.rank = rank;
        called(&mut desk, call, ClientRequest::CreateRun(create))
    };
    assert!(matches!(ask(ours, 8), ClientResponse::Run(run) if run.run == RUN), "and after it");
    assert_eq!(kind(&ask(ours, 4)), Some(ErrorKind::InvalidInput), "for another run");
    assert!(matches!(ask(other, 8), ClientResponse::Run(run) if run.run != RUN), "of another session");
}

#[test]
fn a_run_that_was_not_durable_is_made_by_the_next_try() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    let session = session(&mut desk);
    let call = Call { key: Some(OperationKey([7; 16])), ..Call::default() };
    desk.durable = false;
    let first = desk.call(call, ClientRequest::CreateRun(create(session, None)));
    desk.wrote(Err(disk_full()));
    assert_eq!(desk.answer(first).and_then(kind), Some(ErrorKind::ResourceExhausted));
    desk.durable = true;
    let again = called(&mut desk, call, ClientRequest::CreateRun(create(session, None)));
    assert!(matches!(again, ClientResponse::Run(_)));
}

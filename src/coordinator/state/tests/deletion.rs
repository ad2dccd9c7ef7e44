//! Runs that are deleted.

use crate::{
    journal::Record,
    protocol::{ClientRequest, ClientResponse, CoordinatorMessage, SampleTarget},
    types::ErrorKind,
};

use super::{
    desk::{Desk, RUN, disk_full, optim_step, save_state},
    samplers::request,
};

#[test]
fn a_deleted_run_leaves_nothing_and_tells_whoever_waits() {
    let mut desk = Desk::with_run(&[(1, 1)], None);
    let saved = desk.run(1, save_state("a"));
    desk.done(saved);
    desk.answering = false;
    let waiting = desk.run(2, optim_step());
    let sampling = desk.ask(ClientRequest::Sample(request(SampleTarget::Live { run: RUN, min_version: 5 })));
    assert_eq!(desk.asked(ClientRequest::DeleteRun { run: RUN }), ClientResponse::Deleted);
    assert!(desk.records.contains(&Record::DropRun { run: RUN }));
    let released = |m: &CoordinatorMessage| matches!(m, CoordinatorMessage::ReleaseRanks { run: RUN, .. });
    assert_eq!(desk.count(released), 1, "its ranks are given back");
    for waiter in [waiting, sampling] {
        let told = desk.answer(waiter);
        assert!(matches!(told, Some(ClientResponse::Error(e)) if e.kind == ErrorKind::NotFound), "{told:?}");
    }
    assert_eq!(desk.asked(ClientRequest::ListCheckpoints { run: None }), ClientResponse::Checkpoints(vec![]));
    for request in [ClientRequest::RunInfo { run: RUN }, ClientRequest::DeleteRun { run: RUN }] {
        assert_eq!(desk.refused(request).kind, ErrorKind::NotFound);
    }
    desk.pass(60_000);
}

#[test]
fn a_run_stays_if_its_end_is_not_durable() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.durable = false;
    let waiter = desk.ask(ClientRequest::DeleteRun { run: RUN });
    let submitted = desk.submit(1, optim_step());
    assert!(matches!(submitted, ClientResponse::Error(e) if e.kind == ErrorKind::NotFound));
    desk.wrote(Err(disk_full()));
    desk.durable = true;
    let told = desk.answer(waiter);
    assert!(matches!(told, Some(ClientResponse::Error(e)) if e.kind == ErrorKind::ResourceExhausted));
    let waiter = desk.run(2, optim_step());
    desk.done(waiter);
}

//! Runs: creation, the queue, ranks, outcomes, checkpoints.

use crate::{
    coordinator::state::{Effect, Event, operations::QUEUE_MAX},
    journal::{JournalError, Outcome, Record},
    protocol::{
        Blame, BlobRef, ClientRequest, ClientResponse, CoordinatorMessage, LoadSource, NodeId, NodeMessage,
        Operation, OperationKey, OperationSeq, RankIndex, SubmitOperation,
    },
    types::{CheckpointTarget, Digest, ErrorKind, LoraConfig, OperationError, SessionId},
};

use super::desk::{
    Desk, MODEL, RUN, blob, create, disk_full, forward_backward, hello, init, load, optim_step, save_state,
};

pub(super) fn session(desk: &mut Desk) -> SessionId {
    match desk.asked(ClientRequest::CreateSession) {
        ClientResponse::Session(session) => session,
        other => panic!("no session: {other:?}"),
    }
}

#[test]
fn a_run_is_journaled_with_every_default() {
    let desk = Desk::with_run(&[(2, 0), (1, 0)], None);
    let Some(Record::Run { create, .. }) = desk.records.iter().find(|r| matches!(r, Record::Run { .. }))
    else {
        panic!("no run")
    };
    assert_eq!((create.base_model.as_str(), create.replicas), (MODEL, None));
    assert_eq!((create.max_seq_len, create.micro_batch_tokens), (Some(32), Some(1_024)));
    assert_eq!(create.name.as_deref(), Some(MODEL));
}

#[test]
fn refuses_a_rank_over_the_model_s_dimensions_before_it_is_journaled() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let session = session(&mut desk);
    let mut create = create(session, None);
    create.lora.rank = 129;
    let problem =
        "`lora.rank`: must be at most 128, the smaller dimension of `k_proj` in \"org/model\", got 129";
    let error = desk.refused(ClientRequest::CreateRun(create.clone()));
    assert!(error.kind == ErrorKind::InvalidInput && error.message == problem, "{error}");
    create.lora.targets = vec![crate::types::LoraTarget::QProj];
    assert!(matches!(desk.asked(ClientRequest::CreateRun(create)), ClientResponse::Run(_)));
    let refused = desk.submit(1, Operation::Init { lora: LoraConfig::new(129, 1) });
    assert!(matches!(refused, ClientResponse::Error(e) if e.message == problem));
    let waiter = desk.run(1, init());
    desk.done(waiter);
}

#[test]
fn refuses_what_a_run_can_not_be() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    let session = session(&mut desk);
    let mut refused = |change: fn(&mut crate::protocol::CreateRun)| {
        let mut create = create(session, None);
        change(&mut create);
        desk.refused(ClientRequest::CreateRun(create)).message
    };
    let unknown = refused(|create| create.base_model = "other".into());
    assert!(unknown.contains("\"other\" is not offered; offered: org/model"), "{unknown}");
    assert!(
        refused(|create| create.lora = LoraConfig::new(0, 1)).starts_with("`lora.rank`: must be at least 1")
    );
    assert!(
        refused(|create| create.lora = LoraConfig::new(4_096, 1)).starts_with("`lora.rank`: must be 1 to")
    );
    assert!(
        refused(|create| create.max_seq_len = Some(33)).starts_with("`max_seq_len`: must be 1 to 32, got 33")
    );
    assert!(refused(|create| create.micro_batch_tokens = Some(0)).starts_with("`micro_batch_tokens`"));
    assert!(refused(|create| create.session = SessionId(9)).contains("session-9 does not exist"));
}

#[test]
fn a_starting_service_holds_requests_until_a_node_joins() {
    let mut desk = Desk::new();
    let session = session(&mut desk);
    let waiter = desk.ask(ClientRequest::CreateRun(create(session, None)));
    desk.pass(10_000);
    assert_eq!(desk.answer(waiter), None);
    desk.join(1, 1, 0);
    assert!(matches!(desk.answer(waiter), Some(ClientResponse::Run(_))));
}

#[test]
fn a_service_without_nodes_refuses_in_the_end() {
    let mut desk = Desk::new();
    let session = session(&mut desk);
    let waiter = desk.ask(ClientRequest::CreateRun(create(session, None)));
    desk.pass(61_000);
    assert!(
        matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.message.contains("no node has joined"))
    );
}

#[test]
fn one_key_is_one_operation() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    assert_eq!(desk.submit(1, init()), ClientResponse::Accepted { seq: OperationSeq(1) });
    assert_eq!(desk.submit(2, optim_step()), ClientResponse::Accepted { seq: OperationSeq(2) });
    assert_eq!(desk.submit(1, init()), ClientResponse::Accepted { seq: OperationSeq(1) });
    let operations = desk.records.iter().filter(|r| matches!(r, Record::Operation { .. })).count();
    assert_eq!(operations, 2);
    let submit = SubmitOperation { run: RUN, key: OperationKey([1; 16]), operation: optim_step() };
    let error = desk.refused(ClientRequest::Submit(submit));
    assert_eq!(error.kind, ErrorKind::InvalidInput);
    assert!(error.message.starts_with("`key`"), "{error}");
}

#[test]
fn a_retry_before_the_operation_is_durable_waits_with_the_first() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.durable = false;
    let submit =
        || ClientRequest::Submit(SubmitOperation { run: RUN, key: OperationKey([1; 16]), operation: init() });
    let waiters = [desk.ask(submit()), desk.ask(submit())];
    assert!(waiters.iter().all(|waiter| desk.answer(*waiter).is_none()));
    let [Effect::Append { append, .. }] = desk.others[..] else { panic!("{:?}", desk.others) };
    desk.feed(Event::Appended { append, result: Ok(()) });
    for waiter in waiters {
        assert_eq!(desk.answer(waiter), Some(&ClientResponse::Accepted { seq: OperationSeq(1) }));
    }
}

#[test]
fn an_operation_that_can_not_be_written_leaves_no_trace() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.durable = false;
    let submit = SubmitOperation { run: RUN, key: OperationKey([1; 16]), operation: init() };
    let waiter = desk.ask(ClientRequest::Submit(submit));
    let Some(Effect::Append { append, .. }) = desk.others.pop() else { panic!("nothing was written") };
    desk.feed(Event::Appended { append, result: Err(disk_full()) });
    assert!(
        matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.kind == ErrorKind::ResourceExhausted)
    );
    desk.durable = true;
    let waiter = desk.run(1, optim_step());
    desk.done(waiter);
}

#[test]
fn the_queue_of_a_run_is_bounded() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.answering = false;
    let submit = |i: usize| {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&i.to_le_bytes());
        ClientRequest::Submit(SubmitOperation { run: RUN, key: OperationKey(key), operation: optim_step() })
    };
    for i in 0..QUEUE_MAX {
        assert!(matches!(desk.asked(submit(i)), ClientResponse::Accepted { .. }));
    }
    assert_eq!(desk.refused(submit(QUEUE_MAX)).kind, ErrorKind::ResourceExhausted);
}

#[test]
fn refuses_operations_that_no_rank_needs_to_see() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let mut refused = |operation: Operation| {
        let submit = SubmitOperation { run: RUN, key: OperationKey([9; 16]), operation };
        let error = desk.refused(ClientRequest::Submit(submit));
        assert_eq!(error.kind, ErrorKind::InvalidInput);
        error.message
    };
    assert!(refused(Operation::Init { lora: LoraConfig::new(0, 1) }).starts_with("`lora.rank`"));
    for name in ["", ".hidden", "a/b", "é"] {
        assert!(refused(save_state(name)).starts_with("`name`"), "{name:?}");
    }
    assert!(refused(save_state(&"x".repeat(256))).starts_with("`name`"));
    for path in
        ["", "file:///x", "bt://loops:run-1/other/x", "bt://loops:run-1/weights/.x", "bt://loops:x/weights/y"]
    {
        assert!(refused(load(path)).starts_with("`path`"), "{path:?}");
    }
    for path in ["blob:", "blob:abc/1", &format!("blob:{}/x", Digest::of(b"x"))] {
        assert!(refused(load(path)).starts_with("`path`"), "{path:?}");
    }
    let adapter = BlobRef { digest: Digest::of(b"x"), size: 1 }.load_path();
    for path in ["bt://loops:run-1/sampler_weights/x".to_owned(), adapter] {
        let load = Operation::LoadState { path, with_optimizer: true, source: None };
        assert!(refused(load).contains("no optimiser"));
    }
    let Operation::OptimStep { mut adam } = optim_step() else { unreachable!() };
    adam.beta1 = 1.0;
    assert!(refused(Operation::OptimStep { adam }).starts_with("`adam_params.beta1`"));
}

#[test]
fn an_outcome_is_durable_before_ranks_commit_and_waiters_see_it() {
    let mut desk = Desk::with_run(&[(2, 0)], None);
    desk.answering = false;
    let waiter = desk.run(1, init());
    let [(node, token, operation)] = desk.executed().try_into().unwrap();
    desk.durable = false;
    let first = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, first);
    assert!(desk.others.is_empty(), "one of two ranks has answered");
    let second = desk.prepared(token, RankIndex(1), &operation);
    desk.say(node, second);
    assert!(desk.sent.is_empty() && desk.status(waiter).is_none());
    let Some(Effect::Append { append, records }) = desk.others.pop() else { panic!("nothing is written") };
    assert!(matches!(records[..], [Record::Outcome { outcome: Outcome::Done { .. }, .. }]));
    desk.feed(Event::Appended { append, result: Ok(()) });
    assert_eq!(desk.sent, [(node, CoordinatorMessage::Commit { token })]);
    desk.done(waiter);
}

#[test]
fn an_outcome_that_can_not_be_written_is_written_again() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let waiter = desk.run(1, init());
    desk.done(waiter);
    desk.answering = false;
    let waiter = desk.run(2, optim_step());
    let (node, token, operation) = desk.executed().pop().unwrap();
    desk.durable = false;
    let prepared = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, prepared);
    let Some(Effect::Append { append, .. }) = desk.others.pop() else { panic!("nothing is written") };
    desk.feed(Event::Appended { append, result: Err(disk_full()) });
    assert_eq!(desk.status(waiter), None);
    desk.durable = true;
    desk.answering = true;
    desk.pass(1_500);
    desk.done(waiter);
}

#[test]
fn an_outcome_that_the_journal_refuses_quarantines_the_run() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.answering = false;
    let waiter = desk.run(1, optim_step());
    let (node, token, operation) = desk.executed().pop().unwrap();
    desk.durable = false;
    let prepared = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, prepared);
    let Some(Effect::Append { append, records }) = desk.others.pop() else { panic!("nothing is written") };
    desk.durable = true;
    let (record, reason) = (records[0].to_string(), "there is another".to_owned());
    desk.feed(Event::Appended { append, result: Err(JournalError::Refused { record, reason }) });
    let error = desk.failed(waiter);
    assert!(error.message.contains("refuses operation 1: there is another"), "{error}");
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::Commit { .. })), 0);
    let submit = SubmitOperation { run: RUN, key: OperationKey([2; 16]), operation: optim_step() };
    assert!(desk.refused(ClientRequest::Submit(submit)).message.contains("takes no more operations"));
}

#[test]
fn a_refused_operation_is_an_outcome_and_the_queue_goes_on() {
    let mut desk = Desk::with_run(&[(2, 0)], None);
    desk.answering = false;
    let bad = desk.run(1, forward_backward());
    let good = desk.run(2, optim_step());
    let (node, token, _) = desk.executed().pop().unwrap();
    for rank in [0, 1] {
        let error = OperationError::new(ErrorKind::InvalidInput, format!("rank {rank}: token 7 is unknown"));
        let blame = Blame::Operation;
        desk.say(node, NodeMessage::OperationFailed { token, rank: RankIndex(rank), error, blame });
    }
    assert_eq!(desk.failed(bad).kind, ErrorKind::InvalidInput);
    assert_eq!(desk.sent[0], (node, CoordinatorMessage::Discard { token }));
    let (_, token, _) = desk.executed().pop().unwrap();
    assert_eq!((token.seq, desk.status(good)), (OperationSeq(2), None));
}

#[test]
fn ranks_that_disagree_quarantine_the_run() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    desk.answering = false;
    let waiter = desk.run(1, init());
    let behind = desk.run(2, optim_step());
    for (i, (node, token, operation)) in desk.executed().into_iter().enumerate() {
        let mut message = desk.prepared(token, RankIndex(i as u32), &operation);
        if let (1, NodeMessage::Prepared { state, .. }) = (i, &mut message) {
            *state = Digest::of(b"another");
        }
        desk.say(node, message);
    }
    assert!(desk.failed(waiter).message.contains("rank 0 and rank 1 disagree on operation 1"));
    assert!(desk.failed(behind).message.contains("quarantined"));
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::Commit { .. })), 0);
    let submit = SubmitOperation { run: RUN, key: OperationKey([3; 16]), operation: optim_step() };
    assert_eq!(desk.refused(ClientRequest::Submit(submit)).kind, ErrorKind::Internal);
}

#[test]
fn a_node_of_another_protocol_is_refused() {
    let mut desk = Desk::new();
    let hello = crate::protocol::NodeHello { protocol_version: 99, ..hello("old", 1, 0) };
    desk.feed(Event::NodeJoined { node: NodeId(1), hello });
    assert!(matches!(&desk.others[..], [Effect::Dismiss { reason, .. }] if reason.contains("protocol 99")));
}

#[test]
fn a_load_finds_what_a_queued_save_leaves() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.answering = false;
    desk.run(1, save_state("a"));
    let waiter = desk.run(2, load("bt://loops:run-1/weights/a/"));
    let missing = desk.run(3, load("bt://loops:run-1/weights/b"));
    let (node, token, operation) = desk.executed().pop().unwrap();
    desk.answering = true;
    let prepared = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, prepared);
    desk.done(waiter);
    let [(_, _, Operation::LoadState { source: Some(source), .. })] = &desk.executed()[..] else {
        panic!("loaded without source")
    };
    assert_eq!((source.target, source.blob), (CheckpointTarget::Trainer, blob("state at 0 as a")));
    let journaled = desk.records.iter().filter_map(|record| match record {
        Record::Operation {
            seq: OperationSeq(2), operation: Operation::LoadState { source, .. }, ..
        } => Some(*source),
        _ => None,
    });
    assert_eq!(journaled.collect::<Vec<_>>(), [None, Some(*source)]);
    assert_eq!(desk.failed(missing).kind, ErrorKind::NotFound);
    assert_eq!(
        desk.submit(2, load("bt://loops:run-1/weights/a/")),
        ClientResponse::Accepted { seq: OperationSeq(2) }
    );
}

#[test]
fn incarnations_rise_at_init_and_load() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    for (key, operation) in
        [init(), optim_step(), save_state("a"), load("bt://loops:run-1/weights/a"), optim_step()]
            .into_iter()
            .enumerate()
    {
        let waiter = desk.run(key as u8, operation);
        desk.done(waiter);
    }
    let lives: Vec<u32> = desk.executed().into_iter().map(|(_, token, _)| token.incarnation).collect();
    assert_eq!(lives, [1, 1, 1, 2, 2]);
}

#[test]
fn a_saved_name_replaces_the_earlier_checkpoint() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    for (key, operation) in [save_state("a"), optim_step(), save_state("a")].into_iter().enumerate() {
        let waiter = desk.run(key as u8, operation);
        desk.done(waiter);
    }
    let ClientResponse::Checkpoints(listed) = desk.asked(ClientRequest::ListCheckpoints { run: Some(RUN) })
    else {
        panic!("no list")
    };
    assert_eq!(
        listed.iter().map(|c| (c.step, c.path.as_str())).collect::<Vec<_>>(),
        [(1, "bt://loops:run-1/weights/a")]
    );
    let files = ClientRequest::CheckpointFiles {
        checkpoint: listed[0].id,
        page_size: 1,
        page_token: 0,
        presigned: false,
    };
    let ClientResponse::CheckpointFiles(page) = desk.asked(files) else { panic!("no files") };
    assert_eq!((page.total_count, page.next_page_token), (1, None));
    assert_eq!(page.presigned_urls[0].url, format!("blob:{}", blob("state at 1 as a").digest));
    let zero = ClientRequest::CheckpointFiles {
        checkpoint: listed[0].id,
        page_size: 0,
        page_token: 0,
        presigned: false,
    };
    assert!(desk.refused(zero).message.starts_with("`page_size`"));
}

#[test]
fn a_run_belongs_to_whom_its_session_does() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    let asked = desk.asked(ClientRequest::CreateSessionFor { owner: "ada".into() });
    let ClientResponse::Session(session) = asked else { panic!("{asked:?}") };
    let owner = desk.asked(ClientRequest::SessionOwner { session });
    assert_eq!(owner, ClientResponse::SessionOwner(Some("ada".into())));
    let created = desk.asked(ClientRequest::CreateRun(create(session, None)));
    assert!(matches!(created, ClientResponse::Run(info) if info.owner.as_deref() == Some("ada")));
    let error = desk.refused(ClientRequest::CreateSessionFor { owner: String::new() });
    assert!(error.message.starts_with("`owner`: must be 1 to 255 bytes"), "{error}");
}

#[test]
fn a_run_is_found_by_its_newest_name() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    let session = session(&mut desk);
    let named = |name: &str| {
        let mut create = create(session, None);
        create.name = Some(name.to_owned());
        ClientRequest::CreateRun(create)
    };
    for name in ["a", "a", "b"] {
        desk.asked(named(name));
    }
    let ClientResponse::Run(found) = desk.asked(ClientRequest::FindRun { name: "a".into() }) else {
        panic!("not found")
    };
    assert_eq!((found.run.0, found.vocab_size), (2, Some(100)));
    let error = desk.refused(ClientRequest::FindRun { name: "c".into() });
    assert_eq!((error.kind, error.message.as_str()), (ErrorKind::NotFound, "no run is called \"c\""));
}

#[test]
fn an_adapter_that_a_client_stored_is_loaded_by_its_digest() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.answering = false;
    let blob = BlobRef { digest: Digest::of(b"an adapter"), size: 10 };
    desk.run(1, load(&blob.load_path()));
    let [(_, _, Operation::LoadState { source: Some(source), .. })] = &desk.executed()[..] else {
        panic!("the load runs");
    };
    assert_eq!(*source, LoadSource { target: CheckpointTarget::Sampler, blob });
}

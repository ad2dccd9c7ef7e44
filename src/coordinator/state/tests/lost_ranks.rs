//! Rank sets that are lost: what they were doing is done by the next.

use crate::{
    coordinator::state::{Effect, Event},
    protocol::{
        Blame, ClientRequest, ClientResponse, CoordinatorMessage, NodeId, NodeMessage, OperationSeq,
        OperationStatus, RankIndex,
    },
    types::{ErrorKind, OperationError},
};

use super::desk::{Desk, RUN, blob, forward_backward, hello, init, optim_step};

#[test]
fn what_a_lost_node_was_executing_is_executed_again_by_those_that_are_left() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    let waiter = desk.run(1, init());
    desk.done(waiter);
    desk.answering = false;
    let hit = desk.run(2, forward_backward());
    let next = desk.run(3, optim_step());
    desk.sent.clear();
    desk.lose(2);
    assert_eq!(desk.count(|m| matches!(m, CoordinatorMessage::ReleaseRanks { .. })), 1);
    desk.answering = true;
    desk.pass(2_500);
    assert_eq!(desk.status(hit), None, "the node may come back");
    desk.pass(1_000);
    desk.done(hit);
    desk.done(next);
    let executed: Vec<u64> = desk.executed().into_iter().map(|(_, token, _)| token.seq.0).collect();
    assert_eq!(executed, [1, 2, 3], "replayed from the last snapshot, then in the order of acceptance");
}

#[test]
fn an_operation_that_kills_every_rank_set_is_given_up() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let waiter = desk.run(1, init());
    desk.done(waiter);
    desk.answering = false;
    let deadly = desk.run(2, forward_backward());
    desk.answering = true;
    desk.kills = Some(OperationSeq(2));
    for node in 1..=6 {
        let seq = OperationSeq(2);
        let status = desk.asked(ClientRequest::WaitOperation { run: RUN, seq, hold_ms: 0 });
        assert_eq!(
            status,
            ClientResponse::Operation(OperationStatus::Pending),
            "node {node} is not the last"
        );
        desk.lose(node);
        desk.join(node + 1, 1, 0);
        // Ranks form and repeat what is journaled; then the operation is theirs.
        desk.pass(12_000);
    }
    // Its waiter was answered `Pending` long before.
    assert_eq!(desk.status(deadly), Some(&OperationStatus::Pending));
    let again = desk.ask(ClientRequest::WaitOperation { run: RUN, seq: OperationSeq(2), hold_ms: 0 });
    let error = desk.failed(again);
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("operation 2 of run-1 was given up after 6 rank sets"), "{error}");
    assert!(error.message.contains("node node6 was lost"), "{error}");
    desk.kills = None;
    let next = desk.run(3, optim_step());
    desk.pass(12_000);
    desk.done(next);
}

#[test]
fn a_rank_without_memory_fails_its_operation_at_once() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.answering = false;
    let waiter = desk.run(1, init());
    let (node, token, _) = desk.executed().remove(0);
    let error = OperationError::new(ErrorKind::ResourceExhausted, "needs 80 GiB");
    let rank = RankIndex(0);
    desk.say(node, NodeMessage::OperationFailed { token, rank, error, blame: Blame::Environment });
    let error = desk.failed(waiter);
    assert_eq!(error.kind, ErrorKind::ResourceExhausted);
    assert!(error.message.contains("needs 80 GiB"), "{error}");
}

#[test]
fn a_node_that_joins_refills_the_rank_set() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    let waiter = desk.run(1, init());
    desk.done(waiter);
    desk.lose(2);
    desk.pass(4_000);
    desk.sent.clear();
    desk.join(3, 1, 0);
    let restored = desk.sent.iter().filter_map(|(node, message)| match message {
        CoordinatorMessage::FormRanks { roster, restore, .. } => Some((node.0, roster.len(), *restore)),
        _ => None,
    });
    let restored: Vec<_> = restored.collect();
    assert_eq!(restored, [(1, 2, Some(blob("snapshot 1"))), (3, 2, Some(blob("snapshot 1")))]);
}

#[test]
fn answers_of_an_earlier_rank_set_are_not_heard() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], Some(1));
    desk.answering = false;
    let waiter = desk.run(1, init());
    let (node, token, operation) = desk.executed().pop().unwrap();
    desk.answering = true;
    desk.feed(Event::NodeLost { node, reason: "reset".into() });
    desk.pass(4_000);
    desk.done(waiter);
    desk.answering = false;
    let second = desk.run(2, init());
    let (node, current, _) = desk.executed().pop().unwrap();
    assert!(current.generation > token.generation);
    let stale = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, stale);
    let stale = desk.prepared(
        crate::protocol::OpToken { generation: token.generation, ..current },
        RankIndex(0),
        &operation,
    );
    desk.say(node, stale);
    assert_eq!(desk.status(second), None);
}

#[test]
fn an_operation_has_a_deadline_that_names_the_node() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    desk.answering = false;
    let waiter = desk.run(1, init());
    let (node, token, operation) = desk.executed().remove(0);
    let prepared = desk.prepared(token, RankIndex(0), &operation);
    desk.say(node, prepared);
    for _ in 0..620 {
        for node in [1, 2] {
            desk.say(NodeId(node), NodeMessage::Pong { nonce: 0 });
        }
        desk.pass(1_000);
    }
    let seats = desk.sent.iter().filter_map(|(_, message)| match message {
        CoordinatorMessage::FormRanks { generation, .. } => Some(generation.0),
        _ => None,
    });
    assert_eq!(seats.max(), Some(2), "a second rank set took over");
    for _ in 0..2_000 {
        for node in [1, 2] {
            desk.say(NodeId(node), NodeMessage::Pong { nonce: 0 });
        }
        desk.pass(1_000);
    }
    // The waiter was answered `Pending` long before.
    assert_eq!(desk.status(waiter), Some(&OperationStatus::Pending));
    let again = desk.ask(ClientRequest::WaitOperation { run: RUN, seq: OperationSeq(1), hold_ms: 0 });
    let error = desk.failed(again);
    assert!(
        error.message.contains("node node1, node2 did not form its ranks of run-1 within 400 s"),
        "{error}"
    );
}

#[test]
fn an_operation_that_makes_progress_is_not_given_up() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    desk.answering = false;
    desk.run(1, init());
    let (node, token, _) = desk.executed().remove(0);
    let alive = |desk: &mut Desk, progress: Option<u32>| {
        for node in [1, 2] {
            desk.say(NodeId(node), NodeMessage::Pong { nonce: 0 });
        }
        if let Some(done) = progress {
            // The other rank waits for this one.
            desk.say(node, NodeMessage::Progress { token, rank: RankIndex(0), done, of: 4_000 });
        }
        desk.pass(1_000);
    };
    (0..3_000).for_each(|second| alive(&mut desk, Some(second)));
    (0..598).for_each(|_| alive(&mut desk, None));
    let released = |desk: &Desk| desk.count(|m| matches!(m, CoordinatorMessage::ReleaseRanks { .. }));
    assert_eq!(released(&desk), 0);
    (0..4).for_each(|_| alive(&mut desk, None));
    assert_eq!(released(&desk), 2, "without progress for 600 s");
}

#[test]
fn a_silent_node_is_lost_and_a_stalled_coordinator_blames_nobody() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.now_ms += 60_000; // Nobody ran.
    desk.feed(Event::Tick);
    desk.pass(2_000);
    assert_eq!(desk.others, []);
    desk.answering = false;
    desk.pass(16_000);
    assert!(
        matches!(&desk.others[..], [Effect::Dismiss { node: NodeId(1), reason }] if reason.contains("silent"))
    );
}

#[test]
fn a_node_of_the_same_name_replaces_the_earlier() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    desk.feed(Event::NodeJoined { node: NodeId(2), hello: hello("node1", 1, 0) });
    assert!(matches!(&desk.others[..], [Effect::Dismiss { node: NodeId(1), .. }]));
    let waiter = desk.run(1, init());
    desk.done(waiter);
}

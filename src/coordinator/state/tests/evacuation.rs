//! Draining a node.

use crate::{
    journal::{Record, Recovered},
    protocol::{ClientRequest, ClientResponse, CoordinatorMessage, NodeDrain, NodeId, SampleTarget},
    types::ErrorKind,
};

use super::{
    desk::{Desk, RUN, disk_full, forward_backward, init, nothing, optim_step, publish},
    samplers::request,
};

fn drain(desk: &mut Desk, name: &str, drain: bool) -> Vec<Option<NodeDrain>> {
    match desk.asked(ClientRequest::DrainNode { name: name.into(), drain }) {
        ClientResponse::Cluster(status) => status.nodes.into_iter().map(|node| node.drain).collect(),
        other => panic!("not drained: {other:?}"),
    }
}

/// Nodes of the last rank set.
fn seats(desk: &Desk) -> Vec<u32> {
    let roster = desk.sent.iter().rev().find_map(|(_, message)| match message {
        CoordinatorMessage::FormRanks { roster, .. } => Some(roster.clone()),
        _ => None,
    });
    roster.unwrap_or_default().iter().map(|seat| seat.node.0).collect()
}

/// Nodes that joined long ago, and a run on all of them.
fn settled(nodes: &[(u32, u32)]) -> Desk {
    let mut desk = Desk::with_run(nodes, None);
    desk.pass(5_000);
    desk
}

const OVER: NodeDrain = NodeDrain { runs: 0, samples: 0 };

#[test]
fn ranks_leave_a_node_between_operations_with_their_state_written_down() {
    let mut desk = settled(&[(1, 0), (1, 0)]);
    assert_eq!(seats(&desk), [1, 2]);
    let waiter = desk.run(1, init());
    desk.done(waiter);
    desk.sent.clear();
    let at_first = drain(&mut desk, "node1", true);
    assert_eq!(at_first, [Some(NodeDrain { runs: 1, samples: 0 }), None], "its state is being written down");
    assert_eq!(drain(&mut desk, "node1", true), [Some(OVER), None]);
    assert_eq!(seats(&desk), [2]);
    let snapshot = desk.sent.iter().position(|(_, m)| matches!(m, CoordinatorMessage::TakeSnapshot { .. }));
    let formed = desk.sent.iter().position(|(_, m)| matches!(m, CoordinatorMessage::FormRanks { .. }));
    assert!(snapshot.expect("written down") < formed.expect("formed anew"));
    // It goes, and no operation notices.
    desk.sent.clear();
    desk.lose(1);
    let waiter = desk.run(2, optim_step());
    desk.done(waiter);
    assert!(desk.executed().iter().all(|(node, ..)| *node == NodeId(2)));
}

#[test]
fn an_operation_that_executes_ends_where_it_began() {
    let mut desk = settled(&[(1, 0), (1, 0)]);
    desk.answering = false;
    let waiter = desk.run(1, forward_backward());
    assert_eq!(drain(&mut desk, "node1", true), [Some(NodeDrain { runs: 1, samples: 0 }), None]);
    assert_eq!(seats(&desk), [1, 2], "nothing moves under it");
    desk.answering = true;
    for (node, message) in std::mem::take(&mut desk.sent) {
        for answer in desk.ideal_answers(node, message) {
            desk.say(node, answer);
        }
    }
    desk.done(waiter);
    assert_eq!(seats(&desk), [2]);
}

#[test]
fn a_drained_node_gets_ranks_only_once_it_is_taken_back() {
    let mut desk = settled(&[(1, 0), (1, 0)]);
    drain(&mut desk, "node2", true);
    assert_eq!(seats(&desk), [1]);
    // It connects again under its name.
    desk.lose(2);
    desk.join(2, 1, 0);
    assert_eq!(seats(&desk), [1]);
    assert_eq!(drain(&mut desk, "node2", false), [None, None]);
    assert_eq!(seats(&desk), [1, 2]);
}

#[test]
fn with_no_other_node_a_run_waits_for_one() {
    let mut desk = Desk::with_run(&[(1, 0)], Some(1));
    assert_eq!(drain(&mut desk, "node1", true), [Some(OVER)]);
    let waiter = desk.run(1, optim_step());
    assert_eq!(desk.status(waiter), None);
    desk.join(2, 1, 0);
    desk.done(waiter);
    let ClientResponse::Run(info) = desk.asked(ClientRequest::RunInfo { run: RUN }) else { panic!("no run") };
    assert_eq!(info.step, 1);
}

#[test]
fn replicas_of_a_drained_node_are_not_waited_for_and_get_no_requests() {
    let mut desk = Desk::with_run(&[(1, 1), (0, 1)], None);
    let waiter = desk.run(1, publish("v0"));
    desk.done(waiter);
    drain(&mut desk, "node2", true);
    desk.sent.clear();
    let waiter = desk.run(2, publish("v1"));
    desk.done(waiter);
    let staged = |(node, m): &(NodeId, CoordinatorMessage)| {
        matches!(m, CoordinatorMessage::Stage { .. }).then_some(*node)
    };
    assert_eq!(desk.sent.iter().filter_map(staged).collect::<Vec<_>>(), [NodeId(1)]);
    for _ in 0..3 {
        let target = SampleTarget::Live { run: RUN, min_version: 0 };
        desk.ask(ClientRequest::Sample(request(target)));
    }
    assert!(!desk.generated.is_empty() && desk.generated.iter().all(|(node, ..)| *node == NodeId(1)));
}

#[test]
fn a_node_that_is_not_there_is_named_with_those_that_are() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let error = desk.refused(ClientRequest::DrainNode { name: "nodeX".into(), drain: true });
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(error.message.contains("nodeX") && error.message.contains("node1"), "{error}");
}

#[test]
fn a_drained_node_stays_so_over_a_restart_and_can_be_taken_back_while_it_is_away() {
    let mut desk = settled(&[(1, 0), (1, 0)]);
    drain(&mut desk, "node2", true);
    let written = Record::Drained { node: "node2".into(), drained: true };
    assert!(desk.records.contains(&written), "{:?}", desk.records);

    let mut again = Desk::recovered(Recovered { drained: ["node2".to_owned()].into(), ..nothing() });
    let away = |response| match response {
        ClientResponse::Cluster(status) => status.drained_away,
        other => panic!("no status: {other:?}"),
    };
    assert_eq!(away(again.asked(ClientRequest::ClusterStatus)), ["node2"]);
    again.join(1, 1, 0);
    again.join(2, 1, 0);
    again.pass(5_000);
    again.create(None);
    assert_eq!(seats(&again), [1]);
    again.lose(2);
    let undo = ClientRequest::DrainNode { name: "node2".into(), drain: false };
    assert!(away(again.asked(undo.clone())).is_empty());
    again.join(3, 1, 0);
    assert_eq!(again.refused(undo).kind, ErrorKind::NotFound, "it is neither there nor drained");
}

#[test]
fn a_drain_that_is_not_durable_is_none() {
    let mut desk = settled(&[(1, 0), (1, 0)]);
    desk.durable = false;
    let waiter = desk.ask(ClientRequest::DrainNode { name: "node2".into(), drain: true });
    assert_eq!(desk.answer(waiter), None);
    desk.wrote(Err(disk_full()));
    assert!(
        matches!(desk.answer(waiter), Some(ClientResponse::Error(e)) if e.kind == ErrorKind::ResourceExhausted)
    );
    desk.durable = true;
    assert_eq!(seats(&desk), [1, 2]);
    assert_eq!(drain(&mut desk, "node1", false), [None, None]);
}

//! How many ranks a run asks for, and how many it gets.

use crate::{
    coordinator::state::{Effect, Event},
    journal::Record,
    protocol::{ClientRequest, ClientResponse, CoordinatorMessage, NodeHello, NodeId},
    types::{Digest, ErrorKind},
};

use super::{
    desk::{Desk, RUN, create, hello, optim_step},
    runs::session,
};

#[test]
fn ranks_are_spread_over_nodes_first() {
    let desk = Desk::with_run(&[(2, 0), (2, 0)], Some(3));
    let roster = desk.sent.iter().find_map(|(_, message)| match message {
        CoordinatorMessage::FormRanks { roster, .. } => Some(roster.clone()),
        _ => None,
    });
    let seats: Vec<_> = roster.unwrap().iter().map(|seat| (seat.rank.0, seat.node.0, seat.slot)).collect();
    assert_eq!(seats, [(0, 1, 0), (1, 2, 0), (2, 1, 1)]);
}

/// Ranks of the last rank set.
fn ranks(desk: &Desk) -> usize {
    let roster = desk.sent.iter().rev().find_map(|(_, message)| match message {
        CoordinatorMessage::FormRanks { roster, .. } => Some(roster.len()),
        _ => None,
    });
    roster.unwrap_or(0)
}

#[test]
fn a_run_on_all_replicas_takes_those_that_join_later() {
    let mut desk = Desk::with_run(&[(1, 0)], None);
    let journaled = desk.records.iter().find_map(|record| match record {
        Record::Run { create, .. } => Some(create.replicas),
        _ => None,
    });
    assert_eq!((journaled, ranks(&desk)), (Some(None), 1));
    let waiter = desk.run(1, optim_step());
    desk.done(waiter);
    desk.join(2, 2, 0);
    assert_eq!(ranks(&desk), 3);
    let ClientResponse::Run(info) = desk.asked(ClientRequest::RunInfo { run: RUN }) else { panic!("no run") };
    assert_eq!(info.replicas, 3);
}

#[test]
fn replicas_whose_nodes_are_away_are_accepted_and_waited_for() {
    let mut desk = Desk::new();
    desk.join(1, 1, 0);
    desk.join(2, 1, 0);
    desk.lose(2);
    assert!(matches!(desk.create(Some(2)), ClientResponse::Run(info) if info.replicas == 2));
    assert_eq!(ranks(&desk), 0);
    desk.pass(1_000);
    desk.join(3, 1, 0);
    assert_eq!(ranks(&desk), 2);
}

#[test]
fn after_a_restart_nodes_are_given_time_to_come_back_before_replicas_are_refused() {
    let restarted = || {
        let mut recovered = super::desk::nothing();
        recovered.epoch = crate::protocol::Epoch(2);
        let mut desk = Desk::recovered(recovered);
        desk.join(1, 1, 0);
        let session = session(&mut desk);
        let waiter = desk.ask(ClientRequest::CreateRun(create(session, Some(2))));
        desk.pass(5_000);
        assert_eq!(desk.answer(waiter), None);
        (desk, waiter)
    };
    let (mut desk, waiter) = restarted();
    desk.join(2, 1, 0);
    assert!(matches!(desk.answer(waiter), Some(ClientResponse::Run(_))));
    let (mut desk, waiter) = restarted();
    desk.pass(16_000);
    let answer = desk.answer(waiter);
    assert!(
        matches!(answer, Some(ClientResponse::Error(e)) if e.kind == ErrorKind::InvalidInput),
        "{answer:?}"
    );
}

#[test]
fn refuses_more_replicas_than_slots_with_both_numbers() {
    let mut desk = Desk::new();
    desk.join(1, 2, 0);
    let session = session(&mut desk);
    let error = desk.refused(ClientRequest::CreateRun(create(session, Some(3))));
    assert_eq!(error.kind, ErrorKind::InvalidInput);
    assert!(
        error.message.contains("3 asked for") && error.message.contains("has had at most 2 trainer slots"),
        "{error}"
    );
    let error = desk.refused(ClientRequest::CreateRun(create(session, Some(0))));
    assert!(error.message.starts_with("`replicas`: must be at least 1"), "{error}");
}

/// A node with a rank and a replica whose weights are bf16.
fn in_bf16(name: &str) -> NodeHello {
    let mut hello = hello(name, 1, 1);
    hello.numerics.dtype = "bf16".into();
    hello.models[0].digest = Digest::of(b"model as bf16");
    hello
}

#[test]
fn a_node_with_weights_of_another_type_is_sent_away() {
    let mut desk = Desk::with_run(&[(1, 1)], Some(1));
    desk.others.clear();
    desk.feed(Event::NodeJoined { node: NodeId(2), hello: in_bf16("node2") });
    let [Effect::Dismiss { node: NodeId(2), reason }] = &desk.others[..] else { panic!("{:?}", desk.others) };
    assert_eq!(
        reason,
        "node node2 holds base weights as bf16, node node1 as f32; give all nodes of a cluster the same --dtype"
    );
    // Alone it may come; so may one with another model beside it.
    desk.lose(1);
    desk.others.clear();
    desk.feed(Event::NodeJoined { node: NodeId(3), hello: in_bf16("node3") });
    let mut other = hello("node4", 1, 1);
    other.models[0].name = "another".into();
    desk.feed(Event::NodeJoined { node: NodeId(4), hello: other });
    assert!(desk.others.is_empty(), "{:?}", desk.others);
}

/// Fast sums hang on who adds them up: such ranks would leave other weights than those of the tree.
#[test]
fn ranks_that_add_up_otherwise_do_not_share_a_run() {
    let mut desk = Desk::new();
    desk.join(1, 2, 0);
    let mut fast = hello("node2", 1, 0);
    fast.numerics.reduction = "fast".into();
    desk.feed(Event::NodeJoined { node: NodeId(2), hello: fast });
    assert!(matches!(desk.create(None), ClientResponse::Run(info) if info.replicas == 2));
    let waiter = desk.run(1, optim_step());
    desk.done(waiter);
    let rosters = desk.sent.iter().filter_map(|(_, message)| match message {
        CoordinatorMessage::FormRanks { roster, .. } => Some(roster),
        _ => None,
    });
    let nodes: Vec<_> = rosters.flatten().map(|seat| seat.node).collect();
    assert_eq!(nodes, [NodeId(1), NodeId(1)]);
    let ClientResponse::Cluster(status) = desk.asked(ClientRequest::ClusterStatus) else {
        panic!("no status")
    };
    let numerics: Vec<_> = status.nodes.iter().map(|node| node.numerics.as_str()).collect();
    assert_eq!(numerics, ["1 avx2 f32", "1 avx2 f32 fast"]);
}

#[test]
fn a_run_waits_for_weights_of_the_type_that_it_began_with() {
    let mut desk = Desk::with_run(&[(1, 1)], Some(1));
    desk.lose(1);
    desk.run(9, optim_step());
    desk.feed(Event::NodeJoined { node: NodeId(3), hello: in_bf16("node3") });
    desk.pass(60_000);
    let ClientResponse::Run(run) = desk.asked(ClientRequest::RunInfo { run: RUN }) else { panic!() };
    assert_eq!(
        run.phase,
        "waiting for nodes that offer its base model: those that are here have other files or --dtype"
    );
}

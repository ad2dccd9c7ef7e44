//! Nodes that live and can't reach each other.

use crate::{
    protocol::{
        Blame, ClientRequest, CoordinatorMessage, Generation, NodeId, NodeMessage, OpToken, Operation,
        OperationSeq, RankSeat,
    },
    types::{ErrorKind, OperationError},
};

use super::desk::{Desk, RUN, optim_step};

/// The last rank set.
fn roster(desk: &Desk) -> (Generation, Vec<RankSeat>) {
    let formed = desk.sent.iter().rev().find_map(|(_, message)| match message {
        CoordinatorMessage::FormRanks { generation, roster, .. } => Some((*generation, roster.clone())),
        _ => None,
    });
    formed.expect("a rank set")
}

fn nodes(desk: &Desk) -> Vec<u32> {
    roster(desk).1.iter().map(|seat| seat.node.0).collect()
}

/// The last `Execute`.
fn executing(desk: &Desk) -> (OpToken, Operation) {
    let executes = desk.sent.iter().rev().find_map(|(_, message)| match message {
        CoordinatorMessage::Execute { token, operation } => Some((*token, operation.clone())),
        _ => None,
    });
    executes.expect("an operation")
}

/// Has `reporter` miss the first rank on `missed`.
fn miss(desk: &mut Desk, reporter: &RankSeat, missed: &RankSeat) {
    let (token, _) = executing(desk);
    let error = OperationError::new(ErrorKind::DeadlineExceeded, "it did not answer");
    let blame = Blame::Peer(missed.rank);
    let rank = reporter.rank;
    desk.say(reporter.node, NodeMessage::OperationFailed { token, rank, error, blame });
    desk.pass(40_000);
}

/// Every set with `cut` and others fails as its ranks report; how many did.
fn sets_lost_to(desk: &mut Desk, cut: NodeId) -> usize {
    for lost in 0..10 {
        let (_, seats) = roster(desk);
        let (there, others): (Vec<_>, Vec<_>) = seats.into_iter().partition(|seat| seat.node == cut);
        let (Some(there), Some(other)) = (there.first(), others.first()) else { return lost };
        // Whoever comes first: the others miss it, or it misses them.
        match lost % 2 {
            0 => miss(desk, other, there),
            _ => miss(desk, there, other),
        }
    }
    panic!("it is seated again and again");
}

fn answer_all(desk: &mut Desk) {
    let (token, operation) = executing(desk);
    for seat in roster(desk).1 {
        let prepared = desk.prepared(token, seat.rank, &operation);
        desk.say(seat.node, prepared);
    }
}

#[test]
fn a_node_that_others_can_not_reach_is_left_out_and_the_operation_goes_on() {
    for cut in 1..=4 {
        let mut desk = Desk::with_run(&[(1, 0), (1, 0), (1, 0), (1, 0)], None);
        desk.pass(5_000);
        assert_eq!(nodes(&desk), [1, 2, 3, 4]);
        desk.kills = Some(OperationSeq(1));
        desk.run(1, optim_step());
        let lost = sets_lost_to(&mut desk, NodeId(cut));
        assert!(lost <= 3, "{lost} sets for node {cut}; at six the operation is given up");
        assert!(nodes(&desk).len() == 3 && !nodes(&desk).contains(&cut), "{:?}", nodes(&desk));
        answer_all(&mut desk);
        // Whoever waited from the beginning was told long ago that it takes longer.
        let seq = OperationSeq(1);
        let waiter = desk.ask(ClientRequest::WaitOperation { run: RUN, seq, hold_ms: 0 });
        desk.done(waiter);
    }
}

#[test]
fn of_two_nodes_that_miss_each_other_one_goes_on_alone() {
    let mut desk = Desk::with_run(&[(1, 0), (2, 0)], None);
    desk.pass(5_000);
    desk.kills = Some(OperationSeq(1));
    let waiter = desk.run(1, optim_step());
    let (_, seats) = roster(&desk);
    miss(&mut desk, &seats[0], &seats[1]);
    assert_eq!(nodes(&desk), [2, 2], "the one with more to give");
    answer_all(&mut desk);
    desk.done(waiter);
}

#[test]
fn a_pair_is_tried_again_after_a_while_and_then_after_a_longer_one() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    desk.pass(5_000);
    desk.kills = Some(OperationSeq(1));
    let waiter = desk.run(1, optim_step());
    let seats = roster(&desk).1;
    miss(&mut desk, &seats[0], &seats[1]);
    assert_eq!(nodes(&desk).len(), 1);
    answer_all(&mut desk);
    desk.done(waiter);
    desk.pass(100_000);
    assert_eq!(nodes(&desk).len(), 2, "after two minutes");
    desk.kills = Some(OperationSeq(2));
    let waiter = desk.run(2, optim_step());
    let seats = roster(&desk).1;
    miss(&mut desk, &seats[0], &seats[1]);
    answer_all(&mut desk);
    desk.done(waiter);
    desk.pass(120_000);
    assert_eq!(nodes(&desk).len(), 1, "not yet");
    desk.pass(120_000);
    assert_eq!(nodes(&desk).len(), 2, "after four");
}

#[test]
fn a_node_that_comes_back_is_another_one() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], None);
    desk.pass(5_000);
    desk.kills = Some(OperationSeq(1));
    let waiter = desk.run(1, optim_step());
    let seats = roster(&desk).1;
    miss(&mut desk, &seats[0], &seats[1]);
    answer_all(&mut desk);
    desk.done(waiter);
    desk.lose(2);
    desk.join(2, 1, 0);
    desk.pass(5_000);
    assert_eq!(nodes(&desk).len(), 2);
}

#[test]
fn ranks_that_can_not_meet_say_whom_they_missed() {
    let mut desk = Desk::with_run(&[(1, 0), (1, 0)], Some(2));
    desk.answering = false;
    desk.pass(1_000);
    desk.lose(2);
    desk.join(3, 1, 0);
    desk.pass(5_000);
    let (generation, seats) = roster(&desk);
    let error = OperationError::new(ErrorKind::Unavailable, "rank 1 could not be met");
    let blame = Blame::Peer(seats[1].rank);
    desk.say(seats[0].node, NodeMessage::RanksFailed { run: RUN, generation, error, blame });
    desk.pass(5_000);
    assert_eq!(nodes(&desk).len(), 1);
}

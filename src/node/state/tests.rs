use super::*;
use crate::{
    protocol::{Operation, OperationSeq},
    types::{Digest, LoraConfig, LoraTarget},
};

const RUN: RunId = RunId(3);
const NODE: NodeId = NodeId(1);
const SESSION: SessionNumber = SessionNumber(1);

fn spec() -> RunSpec {
    RunSpec {
        run: RUN,
        base_model: "tiny".to_owned(),
        max_seq_len: 64,
        micro_batch_tokens: 16,
        lora: LoraConfig { rank: 4, alpha: 32.0, seed: 0, targets: vec![LoraTarget::QProj] },
    }
}

fn seat(rank: u32, node: NodeId, slot: u32) -> RankSeat {
    RankSeat { rank: RankIndex(rank), node, slot, host: "host".to_owned(), address: "address".to_owned() }
}

fn form(generation: u32, roster: &[RankSeat]) -> CoordinatorMessage {
    CoordinatorMessage::FormRanks {
        spec: spec(),
        epoch: Epoch(1),
        generation: Generation(generation),
        roster: roster.to_vec(),
        restore: None,
    }
}

fn formation(rank: u32, slot: u32, generation: u32, roster: &[RankSeat]) -> Effect {
    let formation = Formation {
        spec: spec(),
        epoch: Epoch(1),
        generation: Generation(generation),
        rank: RankIndex(rank),
        roster: roster.to_vec(),
        restore: None,
    };
    to_rank(slot, RankEvent::Form(formation))
}

fn formed(generation: u32, result: Result<(), OperationError>) -> Event {
    Event::Rank(RankReport::Formed {
        run: RUN,
        generation: Generation(generation),
        result: result.map_err(Into::into),
    })
}

fn token() -> OpToken {
    OpToken { run: RUN, epoch: Epoch(1), generation: Generation(1), seq: OperationSeq(1), incarnation: 1 }
}

fn policy(step: u64) -> PolicyId {
    PolicyId { run: RUN, incarnation: 1, step, digest: Digest::of(&step.to_le_bytes()) }
}

fn adapter() -> BlobRef {
    BlobRef { digest: Digest::of(b"adapter"), size: 7 }
}

fn from(session: SessionNumber, message: CoordinatorMessage) -> Event {
    Event::Coordinator { session, message }
}

fn say(state: &mut NodeState, message: CoordinatorMessage) -> Vec<Effect> {
    state.handle(from(SESSION, message))
}

fn error(text: &str) -> OperationError {
    OperationError::new(ErrorKind::Unavailable, text)
}

fn connected(trainers: u32, samplers: u32) -> NodeState {
    let mut state = NodeState::new(trainers, samplers);
    state.handle(Event::Connected { session: SESSION, node: NODE, epoch: Epoch(1) });
    state
}

/// Two slots, both ranks of the run formed.
fn formed_pair() -> NodeState {
    let mut state = connected(2, 0);
    say(&mut state, form(1, &[seat(0, NODE, 0), seat(1, NODE, 1)]));
    state.handle(formed(1, Ok(())));
    state.handle(formed(1, Ok(())));
    state
}

/// Two replicas, both with the policy staged.
fn staged_pair() -> NodeState {
    let mut state = connected(0, 2);
    say(&mut state, stage());
    state.handle(Event::Fetched { policy: policy(1), adapter: Ok(Bytes::from_static(b"adapter")) });
    state.handle(Event::Staged { replica: 0, policy: policy(1) });
    state.handle(Event::Staged { replica: 1, policy: policy(1) });
    state
}

fn stage() -> CoordinatorMessage {
    CoordinatorMessage::Stage { policy: policy(1), base_model: "tiny".to_owned(), adapter: adapter() }
}

#[test]
fn a_node_answers_once_when_all_of_its_ranks_stand() {
    let mut state = connected(3, 0);
    let roster = [seat(0, NodeId(9), 0), seat(1, NODE, 2), seat(2, NODE, 0)];
    assert_eq!(
        say(&mut state, form(1, &roster)),
        vec![formation(1, 2, 1, &roster), formation(2, 0, 1, &roster)]
    );
    assert_eq!(state.handle(formed(1, Ok(()))), vec![]);
    assert_eq!(
        state.handle(formed(1, Ok(()))),
        vec![Effect::Tell(NodeMessage::RanksReady { run: RUN, generation: Generation(1) })]
    );
}

#[test]
fn the_first_rank_that_fails_answers_for_all() {
    let mut state = connected(2, 0);
    say(&mut state, form(1, &[seat(0, NODE, 0), seat(1, NODE, 1)]));
    let failed = NodeMessage::RanksFailed {
        run: RUN,
        generation: Generation(1),
        error: error("no model"),
        blame: Blame::Environment,
    };
    assert_eq!(state.handle(formed(1, Err(error("no model")))), vec![Effect::Tell(failed)]);
    assert_eq!(state.handle(formed(1, Ok(()))), vec![]);
}

#[test]
fn a_report_of_an_earlier_generation_counts_for_nothing() {
    let mut state = connected(1, 0);
    say(&mut state, form(1, &[seat(0, NODE, 0)]));
    say(&mut state, form(2, &[seat(0, NODE, 0)]));
    assert_eq!(state.handle(formed(1, Ok(()))), vec![]);
    assert_eq!(
        state.handle(formed(2, Ok(()))),
        vec![Effect::Tell(NodeMessage::RanksReady { run: RUN, generation: Generation(2) })]
    );
}

#[test]
fn a_roster_that_does_not_fit_this_node_is_refused() {
    for roster in
        [vec![seat(0, NodeId(9), 0)], vec![seat(0, NODE, 2)], vec![seat(0, NODE, 1), seat(1, NODE, 1)]]
    {
        assert!(matches!(
            say(&mut connected(2, 0), form(1, &roster))[..],
            [Effect::Tell(NodeMessage::RanksFailed { .. })]
        ));
    }
}

#[test]
fn a_slot_that_a_new_roster_leaves_out_gives_its_rank_up() {
    let mut state = formed_pair();
    let roster = [seat(0, NODE, 1)];
    assert_eq!(
        say(&mut state, form(2, &roster)),
        vec![
            to_rank(0, RankEvent::Release { run: RUN, generation: Generation(1) }),
            formation(0, 1, 2, &roster),
        ]
    );
}

#[test]
fn operations_go_to_every_slot_of_the_run() {
    let mut state = formed_pair();
    let operation = Operation::SaveState { name: "a".to_owned(), ttl_seconds: None };
    let event = RankEvent::Execute { token: token(), operation: operation.clone() };
    assert_eq!(
        say(&mut state, CoordinatorMessage::Execute { token: token(), operation }),
        vec![to_rank(0, event.clone()), to_rank(1, event)]
    );
    assert_eq!(
        say(&mut state, CoordinatorMessage::Commit { token: token() }),
        vec![
            to_rank(0, RankEvent::Commit { token: token() }),
            to_rank(1, RankEvent::Commit { token: token() }),
        ]
    );
}

#[test]
fn an_operation_of_a_run_that_is_not_here_is_answered() {
    let operation = Operation::SaveState { name: "a".to_owned(), ttl_seconds: None };
    assert_eq!(
        say(&mut connected(1, 0), CoordinatorMessage::Execute { token: token(), operation }),
        vec![not_here(token())]
    );
}

#[test]
fn a_release_reaches_the_slots_once() {
    let mut state = formed_pair();
    let release = CoordinatorMessage::ReleaseRanks { run: RUN, generation: Generation(1) };
    let event = RankEvent::Release { run: RUN, generation: Generation(1) };
    assert_eq!(say(&mut state, release.clone()), vec![to_rank(0, event.clone()), to_rank(1, event)]);
    assert_eq!(say(&mut state, release), vec![]);
}

#[test]
fn a_policy_is_fetched_once_and_reported_when_every_replica_has_it() {
    let mut state = connected(0, 2);
    assert_eq!(say(&mut state, stage()), vec![Effect::Fetch { policy: policy(1), adapter: adapter() }]);
    let bytes = Bytes::from_static(b"adapter");
    let to_replica = |replica| Effect::Stage {
        replica,
        policy: policy(1),
        base_model: "tiny".to_owned(),
        adapter: bytes.clone(),
    };
    assert_eq!(
        state.handle(Event::Fetched { policy: policy(1), adapter: Ok(bytes.clone()) }),
        vec![to_replica(0), to_replica(1)]
    );
    assert_eq!(state.handle(Event::Staged { replica: 1, policy: policy(1) }), vec![]);
    assert_eq!(state.handle(Event::Staged { replica: 1, policy: policy(1) }), vec![]);
    assert_eq!(
        state.handle(Event::Staged { replica: 0, policy: policy(1) }),
        vec![Effect::Tell(NodeMessage::Staged { policy: policy(1) })]
    );
}

#[test]
fn a_policy_that_one_replica_refuses_leaves_all_of_them() {
    let mut state = connected(0, 2);
    say(&mut state, stage());
    state.handle(Event::Fetched { policy: policy(1), adapter: Ok(Bytes::from_static(b"adapter")) });
    state.handle(Event::Staged { replica: 0, policy: policy(1) });
    let failed = Event::StageFailed { replica: 1, policy: policy(1), error: error("digest differs") };
    assert_eq!(
        state.handle(failed.clone()),
        vec![
            Effect::Retire { replica: 0, policy: policy(1) },
            Effect::Retire { replica: 1, policy: policy(1) },
            Effect::Tell(NodeMessage::StageFailed { policy: policy(1), error: error("digest differs") }),
        ]
    );
    assert_eq!(state.handle(failed), vec![]);
}

#[test]
fn an_adapter_that_does_not_come_is_reported() {
    let mut state = connected(0, 1);
    say(&mut state, stage());
    assert_eq!(
        state.handle(Event::Fetched { policy: policy(1), adapter: Err(error("gone")) }),
        vec![
            Effect::Retire { replica: 0, policy: policy(1) },
            Effect::Tell(NodeMessage::StageFailed { policy: policy(1), error: error("gone") }),
        ]
    );
}

#[test]
fn activation_is_reported_when_every_replica_serves() {
    let mut state = staged_pair();
    assert_eq!(
        say(&mut state, CoordinatorMessage::Activate { policy: policy(1) }),
        vec![
            Effect::Activate { replica: 0, policy: policy(1) },
            Effect::Activate { replica: 1, policy: policy(1) },
        ]
    );
    assert_eq!(state.handle(Event::Activated { replica: 0, policy: policy(1) }), vec![]);
    assert_eq!(
        state.handle(Event::Activated { replica: 1, policy: policy(1) }),
        vec![Effect::Tell(NodeMessage::Activated { policy: policy(1) })]
    );
}

#[test]
fn nothing_is_activated_before_it_is_staged() {
    let mut state = connected(0, 2);
    say(&mut state, stage());
    for activate in [1, 2].map(|step| CoordinatorMessage::Activate { policy: policy(step) }) {
        assert!(matches!(say(&mut state, activate)[..], [Effect::Tell(NodeMessage::StageFailed { .. })]));
    }
}

#[test]
fn a_retired_policy_is_not_reported_any_more() {
    let mut state = connected(0, 1);
    say(&mut state, stage());
    assert_eq!(
        say(&mut state, CoordinatorMessage::Retire { policy: policy(1) }),
        vec![Effect::Retire { replica: 0, policy: policy(1) }]
    );
    let late = Event::Fetched { policy: policy(1), adapter: Ok(Bytes::from_static(b"adapter")) };
    assert_eq!(state.handle(late), vec![]);
}

#[test]
fn requests_go_to_the_least_busy_replica() {
    let mut state = connected(0, 2);
    let request = |ticket| Event::Request { ticket: Ticket(ticket) };
    let sample = |ticket, replica| vec![Effect::Sample { ticket: Ticket(ticket), replica }];
    assert_eq!(state.handle(request(1)), sample(1, 0));
    assert_eq!(state.handle(request(2)), sample(2, 1));
    assert_eq!(state.handle(request(3)), sample(3, 0));
    state.handle(Event::RequestDone { ticket: Ticket(2) });
    assert_eq!(state.handle(request(4)), sample(4, 1));
    assert_eq!(state.requests(), 3);
}

#[test]
fn requests_are_bounded() {
    let mut state = connected(0, 1);
    for ticket in 0..MAX_REQUESTS as u64 {
        state.handle(Event::Request { ticket: Ticket(ticket) });
    }
    assert!(matches!(
        &state.handle(Event::Request { ticket: Ticket(9999) })[..],
        [Effect::Refuse { ticket: Ticket(9999), error }] if error.kind == ErrorKind::ResourceExhausted
    ));
}

#[test]
fn a_node_without_replicas_refuses_requests_and_policies() {
    let mut state = connected(1, 0);
    assert!(matches!(
        state.handle(Event::Request { ticket: Ticket(1) })[..],
        [Effect::Refuse { ticket: Ticket(1), .. }]
    ));
    assert!(matches!(say(&mut state, stage())[..], [Effect::Tell(NodeMessage::StageFailed { .. })]));
}

#[test]
fn losing_the_coordinator_drops_runs_and_policies() {
    let mut state = connected(2, 1);
    say(&mut state, form(1, &[seat(0, NODE, 0)]));
    say(&mut state, stage());
    assert_eq!(
        state.handle(Event::Disconnected { session: SESSION }),
        vec![
            to_rank(0, RankEvent::Disconnected),
            to_rank(1, RankEvent::Disconnected),
            Effect::Retire { replica: 0, policy: policy(1) },
        ]
    );
    assert_eq!(say(&mut state, CoordinatorMessage::Ping { nonce: 1 }), vec![]);
}

#[test]
fn messages_of_an_earlier_connection_are_dropped() {
    let mut state = connected(1, 0);
    state.handle(Event::Disconnected { session: SESSION });
    let second = SessionNumber(2);
    state.handle(Event::Connected { session: second, node: NodeId(5), epoch: Epoch(1) });
    assert_eq!(say(&mut state, CoordinatorMessage::Shutdown), vec![]);
    assert_eq!(state.handle(Event::Disconnected { session: SESSION }), vec![]);
    assert_eq!(
        state.handle(from(second, CoordinatorMessage::Ping { nonce: 4 })),
        vec![Effect::Tell(NodeMessage::Pong { nonce: 4 })]
    );
}

#[test]
fn an_older_coordinator_is_refused() {
    let mut state = NodeState::new(1, 0);
    state.handle(Event::Connected { session: SESSION, node: NODE, epoch: Epoch(2) });
    state.handle(Event::Disconnected { session: SESSION });
    let second = SessionNumber(2);
    assert_eq!(
        state.handle(Event::Connected { session: second, node: NODE, epoch: Epoch(1) }),
        vec![to_rank(0, RankEvent::Disconnected), Effect::Close { reason: "a newer coordinator was seen" },]
    );
    assert_eq!(state.handle(from(second, CoordinatorMessage::Shutdown)), vec![]);
}

#[test]
fn shutdown_stops_the_process() {
    assert_eq!(say(&mut connected(1, 1), CoordinatorMessage::Shutdown), vec![Effect::Stop]);
}

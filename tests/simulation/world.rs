//! Time, network, disk and accidents around one real coordinator state.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use lockstep::{
    coordinator::{
        Limits,
        state::{Effect, Event, State, TICK_MS, WaiterId},
    },
    journal::JournalError,
    protocol::{
        Call, ClientRequest, ClientResponse, CoordinatorMessage, Generate, NodeId, NodeMessage, OperationKey,
        encode,
    },
    types::{Digest, PolicyId},
};

use super::{
    blobs::Blobs, client::ModelClient, dice::Dice, journal::ModelJournal, node::ModelNode, tally::Tally,
};

/// Between two sweeps.
const SWEEP_MS: u64 = 7_000;

/// What happens at a point in time. `life`: of the coordinator, `link`: of a node's connection;
/// what is of an earlier one is lost.
enum Action {
    Tick { life: u64 },
    Happen { life: u64, event: Event },
    WriteJournal { life: u64 },
    HearNode { link: u64, node: usize, message: CoordinatorMessage },
    Say { life: u64, link: u64, node: usize, message: NodeMessage },
    Generate { life: u64, link: u64, node: usize, attempt: u32, generate: Generate },
    Join { link: u64, node: usize },
    Answer { life: u64, waiter: WaiterId, response: ClientResponse },
    ClientStep { client: usize },
    Accident,
    Sweep,
}

/// One node's connection: messages of each direction arrive in order.
struct Wire {
    link: u64,
    down_ms: u64,
    up_ms: u64,
}

pub struct World {
    pub now_ms: u64,
    pub dice: Dice,
    pub journal: ModelJournal,
    pub blobs: Blobs,
    pub nodes: Vec<ModelNode>,
    pub clients: Vec<ModelClient>,
    coordinator: State,
    life: u64,
    life_began_ms: u64,
    wires: Vec<Wire>,
    queue: BTreeMap<(u64, u64), Action>,
    queued: u64,
    next_node: u32,
    next_waiter: u64,
    asked: HashMap<WaiterId, usize>,
    journal_ms: u64,
    /// Policies that a node has confirmed in this life of the coordinator.
    confirmed: BTreeSet<PolicyId>,
    pub stopped: bool,
    pub tally: Tally,
}

fn limits() -> Limits {
    use std::time::Duration;
    Limits {
        operation_deadline: Duration::from_secs(20),
        form_deadline: Duration::from_secs(20),
        stage_deadline: Duration::from_secs(5),
        publish_deadline: Duration::from_secs(3),
        generate_deadline: Duration::from_secs(60),
        snapshot_every_steps: 3,
        results_kept: 24,
        publishes_kept: 2,
        ..Limits::default()
    }
}

impl World {
    /// Nodes: (trainers, samplers) of each.
    pub fn new(seed: u64, nodes: &[(u32, u32)], clients: usize, operations: usize) -> Self {
        let mut journal = ModelJournal::default();
        let now_ms = 1_000_000;
        let coordinator = State::recover(limits(), journal.recover(), now_ms);
        let mut dice = Dice::new(seed);
        let clients = (0..clients).map(|index| ModelClient::new(index, operations, &mut dice)).collect();
        let mut world = Self {
            now_ms,
            dice,
            journal,
            blobs: Blobs::default(),
            nodes: Vec::new(),
            clients,
            coordinator,
            life: 0,
            life_began_ms: now_ms,
            wires: Vec::new(),
            queue: BTreeMap::new(),
            queued: 0,
            next_node: 0,
            next_waiter: 0,
            asked: HashMap::new(),
            journal_ms: 0,
            confirmed: BTreeSet::new(),
            stopped: false,
            tally: Tally::default(),
        };
        for (index, (trainers, samplers)) in nodes.iter().enumerate() {
            world.nodes.push(ModelNode::new(format!("node{index}"), *trainers, *samplers));
            world.wires.push(Wire { link: 0, down_ms: 0, up_ms: 0 });
            world.join_later(index);
        }
        for client in 0..world.clients.len() {
            world.at(1, Action::ClientStep { client });
        }
        world.at(TICK_MS, Action::Tick { life: 0 });
        world.at(3_000, Action::Accident);
        world.at(SWEEP_MS, Action::Sweep);
        world
    }

    /// Lets time pass until `done` holds; panics when `limit_ms` is over first.
    pub fn run_until(&mut self, limit_ms: u64, what: &str, done: impl Fn(&Self) -> bool) {
        let end_ms = self.now_ms + limit_ms;
        while !done(self) {
            let ((at_ms, _), action) = self.queue.pop_first().expect("ticks never end");
            self.now_ms = self.now_ms.max(at_ms);
            self.blobs.now_ms = self.now_ms;
            assert!(self.now_ms < end_ms, "after {limit_ms} ms still not: {what}");
            self.act(action);
        }
    }

    /// Hands a request to the coordinator.
    pub fn ask(&mut self, client: usize, request: ClientRequest) -> WaiterId {
        let waiter = WaiterId(self.next_waiter);
        self.next_waiter += 1;
        self.asked.insert(waiter, client);
        let entropy = self.dice.below(u64::MAX);
        // As often as it has to ask for its run, it gets one.
        let creates = matches!(request, ClientRequest::CreateRun(_));
        let key = creates.then_some(OperationKey([client as u8; 16]));
        let call = Call { key, ..Call::default() };
        let event = Event::Request { waiter, call, request, entropy };
        self.happen_later(event, 1, 20);
        waiter
    }

    pub fn drain(&mut self) {
        self.happen_later(Event::Drain, 1, 2);
    }

    fn at(&mut self, after_ms: u64, action: Action) {
        self.queued += 1;
        self.queue.insert((self.now_ms + after_ms, self.queued), action);
    }

    fn happen_later(&mut self, event: Event, low_ms: u64, high_ms: u64) {
        let after_ms = self.dice.between(low_ms, high_ms);
        self.at(after_ms, Action::Happen { life: self.life, event });
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Tick { life } if life == self.life => {
                self.at(TICK_MS, Action::Tick { life });
                self.feed(Event::Tick);
            }
            Action::Happen { life, event } if life == self.life => self.feed(event),
            Action::WriteJournal { life } if life == self.life => self.write_journal(),
            Action::HearNode { link, node, message } => self.node_hears(link, node, message),
            Action::Say { life, link, node, message } if life == self.life => {
                if self.wires[node].link == link
                    && let Some(id) = self.nodes[node].id
                {
                    if let NodeMessage::Activated { policy } = &message {
                        self.confirmed.insert(*policy);
                    }
                    self.feed(Event::NodeMessage { node: id, message });
                }
            }
            Action::Generate { life, link, node, attempt, generate } if life == self.life => {
                let request = generate.request;
                let there = self.wires[node].link == link && self.nodes[node].id.is_some();
                let reply = match there && !self.dice.fails(5) {
                    true if self.nodes[node].hung => return,
                    true => Ok(self.nodes[node].generate(&generate)),
                    false => Err("the stream broke".to_owned()),
                };
                self.happen_later(Event::Generated { request, attempt, reply }, 1, 200);
            }
            Action::Join { link, node } if self.wires[node].link == link => self.join(node),
            Action::Answer { life, waiter, response } if life == self.life => {
                if let Some(client) = self.asked.remove(&waiter) {
                    ModelClient::hear(self, client, waiter, response);
                }
            }
            Action::ClientStep { client } => {
                let after_ms = self.dice.between(20, 400);
                self.at(after_ms, Action::ClientStep { client });
                ModelClient::step(self, client);
            }
            Action::Accident => {
                let after_ms = self.dice.between(500, 6_000);
                self.at(after_ms, Action::Accident);
                self.accident();
            }
            Action::Sweep => {
                self.at(SWEEP_MS, Action::Sweep);
                self.sweep();
            }
            // Of a life or a connection that is over.
            _ => {}
        }
    }

    fn feed(&mut self, event: Event) {
        if self.stopped {
            return;
        }
        let effects = self.coordinator.handle(event, self.now_ms);
        self.coordinator.check_invariants();
        for effect in effects {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: Effect) {
        assert!(!self.stopped, "an effect after Stop: {effect:?}");
        match effect {
            Effect::Append { append, records } => {
                self.journal.queue.push_back((append, records));
                self.journal_ms = self.journal_ms.max(self.now_ms) + self.dice.between(1, 15);
                let after_ms = self.journal_ms - self.now_ms;
                self.at(after_ms, Action::WriteJournal { life: self.life });
            }
            Effect::Send { node, message } => {
                let Some(index) = self.index_of(node) else { return };
                let delay_ms = self.dice.between(1, 30);
                let wire = &mut self.wires[index];
                wire.down_ms = wire.down_ms.max(self.now_ms + delay_ms);
                let (link, after_ms) = (wire.link, wire.down_ms - self.now_ms);
                self.at(after_ms, Action::HearNode { link, node: index, message });
            }
            Effect::Dismiss { node, reason } => {
                let Some(index) = self.index_of(node) else { return };
                if reason.starts_with("silent") {
                    assert!(self.nodes[index].hung, "a node that answers was given up: {reason}");
                }
                self.nodes[index].restart();
                self.join_later(index);
            }
            Effect::Respond { waiter, response } => {
                let client = *self.asked.get(&waiter).expect("an answer that nobody has had yet");
                ModelClient::check_said(self, client, waiter, &response);
                let after_ms = self.dice.between(1, 20);
                self.at(after_ms, Action::Answer { life: self.life, waiter, response });
            }
            Effect::Generate { node, attempt, generate } => {
                self.tally.tried_again += u64::from(attempt > 0);
                let Some(index) = self.index_of(node) else { return };
                let (life, link) = (self.life, self.wires[index].link);
                let after_ms = self.dice.between(1, 50);
                self.at(after_ms, Action::Generate { life, link, node: index, attempt, generate });
            }
            Effect::CancelGenerate { .. } | Effect::Ended(_) => {}
            Effect::Recall { .. } => unreachable!("nobody here looks into the past"),
            Effect::Revoked { .. } | Effect::FinishRotation => {
                unreachable!("nobody here has a certificate")
            }
            Effect::Stop => {
                assert!(self.journal.queue.is_empty() || self.dice.accidents, "stopped with facts to write");
                self.stopped = true;
            }
        }
    }

    fn write_journal(&mut self) {
        let Some((append, records)) = self.journal.queue.pop_front() else { return };
        let result = if self.dice.fails(1) {
            self.tally.appends_refused += 1;
            Err(JournalError::DiskFull { path: "journal".into() })
        } else {
            self.journal.write(records, &mut self.blobs);
            Ok(())
        };
        // In order: the end of an append is heard when the next one is not even written.
        self.at(0, Action::Happen { life: self.life, event: Event::Appended { append, result } });
    }

    fn node_hears(&mut self, link: u64, index: usize, message: CoordinatorMessage) {
        if self.wires[index].link != link || self.nodes[index].hung {
            return;
        }
        match &message {
            CoordinatorMessage::Execute { token, .. } => {
                let again = self.journal.outcome(token.run, token.seq).is_some();
                self.tally.replayed += u64::from(again);
            }
            CoordinatorMessage::FormRanks { restore: Some(_), .. } => self.tally.restored += 1,
            _ => {}
        }
        let shutdown = matches!(message, CoordinatorMessage::Shutdown);
        let said = self.nodes[index].hear(message, &mut self.blobs, &self.journal, &mut self.dice);
        for message in said {
            let delay_ms =
                if matches!(message, NodeMessage::Pong { .. }) { 1 } else { self.dice.between(1, 120) };
            let wire = &mut self.wires[index];
            wire.up_ms = wire.up_ms.max(self.now_ms + delay_ms);
            let after_ms = wire.up_ms - self.now_ms;
            self.at(after_ms, Action::Say { life: self.life, link, node: index, message });
        }
        if shutdown {
            self.wires[index].link += 1;
        }
    }

    /// Takes away what neither a row nor the coordinator needs: whoever still looks finds nothing.
    fn sweep(&mut self) {
        let unnamed = self.blobs.old().into_iter().filter(|digest| !self.journal.names(*digest));
        for digest in self.coordinator.unneeded(unnamed.collect()) {
            self.blobs.remove(&digest);
            self.tally.swept += 1;
        }
    }

    fn index_of(&self, node: NodeId) -> Option<usize> {
        self.nodes.iter().position(|n| n.id == Some(node))
    }

    fn join_later(&mut self, node: usize) {
        self.wires[node].link += 1;
        self.nodes[node].id = None;
        let (link, after_ms) = (self.wires[node].link, self.dice.between(100, 4_000));
        self.at(after_ms, Action::Join { link, node });
    }

    fn join(&mut self, node: usize) {
        let id = NodeId(self.next_node);
        self.next_node += 1;
        self.nodes[node].id = Some(id);
        let wire = &mut self.wires[node];
        (wire.down_ms, wire.up_ms) = (self.now_ms, self.now_ms);
        let hello = self.nodes[node].hello();
        self.feed(Event::NodeJoined { node: id, hello });
    }

    fn accident(&mut self) {
        if !self.dice.accidents {
            return;
        }
        match self.dice.below(10) {
            0..=2 => {
                let node = self.dice.below(self.nodes.len() as u64) as usize;
                self.lose_node(node);
            }
            3 => {
                let node = self.dice.below(self.nodes.len() as u64) as usize;
                self.nodes[node].hung = self.nodes[node].id.is_some();
            }
            4..=5 => self.crash(),
            6 => {
                // Nobody ran, so nobody answered.
                let stalled_ms = self.dice.between(1_000, 30_000);
                self.now_ms += stalled_ms;
                self.blobs.stall(stalled_ms);
                self.tally.stalls += 1;
            }
            7 => {
                let node = self.dice.below(self.nodes.len() as u64) as usize;
                self.nodes[node].cut_off ^= true;
                self.tally.cut_off += 1;
            }
            _ => {}
        }
    }

    /// The process dies: its connection breaks, at once or when somebody notices.
    fn lose_node(&mut self, node: usize) {
        let Some(id) = self.nodes[node].id else { return };
        self.tally.nodes_lost += 1;
        self.nodes[node].restart();
        self.join_later(node);
        self.happen_later(Event::NodeLost { node: id, reason: "connection reset".into() }, 1, 500);
    }

    /// The coordinator dies, with what it had not written, and starts again.
    pub fn crash(&mut self) {
        let written = self.dice.below(self.journal.queue.len() as u64 + 1);
        for _ in 0..written {
            // Durable, and nobody was told.
            let (_, records) = self.journal.queue.pop_front().expect("counted");
            self.journal.write(records, &mut self.blobs);
        }
        self.tally.crashes += 1;
        self.life += 1;
        self.life_began_ms = self.now_ms;
        self.stopped = false;
        self.asked.clear();
        self.confirmed.clear();
        self.next_node = 0;
        self.coordinator = State::recover(limits(), self.journal.recover(), self.now_ms);
        self.coordinator.check_invariants();
        for node in 0..self.nodes.len() {
            self.nodes[node].restart();
            self.join_later(node);
        }
        for client in &mut self.clients {
            client.disconnected();
        }
        self.at(TICK_MS, Action::Tick { life: self.life });
    }

    /// Ends all accidents and mends what is broken.
    pub fn calm(&mut self) {
        self.dice.accidents = false;
        for node in 0..self.nodes.len() {
            self.nodes[node].cut_off = false;
            if self.nodes[node].hung {
                self.nodes[node].hung = false;
                self.lose_node(node);
            }
        }
    }

    /// Since this life of the coordinator began.
    pub fn has_publish_deadline_passed(&self) -> bool {
        self.now_ms >= self.life_began_ms + limits().publish_deadline.as_millis() as u64
    }

    pub fn is_confirmed(&self, policy: &PolicyId) -> bool {
        self.confirmed.contains(policy)
    }
}

/// A key that stands for a client's operation.
pub fn key_of(client: usize, operation: usize) -> [u8; 16] {
    let digest = Digest::of(&encode(&(client as u64, operation as u64)));
    digest.0[..16].try_into().expect("16 of 32 bytes")
}

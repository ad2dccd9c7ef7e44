//! A state machine on a desk: appends succeed at once and nodes answer at once, unless a test
//! takes that into its own hands.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::{
    coordinator::{
        Limits,
        state::{Effect, Event, State, TICK_MS, WaiterId},
    },
    journal::{JournalError, Record, Recovered},
    model::Footprint,
    protocol::{
        ADAPTER_FILE, BlobRef, Call, ClientRequest, ClientResponse, CoordinatorMessage, CreateRun, Epoch,
        Generate, ModelOffer, NodeHello, NodeId, NodeMessage, Numerics, OpToken, Operation, OperationKey,
        OperationResult, OperationSeq, OperationStatus, PROTOCOL_VERSION, Payload, RankIndex, RankSeat,
        STATE_FILE, Saved, SavedFile, SubmitOperation,
    },
    types::{
        AdamParams, Digest, InitTrainerServerResponse, LoadWeightsResponse, LoraConfig, LossFn, LossSpec,
        OperationError, OptimStepResponse, RunId, SaveWeightsForSamplerResponse, SaveWeightsResponse,
        SessionId,
    },
};

pub const MODEL: &str = "org/model";
pub const RUN: RunId = RunId(1);

pub struct Desk {
    pub state: State,
    pub now_ms: u64,
    /// Appends become durable at once.
    pub durable: bool,
    /// Nodes answer at once, as they should.
    pub answering: bool,
    /// The operation that no node answers.
    pub kills: Option<OperationSeq>,
    /// Everything durable, in order.
    pub records: Vec<Record>,
    /// What was sent to nodes since the test last looked.
    pub sent: Vec<(NodeId, CoordinatorMessage)>,
    pub generated: Vec<(NodeId, u32, Generate)>,
    pub others: Vec<Effect>,
    answers: HashMap<WaiterId, ClientResponse>,
    waiters: u64,
    /// The one that is being handled, and those behind it.
    events: VecDeque<Event>,
    /// Seats of each run's last rank set.
    rosters: BTreeMap<RunId, Vec<RankSeat>>,
    /// Steps of each run after each operation, so that a replay gives the same.
    steps: BTreeMap<(RunId, OperationSeq), u64>,
}

impl Desk {
    /// A coordinator that has just started for the first time.
    pub fn new() -> Self {
        Self::recovered(nothing())
    }

    pub fn recovered(recovered: Recovered) -> Self {
        Self::limited(Limits::default(), recovered)
    }

    pub fn limited(limits: Limits, recovered: Recovered) -> Self {
        let now_ms = 1_000_000;
        Self {
            state: State::recover(limits, recovered, now_ms),
            now_ms,
            durable: true,
            answering: true,
            kills: None,
            records: Vec::new(),
            sent: Vec::new(),
            generated: Vec::new(),
            others: Vec::new(),
            answers: HashMap::new(),
            waiters: 0,
            events: VecDeque::new(),
            rosters: BTreeMap::new(),
            steps: BTreeMap::new(),
        }
    }

    /// With nodes of (trainers, samplers), numbered from 1, a session and a run.
    pub fn with_run(nodes: &[(u32, u32)], replicas: Option<u32>) -> Self {
        let mut desk = Self::new();
        for (i, (trainers, samplers)) in nodes.iter().enumerate() {
            desk.join(i as u32 + 1, *trainers, *samplers);
        }
        let created = desk.create(replicas);
        assert!(matches!(created, ClientResponse::Run(info) if info.run == RUN));
        desk
    }

    /// Handles an event and all that it leads to, in order.
    pub fn feed(&mut self, event: Event) {
        self.events.push_back(event);
        if self.events.len() > 1 {
            return; // Fed by an effect: the call that is handling events comes to it.
        }
        while let Some(event) = self.events.front().cloned() {
            for effect in self.state.handle(event, self.now_ms) {
                self.take(effect);
            }
            self.events.pop_front();
        }
    }

    fn take(&mut self, effect: Effect) {
        match effect {
            Effect::Append { append, records } if self.durable => {
                self.records.extend(records);
                self.feed(Event::Appended { append, result: Ok(()) });
            }
            Effect::Send { node, message } => {
                self.sent.push((node, message.clone()));
                let deadly = matches!(&message, CoordinatorMessage::Execute { token, .. }
                    if Some(token.seq) == self.kills);
                if self.answering && !deadly {
                    for answer in self.ideal_answers(node, message) {
                        self.say(node, answer);
                    }
                }
            }
            Effect::Respond { waiter, response } => {
                assert!(self.answers.insert(waiter, response).is_none(), "answered twice");
            }
            Effect::Ended(_) => {}
            Effect::Generate { node, attempt, generate } => self.generated.push((node, attempt, generate)),
            other => self.others.push(other),
        }
    }

    /// Ends all appends that a test has held.
    pub fn wrote(&mut self, result: Result<(), JournalError>) {
        for effect in std::mem::take(&mut self.others) {
            match effect {
                Effect::Append { append, .. } => {
                    self.feed(Event::Appended { append, result: result.clone() })
                }
                other => self.others.push(other),
            }
        }
    }

    pub fn say(&mut self, node: NodeId, message: NodeMessage) {
        self.feed(Event::NodeMessage { node, message });
    }

    pub fn join(&mut self, node: u32, trainers: u32, samplers: u32) {
        let hello = hello(&format!("node{node}"), trainers, samplers);
        self.feed(Event::NodeJoined { node: NodeId(node), hello });
    }

    pub fn lose(&mut self, node: u32) {
        self.feed(Event::NodeLost { node: NodeId(node), reason: "connection reset".into() });
    }

    /// Lets time pass, tick by tick, nodes answering their pings.
    pub fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(TICK_MS) {
            self.now_ms += TICK_MS;
            self.feed(Event::Tick);
        }
    }

    pub fn ask(&mut self, request: ClientRequest) -> WaiterId {
        self.call(Call::default(), request)
    }

    pub fn call(&mut self, call: Call, request: ClientRequest) -> WaiterId {
        self.waiters += 1;
        let waiter = WaiterId(self.waiters);
        self.feed(Event::Request { waiter, call, request, entropy: 1_000 + self.waiters });
        waiter
    }

    pub fn answer(&self, waiter: WaiterId) -> Option<&ClientResponse> {
        self.answers.get(&waiter)
    }

    /// The answer to a request that is answered at once.
    pub fn asked(&mut self, request: ClientRequest) -> ClientResponse {
        let waiter = self.ask(request);
        self.answer(waiter).cloned().expect("an answer at once")
    }

    pub fn refused(&mut self, request: ClientRequest) -> OperationError {
        match self.asked(request) {
            ClientResponse::Error(error) => error,
            other => panic!("not refused: {other:?}"),
        }
    }

    pub fn create(&mut self, replicas: Option<u32>) -> ClientResponse {
        let ClientResponse::Session(session) = self.asked(ClientRequest::CreateSession) else {
            panic!("no session")
        };
        self.asked(ClientRequest::CreateRun(create(session, replicas)))
    }

    pub fn submit(&mut self, key: u8, operation: Operation) -> ClientResponse {
        let submit = SubmitOperation { run: RUN, key: OperationKey([key; 16]), operation };
        self.asked(ClientRequest::Submit(submit))
    }

    /// Submits, and waits for what comes of it.
    pub fn run(&mut self, key: u8, operation: Operation) -> WaiterId {
        match self.submit(key, operation) {
            ClientResponse::Accepted { seq } => {
                self.ask(ClientRequest::WaitOperation { run: RUN, seq, hold_ms: 60_000 })
            }
            other => panic!("not accepted: {other:?}"),
        }
    }

    /// The outcome, if it is there.
    pub fn status(&self, waiter: WaiterId) -> Option<&OperationStatus> {
        match self.answer(waiter)? {
            ClientResponse::Operation(status) => Some(status),
            other => panic!("no status: {other:?}"),
        }
    }

    pub fn done(&self, waiter: WaiterId) -> &OperationResult {
        match self.status(waiter) {
            Some(OperationStatus::Done(result)) => result,
            other => panic!("not done: {other:?}"),
        }
    }

    pub fn failed(&self, waiter: WaiterId) -> &OperationError {
        match self.status(waiter) {
            Some(OperationStatus::Failed(error)) => error,
            other => panic!("not failed: {other:?}"),
        }
    }

    /// Takes the `Execute`s since the last look.
    pub fn executed(&mut self) -> Vec<(NodeId, OpToken, Operation)> {
        let sent = std::mem::take(&mut self.sent).into_iter();
        let executes = sent.filter_map(|(node, message)| match message {
            CoordinatorMessage::Execute { token, operation } => Some((node, token, operation)),
            _ => None,
        });
        executes.collect()
    }

    pub fn count(&self, wanted: impl Fn(&CoordinatorMessage) -> bool) -> usize {
        self.sent.iter().filter(|(_, message)| wanted(message)).count()
    }

    /// What a sound node says.
    pub fn ideal_answers(&mut self, node: NodeId, message: CoordinatorMessage) -> Vec<NodeMessage> {
        match message {
            CoordinatorMessage::FormRanks { spec, generation, roster, .. } => {
                self.rosters.insert(spec.run, roster);
                vec![NodeMessage::RanksReady { run: spec.run, generation }]
            }
            CoordinatorMessage::Execute { token, operation } => {
                let seats = self.rosters[&token.run].iter().filter(|seat| seat.node == node);
                let ranks: Vec<RankIndex> = seats.map(|seat| seat.rank).collect();
                ranks.into_iter().map(|rank| self.prepared(token, rank, &operation)).collect()
            }
            CoordinatorMessage::TakeSnapshot { token } => {
                vec![NodeMessage::SnapshotTaken {
                    token,
                    snapshot: blob(&format!("snapshot {}", token.seq.0)),
                }]
            }
            CoordinatorMessage::Stage { policy, .. } => vec![NodeMessage::Staged { policy }],
            CoordinatorMessage::Activate { policy } => vec![NodeMessage::Activated { policy }],
            CoordinatorMessage::Ping { nonce } => vec![NodeMessage::Pong { nonce }],
            _ => Vec::new(),
        }
    }

    /// What a sound rank says of an operation.
    pub fn prepared(&mut self, token: OpToken, rank: RankIndex, operation: &Operation) -> NodeMessage {
        let before = self.steps.range(..(token.run, token.seq)).next_back().map_or(0, |(_, step)| *step);
        let step = match operation {
            Operation::Init { .. } => 0,
            Operation::OptimStep { .. } => before + 1,
            _ => before,
        };
        self.steps.insert((token.run, token.seq), step);
        let (result, saved) = result_of(operation, step);
        let state = Digest::of(format!("state {}", token.seq.0).as_bytes());
        NodeMessage::Prepared { token, rank, state, result, saved, step }
    }
}

/// A model whose weights are 1,000 bytes, each row 10, each unit of rank 1 value on each target.
fn footprint() -> Footprint {
    Footprint {
        weights: 1000,
        adapter_values: [1; 8],
        row: 10,
        row_of_rank: 0,
        workspace: 0,
        checkpointed: None,
    }
}

pub fn hello(name: &str, trainers: u32, samplers: u32) -> NodeHello {
    NodeHello {
        protocol_version: PROTOCOL_VERSION,
        name: name.to_owned(),
        pid: 7,
        trainers,
        samplers,
        models: vec![ModelOffer {
            name: MODEL.to_owned(),
            aliases: vec!["alias".to_owned()],
            digest: Digest::of(b"model"),
            context: 32,
            vocab: 100,
            tokenizer: Digest::of(b"tokenizer"),
            tokenizer_size: 9,
            footprint: footprint(),
            gpu_footprint: None,
            lora_rank_max: [512, 128, 128, 512, 512, 512, 512, 512],
        }],
        numerics: Numerics {
            build: "1".into(),
            kernels: "avx2".into(),
            dtype: "f32".into(),
            reduction: "deterministic".into(),
        },
        address: format!("memory:{name}"),
        host: name.to_owned(),
        memory: None,
        gpu_memory: None,
    }
}

pub fn create(session: SessionId, replicas: Option<u32>) -> CreateRun {
    CreateRun {
        session,
        base_model: "alias".to_owned(),
        lora: LoraConfig::new(8, 1),
        replicas,
        max_seq_len: None,
        micro_batch_tokens: None,
        name: None,
    }
}

/// What a new journal holds.
pub fn nothing() -> Recovered {
    Recovered {
        epoch: Epoch(1),
        sessions: Vec::new(),
        owners: BTreeMap::new(),
        runs: Vec::new(),
        last_run: 0,
        checkpoints: Vec::new(),
        drained: BTreeSet::new(),
        certificates: Vec::new(),
        revoked: BTreeMap::new(),
    }
}

pub fn disk_full() -> JournalError {
    JournalError::DiskFull { path: "journal.sqlite".into() }
}

pub fn blob(what: &str) -> BlobRef {
    BlobRef { digest: Digest::of(what.as_bytes()), size: what.len() as u64 }
}

pub fn init() -> Operation {
    Operation::Init { lora: LoraConfig::new(8, 1) }
}

pub fn forward_backward() -> Operation {
    Operation::ForwardBackward { loss: LossSpec::new(LossFn::CrossEntropy), data: Payload::Inline(vec![1]) }
}

pub fn optim_step() -> Operation {
    Operation::OptimStep { adam: AdamParams::default() }
}

pub fn save_state(name: &str) -> Operation {
    Operation::SaveState { name: name.to_owned(), ttl_seconds: None }
}

pub fn publish(name: &str) -> Operation {
    Operation::SaveWeightsForSampler { name: name.to_owned(), publish: true, ttl_seconds: None }
}

pub fn load(path: &str) -> Operation {
    Operation::LoadState { path: path.to_owned(), with_optimizer: false, source: None }
}

fn result_of(operation: &Operation, step: u64) -> (OperationResult, Option<Saved>) {
    let saved = |name: &str, what: String| {
        let files = vec![SavedFile { name: name.to_owned(), blob: blob(&what) }];
        Some(Saved { digest: Digest::of(what.as_bytes()), files })
    };
    match operation {
        Operation::Init { lora } => {
            (OperationResult::Init(InitTrainerServerResponse { step, lora_rank: lora.rank }), None)
        }
        Operation::Forward { .. } | Operation::ForwardBackward { .. } => {
            (OperationResult::ForwardBackward(Payload::Inline(vec![2])), None)
        }
        Operation::OptimStep { .. } => {
            (OperationResult::OptimStep(OptimStepResponse { metrics: BTreeMap::new() }), None)
        }
        Operation::SaveState { name, .. } => {
            let path = format!("bt://loops:{RUN}/weights/{name}");
            let saved = saved(STATE_FILE, format!("state at {step} as {name}"));
            (OperationResult::SaveState(SaveWeightsResponse { path }), saved)
        }
        Operation::SaveWeightsForSampler { name, .. } => {
            let path = format!("bt://loops:{RUN}/sampler_weights/{name}");
            let saved = saved(ADAPTER_FILE, format!("adapter at {step} as {name}"));
            let response = SaveWeightsForSamplerResponse { path, version: step };
            (OperationResult::SaveWeightsForSampler(response), saved)
        }
        Operation::LoadState { .. } => (OperationResult::LoadState(LoadWeightsResponse { step }), None),
    }
}

//! One run: its operations in order, where its state stands, and the ranks that hold it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{
    journal::{Outcome, Record, SavedCheckpoint, Standing},
    protocol::{
        BlobRef, Call, CreateRun, Generation, NodeId, OpToken, Operation, OperationKey, OperationResult,
        OperationSeq, OperationStatus, RankIndex, RankSeat, RunInfo, RunSpec, Saved,
    },
    types::{Digest, ErrorKind, LoraConfig, OperationError, PolicyId, RunId},
};

use super::{WaiterId, history::Kept, recall::Replaying};

/// The phase of a run whose ranks have no place.
pub(super) const WAITING: &str = "waiting for nodes";

/// A run as the coordinator has it.
pub(super) struct Run {
    pub id: RunId,
    /// Every default filled in.
    pub create: CreateRun,
    pub model_digest: Digest,
    /// Under which its session asked for it.
    pub key: Option<OperationKey>,
    /// The configuration of the present adapter: `Init` and `LoadState` change it.
    pub lora: LoraConfig,

    pub operations: BTreeMap<OperationSeq, Entry>,
    pub keys: HashMap<OperationKey, OperationSeq>,
    pub next_seq: u64,
    /// Incarnation of the last accepted operation.
    pub accepted_incarnation: u32,
    /// The last operation with a durable outcome; all before it have one.
    pub finished: OperationSeq,
    /// Incarnation and step that it left.
    pub incarnation: u32,
    pub step: u64,

    /// The newest, durable.
    pub snapshot: Option<(OperationSeq, BlobRef)>,
    /// All that are kept, oldest first; the newest is the last.
    pub history: Vec<Kept>,
    /// What is older is being forgotten.
    pub pruning: bool,
    pub snapshotting: Option<Snapshotting>,
    pub snapshot_retry_ms: u64,

    pub generation: Generation,
    pub ranks: Ranks,
    pub work: Work,
    /// Someone needs the ranks: the run is new, or operations wait.
    pub wanted: bool,
    /// More slots are there than the rank set uses.
    pub refill: bool,
    /// Nobody has asked for anything in a long time: its ranks go once its state is written down.
    pub resting: bool,
    pub last_used_ms: u64,
    /// Rank sets lost in a row without an operation done in between.
    pub setbacks: u32,
    pub retry_ms: u64,
    /// It is on its way out of the journal.
    pub deleting: bool,
    /// It is in no journal and only repeats what another run did.
    pub replaying: Option<Replaying>,
    /// Why no operation is executed any more.
    pub broken: Option<OperationError>,

    /// The newest publish after the first step: what samplers serve.
    pub live: Option<PolicyId>,
    pub live_since_ms: u64,
    /// The newest publish at step 0: a reference beside later ones.
    pub initial: Option<PolicyId>,
    /// Incarnation of the last `Init`: what was published before it is gone.
    pub initialised: u32,
    pub publishing: Option<Publication>,
}

/// One operation of a run.
pub(super) struct Entry {
    pub key: OperationKey,
    /// Digest of the operation as it was submitted: tells a retry from another request.
    pub body: Digest,
    pub incarnation: u32,
    /// Dropped once it is finished and a snapshot covers it.
    pub operation: Option<Operation>,
    /// Durable, so it may execute.
    pub accepted: bool,
    /// Durable when it stands here.
    pub outcome: Option<Outcome>,
    /// Waiters may see the outcome: at once, or when a publish is being served.
    pub visible: bool,
    /// When it was accepted; for a recovered one, when the coordinator started.
    pub since_ms: u64,
    /// What came with it; a restarted coordinator has forgotten.
    pub call: Call,
    pub accept_waiters: Vec<WaiterId>,
    /// With the time until which each is held.
    pub waiters: Vec<(WaiterId, u64)>,
}

/// The ranks that hold the run's state.
pub(super) enum Ranks {
    Absent,
    /// `restored`: the last operation that is in the snapshot they are made from.
    Forming {
        set: RankSet,
        restored: OperationSeq,
        ready: BTreeSet<NodeId>,
        deadline_ms: u64,
    },
    /// `applied`: the last operation that their state contains.
    Formed {
        set: RankSet,
        applied: OperationSeq,
    },
}

/// Seats of one generation.
#[derive(Clone)]
pub(super) struct RankSet {
    pub roster: Vec<RankSeat>,
}

/// What the run is busy with; one operation at a time.
pub(super) enum Work {
    Idle,
    Execute(Execution),
    Conclude(Box<Conclusion>),
}

/// An operation on the ranks.
pub(super) struct Execution {
    pub token: OpToken,
    /// It has an outcome already, which must come out again.
    pub replay: bool,
    /// A `LoadState` with the source that its path named when its turn came.
    pub resolved: Option<Operation>,
    pub answers: BTreeMap<RankIndex, Answer>,
    pub deadline_ms: u64,
}

/// What one rank said.
#[derive(Clone, PartialEq)]
pub(super) enum Answer {
    Prepared { state: Digest, result: OperationResult, saved: Option<Saved>, step: u64 },
    Failed(OperationError),
}

/// An outcome on its way to the disk.
pub(super) struct Conclusion {
    pub seq: OperationSeq,
    pub outcome: Outcome,
    /// The rank set that holds the operation prepared; absent: none does.
    pub token: Option<OpToken>,
    pub resolved: Option<Operation>,
    pub checkpoint: Option<SavedCheckpoint>,
    /// The policy to publish, and its adapter.
    pub publish: Option<(PolicyId, BlobRef)>,
    /// What is being written, for another try.
    pub records: Vec<Record>,
    pub retry_ms: Option<u64>,
}

/// Operations that finished and that no snapshot covers.
#[derive(Default)]
pub(super) struct Unsaved {
    pub operations: usize,
    /// Of these, those that changed the state.
    pub changes: usize,
    /// Of these, optimiser steps.
    pub steps: usize,
}

/// A snapshot that rank 0 is writing.
pub(super) struct Snapshotting {
    pub token: OpToken,
    pub standing: Standing,
    pub deadline_ms: u64,
}

/// A publish whose outcome is durable and that the samplers don't serve yet.
pub(super) struct Publication {
    pub seq: OperationSeq,
    pub policy: PolicyId,
    /// By which some replica must serve it.
    pub deadline_ms: u64,
    /// Its outcome is of an earlier life of the coordinator.
    pub recovered: bool,
    /// Why nodes did not, by name; the last of each.
    pub reasons: BTreeMap<String, String>,
    /// Its failure is on the way to the disk.
    pub failing: bool,
}

impl Publication {
    pub fn new(seq: OperationSeq, policy: PolicyId, deadline_ms: u64) -> Self {
        Self { seq, policy, deadline_ms, recovered: false, reasons: BTreeMap::new(), failing: false }
    }
}

impl Run {
    /// A run without history.
    pub fn new(id: RunId, create: CreateRun, model_digest: Digest) -> Self {
        Self {
            id,
            lora: create.lora.clone(),
            create,
            model_digest,
            key: None,
            operations: BTreeMap::new(),
            keys: HashMap::new(),
            next_seq: 1,
            accepted_incarnation: 0,
            finished: OperationSeq(0),
            incarnation: 0,
            step: 0,
            snapshot: None,
            history: Vec::new(),
            pruning: false,
            snapshotting: None,
            snapshot_retry_ms: 0,
            generation: Generation(0),
            ranks: Ranks::Absent,
            work: Work::Idle,
            wanted: true,
            refill: false,
            resting: false,
            last_used_ms: 0,
            setbacks: 0,
            retry_ms: 0,
            deleting: false,
            replaying: None,
            broken: None,
            live: None,
            live_since_ms: 0,
            initial: None,
            initialised: 0,
            publishing: None,
        }
    }

    /// Ranks that it gets of so many slots: as many as it asked for, or all.
    pub fn ranks_on(&self, slots: usize) -> usize {
        self.create.replicas.map_or(slots, |asked| slots.min(asked as usize))
    }

    pub fn spec(&self) -> RunSpec {
        RunSpec {
            run: self.id,
            base_model: self.create.base_model.clone(),
            max_seq_len: self.create.max_seq_len.unwrap_or(0),
            micro_batch_tokens: self.create.micro_batch_tokens.unwrap_or(0),
            lora: self.create.lora.clone(),
        }
    }

    /// Operations without a durable outcome.
    pub fn unfinished(&self) -> usize {
        self.operations.range(after(self.finished)..).count()
    }

    /// The operation whose turn it is, once it is durable.
    pub fn head(&self) -> Option<OperationSeq> {
        let (seq, entry) = self.operations.range(after(self.finished)..).next()?;
        entry.accepted.then_some(*seq)
    }

    /// The next operation that ranks with state `applied` must repeat to catch up.
    pub fn next_replay(&self, applied: OperationSeq) -> Option<OperationSeq> {
        if applied >= self.finished {
            return None;
        }
        let behind = self.operations.range(after(applied)..=self.finished);
        behind.filter(|(_, entry)| entry.changes_state()).map(|(seq, _)| *seq).next()
    }

    /// Whether the ranks were made without an operation up to `seq` that changed the state.
    pub fn ranks_lack(&self, seq: OperationSeq) -> bool {
        let has = match &self.ranks {
            Ranks::Absent => return false,
            Ranks::Forming { restored, .. } => *restored,
            Ranks::Formed { applied, .. } => *applied,
        };
        self.next_replay(has).is_some_and(|next| next <= seq)
    }

    /// What finished since the snapshot.
    pub fn unsaved(&self) -> Unsaved {
        let from = self.snapshot.map_or(OperationSeq(0), |(seq, _)| seq);
        let mut unsaved = Unsaved::default();
        if from >= self.finished {
            return unsaved;
        }
        for (_, entry) in self.operations.range(after(from)..=self.finished) {
            let changes = entry.changes_state();
            let step = changes && matches!(entry.operation, Some(Operation::OptimStep { .. }));
            unsaved.operations += 1;
            unsaved.changes += usize::from(changes);
            unsaved.steps += usize::from(step);
        }
        unsaved
    }

    /// Forgets the data of what a snapshot covers: nothing repeats it.
    pub fn forget_covered(&mut self) {
        let Some((covered, _)) = self.snapshot else { return };
        for (_, entry) in self.operations.range_mut(..=covered) {
            entry.operation = None;
        }
    }

    /// Where the run stands after its last outcome.
    pub fn standing(&self) -> Standing {
        Standing { incarnation: self.incarnation, step: self.step, lora: self.lora.clone() }
    }

    /// The nodes of its ranks, each once.
    pub fn rank_nodes(&self) -> BTreeSet<NodeId> {
        match &self.ranks {
            Ranks::Absent => BTreeSet::new(),
            Ranks::Forming { set, .. } | Ranks::Formed { set, .. } => set.nodes(),
        }
    }

    pub fn roster(&self) -> &[RankSeat] {
        match &self.ranks {
            Ranks::Absent => &[],
            Ranks::Forming { set, .. } | Ranks::Formed { set, .. } => &set.roster,
        }
    }

    /// Puts what was published into its slot, unless the run has begun anew since.
    pub fn serve(&mut self, policy: PolicyId, now_ms: u64) {
        if policy.incarnation < self.initialised {
            return;
        }
        match policy.step {
            0 => self.initial = Some(policy),
            _ => (self.live, self.live_since_ms) = (Some(policy), now_ms),
        }
    }

    /// A fresh adapter: nothing that was published is of this run any more.
    pub fn begin_anew(&mut self, incarnation: u32) {
        self.initialised = self.initialised.max(incarnation);
        (self.live, self.live_since_ms, self.initial) = (None, 0, None);
    }

    /// What samplers serve from version `floor` on; with 0 also what was published at step 0.
    pub fn live_from(&self, floor: u64) -> Option<PolicyId> {
        self.live.or(self.initial).filter(|live| live.step >= floor)
    }

    /// Whether the journal has a slot of the run.
    pub fn has_published(&self) -> bool {
        self.live.is_some() || self.initial.is_some() || self.publishing.is_some()
    }

    /// Whether a policy is in a slot, or on its way there.
    pub fn serves(&self, policy: PolicyId) -> bool {
        let publishing = self.publishing.as_ref().map(|p| p.policy);
        [self.live, self.initial, publishing].contains(&Some(policy))
    }

    /// What the run knows of itself; not its owner, and not its model.
    pub fn info(&self) -> RunInfo {
        RunInfo {
            run: self.id,
            session: self.create.session,
            owner: None,
            name: self.create.name.clone().unwrap_or_else(|| self.create.base_model.clone()),
            base_model: self.create.base_model.clone(),
            lora: self.lora.clone(),
            replicas: self.create.replicas.unwrap_or(self.roster().len() as u32),
            max_seq_len: self.create.max_seq_len.unwrap_or(0),
            vocab_size: None,
            micro_batch_tokens: self.create.micro_batch_tokens.unwrap_or(0),
            incarnation: self.incarnation,
            step: self.step,
            live: self.live,
            live_since_ms: self.live_since_ms,
            initial: self.initial,
            accepted: self.next_seq - 1,
            queued: u32::try_from(self.unfinished()).unwrap_or(u32::MAX),
            phase: self.phase(),
        }
    }

    fn phase(&self) -> String {
        if let Some(error) = &self.broken {
            return format!("broken: {error}");
        }
        let ranks = self.roster().len();
        match (&self.ranks, &self.work) {
            (_, Work::Conclude(c)) => format!("making operation {} durable", c.seq.0),
            (_, Work::Execute(e)) if e.replay => format!("replaying operation {}", e.token.seq.0),
            (_, Work::Execute(e)) => format!("executing operation {} on {ranks} ranks", e.token.seq.0),
            (Ranks::Absent, _) if self.wanted => WAITING.to_owned(),
            (Ranks::Absent, _) => "asleep".to_owned(),
            (Ranks::Forming { .. }, _) => format!("forming {ranks} ranks"),
            (Ranks::Formed { .. }, _) if self.publishing.is_some() => {
                "publishing: waiting for samplers".to_owned()
            }
            (Ranks::Formed { .. }, _) => format!("ready on {ranks} ranks"),
        }
    }
}

impl RankSet {
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        self.roster.iter().map(|seat| seat.node).collect()
    }
}

impl Entry {
    /// Whether replay must execute it again: it changed the state. A non-finite `optim_step`
    /// did: it cleared the accumulated gradient.
    pub fn changes_state(&self) -> bool {
        match (&self.operation, &self.outcome) {
            (Some(operation), Some(Outcome::Done { .. })) => matches!(
                operation,
                Operation::Init { .. }
                    | Operation::ForwardBackward { .. }
                    | Operation::OptimStep { .. }
                    | Operation::LoadState { .. }
            ),
            (Some(Operation::OptimStep { .. }), Some(Outcome::Failed { error })) => {
                error.kind == ErrorKind::NotFinite
            }
            _ => false,
        }
    }

    /// What a waiter is told.
    pub fn status(&self) -> OperationStatus {
        match &self.outcome {
            Some(Outcome::Done { result, .. }) if self.visible => OperationStatus::Done(result.clone()),
            Some(Outcome::Failed { error }) if self.visible => OperationStatus::Failed(error.clone()),
            _ => OperationStatus::Pending,
        }
    }
}

/// The sequence number behind `seq`.
pub(super) fn after(seq: OperationSeq) -> OperationSeq {
    OperationSeq(seq.0 + 1)
}

//! Real ranks with their threads, driven by hand: what the pure state can't show.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use actix::Addr;
use tokio::sync::mpsc;

use super::*;
use crate::{
    collective::{self, CollectiveInbox, RankSet, Reduction},
    model::{ComputeOptions, ModelSource, tiny},
    protocol::{
        Epoch, NodeId, OpToken, Operation, OperationSeq, Payload, RankIndex, RankSeat, RunSpec,
        encode_compressed,
    },
    transport::{Endpoint, MemoryNetwork, Role},
    types::{AdamParams, Datum, LoraConfig, LossFn, LossSpec, ModelInput, TensorData},
};

const RUN: RunId = RunId(1);

#[test]
fn what_one_rank_cannot_fetch_is_heard_by_all_at_once() {
    slots(2, async |mut slots| {
        slots.form(1, &[0, 1]).await;
        let data = slots.blobs.store(&batch());
        slots.blobs.lock().refuses_slot = Some(1);
        slots.execute(1, forward_backward(Payload::Blob(data)));
        for _ in 0..2 {
            let NodeMessage::OperationFailed { error, blame: Blame::Environment, .. } = slots.message().await
            else {
                panic!("both ranks give it up");
            };
            assert!(error.message.contains("refused to slot 1"), "{error}");
        }
        // The collective is still of use: the failure was said in it, not by leaving it.
        slots.deliver(Event::Discard { token: token(1, 1) });
        slots.blobs.lock().refuses_slot = None;
        slots.execute(2, forward_backward(Payload::Blob(data)));
        assert_eq!(slots.prepared().await, slots.prepared().await);
    });
}

#[test]
fn a_discarded_operation_leaves_no_trace_and_a_committed_one_does() {
    slots(1, async |mut slots| {
        slots.form(1, &[0]).await;
        let payload = || Payload::Inline(encode_compressed(&batch()));
        slots.execute(1, forward_backward(payload()));
        let first = slots.prepared().await;
        slots.deliver(Event::Discard { token: token(1, 1) });
        slots.execute(2, forward_backward(payload()));
        assert_eq!(slots.prepared().await, first, "from the same state");
        slots.deliver(Event::Commit { token: token(1, 2) });
        slots.execute(3, forward_backward(payload()));
        assert_ne!(slots.prepared().await, first, "on top of it");
    });
}

#[test]
fn a_gradient_that_is_not_finite_fails_its_operation_and_spoils_no_earlier_one() {
    slots(1, async |mut slots| {
        slots.form(1, &[0]).await;
        let good = || forward_backward(Payload::Inline(encode_compressed(&batch())));
        slots.execute(1, good());
        slots.prepared().await;
        slots.deliver(Event::Commit { token: token(1, 1) });
        slots.execute(2, good());
        let second = slots.prepared().await;
        slots.deliver(Event::Discard { token: token(1, 2) });

        // Each weighted loss is within f32; their gradients' products are not.
        let mut overflowing = batch();
        for datum in &mut overflowing {
            let weights = TensorData::from_f32(vec![1e38; datum.model_input.length()]);
            datum.loss_fn_inputs.insert("weights".to_owned(), weights);
        }
        slots.execute(3, forward_backward(Payload::Inline(encode_compressed(&overflowing))));
        match slots.message().await {
            NodeMessage::OperationFailed { error, blame: Blame::Operation, .. } => {
                assert_eq!(error.kind, ErrorKind::NotFinite, "{error}");
            }
            other => panic!("not refused: {other:?}"),
        }
        slots.deliver(Event::Discard { token: token(1, 3) });
        slots.execute(4, good());
        assert_eq!(slots.prepared().await, second, "on top of the first alone");
    });
}

#[test]
fn a_rank_says_how_far_it_is() {
    slots_that_tell(Duration::ZERO, 1, async |mut slots| {
        slots.form(1, &[0]).await;
        slots.execute(1, forward_backward(Payload::Inline(encode_compressed(&batch()))));
        // Of 3 sequences each is over half of the budget of 4 tokens: a micro-batch alone. A rank is heard
        // within each of them, too, as one alone may be long: after each layer.
        let mut heard = Vec::new();
        loop {
            match slots.message().await {
                NodeMessage::Progress { token: of, rank: RankIndex(0), done, of: 3 } if of == token(1, 1) => {
                    heard.push(done);
                }
                NodeMessage::Prepared { .. } => break,
                other => panic!("unexpected: {other:?}"),
            }
        }
        assert!(heard.is_sorted() && heard.iter().all(|done| *done <= 3), "{heard:?}");
        let within = heard.iter().filter(|done| **done == 0).count();
        assert!(within > 1, "only once before the first micro-batch was done: {heard:?}");
    });
}

#[test]
fn a_snapshot_restores_the_committed_state() {
    slots(1, async |mut slots| {
        slots.form(1, &[0]).await;
        let payload = || Payload::Inline(encode_compressed(&batch()));
        slots.execute(1, forward_backward(payload()));
        slots.prepared().await;
        slots.deliver(Event::Commit { token: token(1, 1) });
        slots.deliver(Event::TakeSnapshot { token: token(1, 1) });
        let step = Operation::OptimStep { adam: AdamParams::default() };
        slots.execute(2, step.clone());
        let (mut stepped, mut snapshot) = (None, None);
        while stepped.is_none() || snapshot.is_none() {
            match slots.message().await {
                NodeMessage::Prepared { state, .. } => stepped = Some(state),
                NodeMessage::SnapshotTaken { snapshot: taken, .. } => snapshot = Some(taken),
                other => panic!("unexpected: {other:?}"),
            }
        }
        slots.restore = snapshot;
        slots.form(2, &[0]).await;
        let token = token(2, 2);
        slots.deliver(Event::Execute { token, operation: step });
        assert_eq!(slots.prepared().await, stepped);
    });
}

#[test]
fn runs_of_different_ranks_share_one_base_model() {
    slots(2, async |mut slots| {
        let model = slots.library.load("tiny").unwrap();
        let before = Arc::strong_count(&model);
        for (run, rank, slot) in [(1, 2, 0), (2, 5, 0), (3, 7, 1)] {
            let mut formation = slots.formation(1, &[slot], 0);
            formation.spec.run = RunId(run);
            formation.spec.lora = LoraConfig::new(rank, 3);
            slots.ranks[slot as usize].try_send(Deliver(Event::Form(formation))).unwrap();
            assert!(matches!(slots.report().await, RankReport::Formed { result: Ok(()), .. }));
        }
        assert_eq!(Arc::strong_count(&model), before + 3, "each run holds the model that was there");
        assert_eq!(slots.library.loads(), 1);
    });
}

#[test]
fn a_rank_whose_peer_never_comes_is_free_once_released() {
    slots(1, async |mut slots| {
        let began = Instant::now();
        slots.deliver(Event::Form(slots.formation(1, &[0, 1], 0)));
        slots.deliver(Event::Release { run: RUN, generation: Generation(1) });
        slots.form(2, &[0]).await;
        assert!(began.elapsed() < JOIN_PATIENCE, "it did not wait for the peer");
    });
}

/// The carrier of two GPUs, with vectors in their place: shared memory to meet over, NCCL's program for the sums.
#[test]
fn gradients_that_went_over_nccl_leave_the_weights_of_any_carrier() {
    let over_nccl = |reduction| {
        let sets = unique_name();
        move |_| -> Join {
            let sets = sets.clone();
            Arc::new(move |formation: &Formation| {
                let (rank, world_size) = (formation.rank.0, formation.roster.len() as u32);
                let name = format!("{sets}-{}", formation.generation.0);
                Ok(collective::over_host_link(&name, rank, world_size, reduction))
            })
        }
    };
    let host = trained_by_two(join_by);
    assert_eq!(trained_by_two(over_nccl(Reduction::Tree)), host);
    let fast = trained_by_two(over_nccl(Reduction::Fast));
    assert_eq!(trained_by_two(over_nccl(Reduction::Fast)), fast, "the same ranks give the same bits");
}

/// Of shared memory, for one test alone.
fn unique_name() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("rank-set{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// States after each operation of three steps, which both ranks came to.
fn trained_by_two(join: impl Fn(Endpoint) -> Join) -> Vec<Option<Digest>> {
    let mut states = Vec::new();
    slots_that_join(join, JOIN_PATIENCE, 2, async |mut slots| {
        slots.form(1, &[0, 1]).await;
        let pass = || forward_backward(Payload::Inline(encode_compressed(&batch())));
        let step = || Operation::OptimStep { adam: AdamParams::default() };
        for (seq, operation) in (1..).zip([pass(), step(), pass(), pass(), step(), pass(), step()]) {
            slots.execute(seq, operation);
            states.push(slots.prepared().await);
            assert_eq!(slots.prepared().await, states[states.len() - 1], "both ranks");
            slots.deliver(Event::Commit { token: token(1, seq) });
        }
    });
    states
}

#[test]
fn a_panic_of_the_thread_is_told() {
    slots(1, async |mut slots| {
        slots.form(1, &[0]).await;
        let data = slots.blobs.store(&batch());
        slots.blobs.lock().panics = true;
        slots.execute(1, forward_backward(Payload::Blob(data)));
        let death = slots.deaths.recv().await.unwrap();
        assert_eq!(death, "thread rank-0 has panicked: the disk is on fire");
    });
}

/// Far beyond what a test takes, and so never waited for by one that passes.
const JOIN_PATIENCE: Duration = Duration::from_secs(120);

fn batch() -> Vec<Datum> {
    let datum = |tokens: &[u32]| Datum {
        model_input: ModelInput::from_ints(tokens.to_vec()),
        loss_fn_inputs: Default::default(),
    };
    vec![datum(&[5, 6, 7, 8]), datum(&[9, 8, 7]), datum(&[5, 9, 5, 9, 5])]
}

fn forward_backward(data: Payload) -> Operation {
    Operation::ForwardBackward { loss: LossSpec::new(LossFn::CrossEntropy), data }
}

fn token(generation: u32, seq: u64) -> OpToken {
    OpToken {
        run: RUN,
        epoch: Epoch(1),
        generation: Generation(generation),
        seq: OperationSeq(seq),
        incarnation: 1,
    }
}

/// Rank slots of one node, and the test's hands on them.
struct Slots {
    library: Arc<Library>,
    ranks: Vec<Addr<TrainerRank>>,
    reports: mpsc::Receiver<RankReport>,
    deaths: mpsc::Receiver<String>,
    blobs: MemoryBlobs,
    generation: u32,
    restore: Option<BlobRef>,
}

/// Runs `test` on `count` slots in an actix system of its own.
fn slots(count: u32, test: impl AsyncFnOnce(Slots)) {
    slots_that_tell(JOIN_PATIENCE, count, test);
}

/// The same, with ranks that say how far they are at most every `progress_every`.
fn slots_that_tell(progress_every: Duration, count: u32, test: impl AsyncFnOnce(Slots)) {
    slots_that_join(join_by, progress_every, count, test);
}

/// The same, with ranks that meet as `join` lets those of an endpoint.
fn slots_that_join(
    join: impl Fn(Endpoint) -> Join,
    progress_every: Duration,
    count: u32,
    test: impl AsyncFnOnce(Slots),
) {
    let directory = tempfile::tempdir().unwrap();
    tiny::write(directory.path(), &tiny::config(), 3).unwrap();
    let source =
        ModelSource { name: "tiny".to_owned(), aliases: Vec::new(), path: directory.path().to_owned() };
    let library = Arc::new(Library::open(vec![source], ComputeOptions::default()).unwrap());
    let system = actix_rt::System::with_tokio_rt(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    });
    system.block_on(async {
        let endpoint = Endpoint::memory(&MemoryNetwork::default(), Role::Node, "node").unwrap();
        let (report, reports) = mpsc::channel(64);
        let (death, deaths) = mpsc::channel(1);
        let blobs = MemoryBlobs::default();
        let cores = CoreBudget::new(2);
        let ranks = (0..count)
            .map(|slot| {
                let death = death.clone();
                let config = RankConfig {
                    slot,
                    library: library.clone(),
                    cores: cores.clone(),
                    blobs: Arc::new(SlotBlobs { slot, blobs: blobs.clone() }),
                    join: join(endpoint.clone()),
                    progress_every,
                    on_death: Arc::new(move |what| death.try_send(what.to_owned()).unwrap_or_default()),
                };
                TrainerRank::launch(config, report.clone()).unwrap()
            })
            .collect();
        test(Slots { library, ranks, reports, deaths, blobs, generation: 0, restore: None }).await;
    });
}

fn join_by(endpoint: Endpoint) -> Join {
    let (inbox, runtime) = (CollectiveInbox::default(), tokio::runtime::Handle::current());
    Arc::new(move |formation| {
        let set = RankSet {
            cluster: endpoint.cluster(),
            run: formation.spec.run,
            epoch: formation.epoch,
            generation: formation.generation,
            roster: &formation.roster,
            me: formation.rank,
            gpu: None,
        };
        collective::join(set, &endpoint, &inbox, runtime.clone(), Instant::now() + JOIN_PATIENCE)
            .map_err(|e| OperationError::new(ErrorKind::Unavailable, e.to_string()).into())
    })
}

impl Slots {
    fn formation(&self, generation: u32, slots: &[u32], rank: u32) -> Formation {
        let seat = |(rank, &slot): (usize, &u32)| RankSeat {
            rank: RankIndex(rank as u32),
            node: NodeId(1),
            slot,
            host: "here".to_owned(),
            address: "memory:node".to_owned(),
        };
        Formation {
            spec: RunSpec {
                run: RUN,
                base_model: "tiny".to_owned(),
                max_seq_len: 64,
                micro_batch_tokens: 4,
                lora: LoraConfig::new(2, 3),
            },
            epoch: Epoch(1),
            generation: Generation(generation),
            rank: RankIndex(rank),
            roster: slots.iter().enumerate().map(seat).collect(),
            restore: self.restore,
        }
    }

    /// Forms the run's ranks in `slots` and waits for all of them.
    async fn form(&mut self, generation: u32, slots: &[u32]) {
        self.generation = generation;
        for (rank, &slot) in slots.iter().enumerate() {
            let formation = self.formation(generation, slots, rank as u32);
            self.ranks[slot as usize].try_send(Deliver(Event::Form(formation))).unwrap();
        }
        for _ in slots {
            let formed = RankReport::Formed { run: RUN, generation: Generation(generation), result: Ok(()) };
            assert_eq!(self.report().await, formed);
        }
    }

    fn execute(&self, seq: u64, operation: Operation) {
        self.deliver(Event::Execute { token: token(self.generation, seq), operation });
    }

    /// To every slot.
    fn deliver(&self, event: Event) {
        for rank in &self.ranks {
            rank.try_send(Deliver(event.clone())).unwrap();
        }
    }

    async fn report(&mut self) -> RankReport {
        let report = tokio::time::timeout(Duration::from_secs(60), self.reports.recv());
        report.await.expect("a report, at once").expect("the ranks live")
    }

    async fn message(&mut self) -> NodeMessage {
        match self.report().await {
            RankReport::Message(message) => message,
            other => panic!("no message: {other:?}"),
        }
    }

    /// The state that the next answer has prepared.
    async fn prepared(&mut self) -> Option<Digest> {
        match self.message().await {
            NodeMessage::Prepared { state, .. } => Some(state),
            other => panic!("not prepared: {other:?}"),
        }
    }
}

/// Blobs in memory, which can be told to fail.
#[derive(Clone, Default)]
struct MemoryBlobs(Arc<Mutex<Stored>>);

#[derive(Default)]
struct Stored {
    blobs: HashMap<Digest, Bytes>,
    refuses_slot: Option<u32>,
    panics: bool,
}

struct SlotBlobs {
    slot: u32,
    blobs: MemoryBlobs,
}

impl MemoryBlobs {
    fn store(&self, data: &Vec<Datum>) -> BlobRef {
        self.keep(Bytes::from(encode_compressed(data)))
    }

    fn keep(&self, bytes: Bytes) -> BlobRef {
        let blob = BlobRef { digest: Digest::of(&bytes), size: bytes.len() as u64 };
        self.lock().blobs.insert(blob.digest, bytes);
        blob
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Stored> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Blobs for SlotBlobs {
    fn get(&self, blob: BlobRef) -> Result<Bytes, OperationError> {
        let stored = self.blobs.lock();
        assert!(!stored.panics, "the disk is on fire");
        match stored.refuses_slot {
            Some(slot) if slot == self.slot => {
                Err(OperationError::new(ErrorKind::Unavailable, format!("refused to slot {slot}")))
            }
            _ => Ok(stored.blobs[&blob.digest].clone()),
        }
    }

    fn put(&self, bytes: Bytes) -> Result<BlobRef, OperationError> {
        Ok(self.blobs.keep(bytes))
    }
}

//! The node's actor: performs what [`NodeState`] decides.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use actix::{Actor, ActorContext, Addr, AsyncContext, Context, Handler, MessageResult, dev::ToEnvelope};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::{
    kernels::CoreBudget,
    model::Library,
    protocol::{BlobRef, Generate, GenerateReply, NodeMessage},
    sampler::{self, ReplicaConfig, ReplicaReport, SamplerReplica},
    trainer::{Deliver, Join, RankConfig, RankReport, TrainerRank},
    transport::Connection,
    types::{ErrorKind, OperationError, PolicyId},
};

use super::{
    NodeConfig,
    blobs::BlobClient,
    memory::ReplicaLimits,
    state::{Effect, Event, NodeState, Ticket},
};

/// Control messages that may wait for the node.
const MAILBOX: usize = 1024;

/// Reports of ranks and replicas on their way to the node.
const REPORTS: usize = 1024;

/// Between two reports of how far an operation is: often enough for its deadline without progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What a node's actor is made of.
pub(super) struct Parts<'a> {
    pub(super) config: &'a NodeConfig,
    pub(super) library: Arc<Library>,
    pub(super) cores: CoreBudget,
    pub(super) blobs: BlobClient,
    pub(super) join: Join,
    /// Of each replica.
    pub(super) limits: ReplicaLimits,
    /// Notified when the coordinator says that the process is to end.
    pub(super) stop: Arc<Notify>,
    pub(super) on_death: Arc<dyn Fn(&str) + Send + Sync>,
}

/// Routes between the coordinator, the ranks and the replicas.
pub(super) struct NodeActor {
    state: NodeState,
    ranks: Vec<Addr<TrainerRank>>,
    replicas: Vec<Addr<SamplerReplica>>,
    blobs: BlobClient,
    stop: Arc<Notify>,
    on_death: Arc<dyn Fn(&str) + Send + Sync>,
    /// Present while connected.
    uplink: Option<Uplink>,
    /// Requests that the state has yet to place.
    arriving: HashMap<Ticket, Sample>,
}

/// The present way to the coordinator.
pub(super) struct Uplink {
    pub(super) connection: Connection,
    pub(super) outbox: mpsc::Sender<NodeMessage>,
}

/// An event for the node.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub(super) struct Notice(pub(super) Event);

/// [`Event::Connected`], with the way back.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub(super) struct Connected(pub(super) Event, pub(super) Uplink);

/// [`Event::Request`], with the way back. `reply` gets at most one answer.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub(super) struct Sample {
    pub(super) ticket: Ticket,
    pub(super) generate: Generate,
    pub(super) reply: oneshot::Sender<GenerateReply>,
}

/// How many requests are under way.
#[derive(actix::Message)]
#[rtype(result = "usize")]
struct Requests;

/// Ends the actor, and with it its ranks and replicas.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub(super) struct Stop;

/// Waits until no request is under way, but no longer than `limit`.
pub(super) async fn drain(node: &Addr<NodeActor>, limit: Duration) {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline && node.send(Requests).await.is_ok_and(|requests| requests > 0) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl NodeActor {
    /// Starts the node's actors and their threads, in the current actix system.
    pub(super) fn launch(parts: Parts<'_>) -> std::io::Result<Addr<Self>> {
        let Parts { config, library, cores, blobs, join, limits, stop, on_death } = parts;
        let (rank_reports, from_ranks) = mpsc::channel(REPORTS);
        let (replica_reports, from_replicas) = mpsc::channel(REPORTS);
        let ranks = (0..config.trainers)
            .map(|slot| {
                let rank = RankConfig {
                    slot,
                    library: library.clone(),
                    cores: cores.clone(),
                    blobs: Arc::new(blobs.clone()),
                    join: join.clone(),
                    progress_every: PROGRESS_EVERY,
                    on_death: on_death.clone(),
                };
                TrainerRank::launch(rank, rank_reports.clone())
            })
            .collect::<std::io::Result<_>>()?;
        let replicas = (0..config.samplers)
            .map(|index| {
                let replica = ReplicaConfig {
                    index,
                    library: library.clone(),
                    cores: cores.clone(),
                    kv_bytes: limits.cache_bytes,
                    max_batch: limits.batch,
                    prefill_rows: limits.prefill_rows,
                    on_death: on_death.clone(),
                };
                SamplerReplica::launch(replica, replica_reports.clone())
            })
            .collect::<std::io::Result<_>>()?;
        let node = Self {
            state: NodeState::new(config.trainers, config.samplers),
            ranks,
            replicas,
            blobs,
            stop,
            on_death,
            uplink: None,
            arriving: HashMap::new(),
        };
        let node = node.start();
        tokio::spawn(pump(from_ranks, node.clone(), |report: RankReport| Event::Rank(report)));
        tokio::spawn(pump(from_replicas, node.clone(), |report| match report {
            ReplicaReport::Staged { replica, policy } => Event::Staged { replica, policy },
            ReplicaReport::StageFailed { replica, policy, error } => {
                Event::StageFailed { replica, policy, error }
            }
            ReplicaReport::Activated { replica, policy } => Event::Activated { replica, policy },
        }));
        Ok(node)
    }

    fn apply(&mut self, event: Event, context: &mut Context<Self>) {
        for effect in self.state.handle(event) {
            self.perform(effect, context);
        }
    }

    fn perform(&mut self, effect: Effect, context: &mut Context<Self>) {
        match effect {
            Effect::Rank { slot, event } => self.tell_rank(slot, Deliver(event)),
            Effect::Stage { replica, policy, base_model, adapter } => {
                self.tell_replica(replica, sampler::Stage { policy, base_model, adapter });
            }
            Effect::Activate { replica, policy } => self.tell_replica(replica, sampler::Activate { policy }),
            Effect::Retire { replica, policy } => self.tell_replica(replica, sampler::Retire { policy }),
            Effect::Fetch { policy, adapter } => self.fetch(policy, adapter, context.address()),
            Effect::Tell(message) => self.tell(message),
            Effect::Sample { ticket, replica } => self.sample(ticket, replica),
            Effect::Refuse { ticket, error } => {
                if let Some(Sample { reply, .. }) = self.arriving.remove(&ticket) {
                    // Whoever asked may be gone, which is as good as an answer.
                    let _ = reply.send(GenerateReply::Failed(error));
                }
            }
            Effect::Close { reason } => self.close(reason),
            Effect::Stop => self.stop.notify_one(),
        }
    }

    fn tell_rank(&mut self, slot: u32, message: Deliver) {
        let rank = self.ranks.get(slot as usize);
        if rank.is_some_and(|rank| rank.try_send(message).is_err()) {
            self.close("a rank takes no messages");
        }
    }

    fn tell_replica<M>(&mut self, replica: u32, message: M)
    where
        M: actix::Message + Send + 'static,
        M::Result: Send,
        SamplerReplica: Handler<M>,
        Context<SamplerReplica>: ToEnvelope<SamplerReplica, M>,
    {
        let replica = self.replicas.get(replica as usize);
        if replica.is_some_and(|replica| replica.try_send(message).is_err()) {
            self.close("a replica takes no messages");
        }
    }

    fn fetch(&self, policy: PolicyId, adapter: BlobRef, node: Addr<Self>) {
        let blobs = self.blobs.clone();
        tokio::spawn(async move {
            let adapter = blobs.fetch(adapter).await.map_err(OperationError::from);
            // The node has stopped: nobody is to be told.
            let _ = node.send(Notice(Event::Fetched { policy, adapter })).await;
        });
    }

    /// Messages to a coordinator that reads none would pile up: it is given up instead, and
    /// comes back over a new connection.
    fn tell(&mut self, message: NodeMessage) {
        let Some(uplink) = &self.uplink else { return };
        if uplink.outbox.try_send(message).is_err() {
            self.close("the coordinator reads too slowly");
        }
    }

    fn sample(&mut self, ticket: Ticket, replica: u32) {
        let Some(Sample { generate, reply, .. }) = self.arriving.remove(&ticket) else { return };
        let Some(replica) = self.replicas.get(replica as usize) else { return };
        if let Err(refused) = replica.try_send(sampler::Sample { generate, reply }) {
            let error = OperationError::new(ErrorKind::ResourceExhausted, "the replica's queue is full");
            let _ = refused.into_inner().reply.send(GenerateReply::Failed(error));
        }
    }

    fn close(&mut self, reason: &str) {
        if let Some(uplink) = self.uplink.take() {
            uplink.connection.close(reason);
        }
    }
}

/// Carries reports into the actor's mailbox, waiting for room in it.
async fn pump<R>(mut reports: mpsc::Receiver<R>, node: Addr<NodeActor>, event: fn(R) -> Event) {
    while let Some(report) = reports.recv().await {
        if node.send(Notice(event(report))).await.is_err() {
            return;
        }
    }
}

impl Actor for NodeActor {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
    }
}

impl Handler<Notice> for NodeActor {
    type Result = ();

    fn handle(&mut self, Notice(event): Notice, context: &mut Self::Context) {
        self.apply(event, context);
    }
}

impl Handler<Connected> for NodeActor {
    type Result = ();

    fn handle(&mut self, Connected(event, uplink): Connected, context: &mut Self::Context) {
        self.uplink = Some(uplink);
        self.apply(event, context);
    }
}

impl Handler<Sample> for NodeActor {
    type Result = ();

    fn handle(&mut self, sample: Sample, context: &mut Self::Context) {
        let ticket = sample.ticket;
        self.arriving.insert(ticket, sample);
        self.apply(Event::Request { ticket }, context);
    }
}

impl Handler<Requests> for NodeActor {
    type Result = MessageResult<Requests>;

    fn handle(&mut self, _: Requests, _context: &mut Self::Context) -> Self::Result {
        MessageResult(self.state.requests())
    }
}

impl Handler<Stop> for NodeActor {
    type Result = ();

    fn handle(&mut self, _: Stop, context: &mut Self::Context) {
        self.close("the node stops");
        context.stop();
    }
}

impl Drop for NodeActor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.on_death)("the node's actor has panicked");
        }
    }
}

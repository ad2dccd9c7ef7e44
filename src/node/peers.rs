//! Connections that other nodes open: the streams of their ranks' collectives.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use crate::{
    collective::{self, CollectiveInbox, GpuSeat, JoinError, RankSet, StreamKey},
    protocol::{Blame, MAX_MESSAGE, StreamOpen, decode},
    trainer::{Failure, Join},
    transport::{Connection, Endpoint, Revocation, Role, Stream},
    types::{ErrorKind, OperationError, RunId},
};

/// How long the ranks of a run wait for one another: the slowest has the base model to load.
const JOIN_DEADLINE: Duration = Duration::from_secs(300);

/// How long a peer may take to say which ranks its stream joins.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// The node's side of its ranks' collectives.
#[derive(Clone)]
pub(super) struct Peers {
    endpoint: Endpoint,
    inbox: CollectiveInbox,
    /// Where the node's ranks compute, if that is a GPU.
    gpu: Option<GpuSeat>,
    /// What other nodes opened and have not closed.
    guests: Arc<Mutex<Vec<Connection>>>,
}

impl Peers {
    pub(super) fn new(endpoint: Endpoint, gpu: Option<GpuSeat>) -> Self {
        Self { endpoint, inbox: CollectiveInbox::default(), gpu, guests: Arc::default() }
    }

    /// How a rank of this node joins its run's collectives.
    pub(super) fn join(&self) -> Join {
        let (peers, runtime) = (self.clone(), Handle::current());
        Arc::new(move |formation| {
            let set = RankSet {
                cluster: peers.endpoint.cluster(),
                run: formation.spec.run,
                epoch: formation.epoch,
                generation: formation.generation,
                roster: &formation.roster,
                me: formation.rank,
                gpu: peers.gpu,
            };
            let deadline = Instant::now() + JOIN_DEADLINE;
            collective::join(set, &peers.endpoint, &peers.inbox, runtime.clone(), deadline)
                .map_err(|error| failure(formation.spec.run, &error))
        })
    }

    /// Has nothing to do any more with nodes under certificates that were issued up to then.
    pub(super) fn refuse(&self, nodes: Vec<(String, u64)>) {
        let revocation = |(name, upto)| Revocation { role: Role::Node, name, upto };
        let revoked: Vec<Revocation> = nodes.into_iter().map(revocation).collect();
        for guest in &*self.guests() {
            let concerns =
                |r: &&Revocation| guest.proof().is_some_and(|proof| r.concerns(guest.peer(), proof));
            if let Some(revocation) = revoked.iter().find(concerns) {
                guest.shut_out(&revocation.to_string());
            }
        }
        self.endpoint.refuse(revoked);
    }

    fn guests(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes other nodes' connections until the endpoint is closed.
    pub(super) async fn accept(self) {
        while let Some(connection) = self.endpoint.accept().await {
            if connection.peer().role == Role::Node {
                // The transport bounds connections and their streams.
                let (inbox, guests) = (self.inbox.clone(), self.guests.clone());
                tokio::spawn(take_streams(connection, inbox, guests));
            } else {
                connection.close("a node takes connections of nodes only");
            }
        }
    }
}

/// What the coordinator makes of it: `ResourceExhausted` would be the same for any rank set, so the operation fails;
/// otherwise the next one may do better, and only after several the operation is given up.
fn failure(run: RunId, error: &JoinError) -> Failure {
    let (kind, blame) = match error {
        JoinError::Roster { .. } => (ErrorKind::Internal, Blame::Environment),
        JoinError::Deadline { missing } | JoinError::Lost { missing, .. } => {
            (ErrorKind::Unavailable, Blame::Peer(*missing))
        }
        JoinError::NoNccl { .. } => (ErrorKind::Unavailable, Blame::Environment),
        JoinError::System { .. } => (ErrorKind::ResourceExhausted, Blame::Environment),
    };
    let problem = format!("the ranks of {run} did not meet: {error}");
    Failure { error: OperationError::new(kind, problem), blame }
}

async fn take_streams(connection: Connection, inbox: CollectiveInbox, guests: Arc<Mutex<Vec<Connection>>>) {
    let lock = || guests.lock().unwrap_or_else(PoisonError::into_inner);
    lock().push(connection.clone());
    while let Ok(mut stream) = connection.accept_stream().await {
        let (inbox, peer) = (inbox.clone(), connection.peer().clone());
        tokio::spawn(async move {
            match tokio::time::timeout(OPEN_DEADLINE, open(&mut stream)).await {
                Ok(Ok(key)) => inbox.deliver(key, stream),
                Ok(Err(reason)) => {
                    tracing::warn!(%peer, %reason, "a stream of another node is no collective")
                }
                Err(_) => tracing::warn!(%peer, "another node opened a stream and said nothing"),
            }
        });
    }
    lock().retain(|guest| !guest.is_same(&connection));
}

async fn open(stream: &mut Stream) -> Result<StreamKey, String> {
    let frame = stream.recv.recv_frame(MAX_MESSAGE).await.map_err(|e| e.to_string())?;
    let frame = frame.ok_or("it is empty")?;
    match decode("opening of a stream", &frame, MAX_MESSAGE).map_err(|e| e.to_string())? {
        StreamOpen::Collective { run, epoch, generation, from, to } => {
            Ok(StreamKey { run, epoch, generation, from, to })
        }
        other => Err(format!("it opens with {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        collective::Reduction,
        protocol::{Epoch, Generation, NodeId, OpToken, OperationSeq, RankIndex, RankSeat, RunSpec},
        trainer::Formation,
        transport::MemoryNetwork,
        types::LoraConfig,
    };

    /// One rank on each endpoint, on hosts that share no memory, or all on one.
    fn formation(endpoints: &[Endpoint], rank: u32, apart: bool) -> Formation {
        let seat = |(i, endpoint): (usize, &Endpoint)| RankSeat {
            rank: RankIndex(i as u32),
            node: NodeId(i as u32),
            slot: 0,
            host: if apart { format!("host-{i}") } else { "host".to_owned() },
            address: endpoint.local_address(),
        };
        Formation {
            spec: RunSpec {
                run: RunId(1),
                base_model: "tiny".to_owned(),
                max_seq_len: 8,
                micro_batch_tokens: 8,
                lora: LoraConfig::new(1, 0),
            },
            epoch: Epoch(1),
            generation: Generation(1),
            rank: RankIndex(rank),
            roster: endpoints.iter().enumerate().map(seat).collect(),
            restore: None,
        }
    }

    /// NCCL may start the next time, and it is nobody's fault: no two nodes are kept apart for it.
    #[test]
    fn ranks_without_the_sum_they_promised_may_try_again() {
        let reason = "rank 1: ncclCommInitRankConfig: unhandled system error".to_owned();
        let Failure { error, blame } = failure(RunId(3), &JoinError::NoNccl { reason });
        assert_eq!((error.kind, blame), (ErrorKind::Unavailable, Blame::Environment));
        assert!(error.message.contains("run-3") && error.message.contains("rank 1: nccl"), "{error}");
    }

    #[test]
    fn ranks_of_different_hosts_meet_through_their_nodes() {
        meet(true, None);
    }

    /// No machine that tests run on has this GPU, or a program without NCCL could not use it: all ranks hear so
    /// of each other, and meet all the same.
    #[test]
    fn ranks_on_gpus_without_nccl_meet_through_the_host() {
        for apart in [true, false] {
            meet(apart, Some(GpuSeat { ordinal: 4_000, reduction: Reduction::Fast, required: false }));
        }
    }

    fn meet(apart: bool, gpu: Option<GpuSeat>) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let _guard = runtime.enter();
        let network = MemoryNetwork::default();
        let endpoints: Vec<Endpoint> = ["a", "b", "c"]
            .map(|name| Endpoint::memory(&network, Role::Node, name).unwrap())
            .into_iter()
            .collect();
        let token = OpToken {
            run: RunId(1),
            epoch: Epoch(1),
            generation: Generation(1),
            seq: OperationSeq(1),
            incarnation: 1,
        };
        let ranks: Vec<_> = endpoints
            .iter()
            .enumerate()
            .map(|(i, endpoint)| {
                let peers = Peers::new(endpoint.clone(), gpu);
                let (join, formation) = (peers.join(), formation(&endpoints, i as u32, apart));
                runtime.spawn(peers.accept());
                std::thread::spawn(move || {
                    let mut collective = join(&formation).unwrap();
                    let deadline = Instant::now() + Duration::from_secs(60);
                    collective.all_gather(token, vec![i as u8], deadline).unwrap()
                })
            })
            .collect();
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), [[0], [1], [2]]);
        }
    }
}

//! A node process: connects to the coordinator and hosts the trainer ranks and sampler
//! replicas of one machine.
//!
//! ```text
//!   coordinator ◄── control stream ──► session ──► NodeActor ──► TrainerRank 0..N ── rank threads
//!        ▲  │                                        │  ▲   └──► SamplerReplica 0..M
//!        │  └── Generate (a stream a request) ───────┘  │
//!        └───── GetBlob / PutBlob (a stream a blob) ◄───┴── BlobClient, with a bounded cache
//!   other nodes' ranks ── Collective (a stream a peer) ──► the ranks' collectives
//! ```
//!
//! The node decides nothing about a run: it routes, and answers for its ranks and replicas
//! together. It survives the coordinator: losing the connection drops every run, and a fresh
//! hello under the same name gets what the coordinator then seats here.

mod actor;
mod error;
mod state;

mod blobs;
mod generate;
mod memory;
mod peers;
mod session;

use std::{path::PathBuf, pin::pin, sync::Arc, time::Duration};

pub use error::NodeError;

use crate::{
    collective::GpuSeat,
    kernels::{self, CoreBudget},
    model::{ComputeOptions, Library, ModelSource},
    transport::Endpoint,
};

use self::{
    actor::{NodeActor, Parts},
    blobs::BlobClient,
    memory::Memory,
    peers::Peers,
    session::Sessions,
};

/// What a node is started with.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Unique in the cluster; a node that comes back under its name replaces the lost one.
    pub name: String,
    /// Address of the coordinator.
    pub coordinator: String,
    /// Where other nodes reach it, if not where its endpoint listens.
    pub advertise: Option<String>,
    pub trainers: u32,
    pub samplers: u32,
    /// Cores to compute on.
    pub threads: usize,
    pub models: Vec<ModelSource>,
    pub compute: ComputeOptions,
    /// Where digests of model files are remembered, so that a start doesn't read gigabytes to hash them again, and
    /// weights are packed, which all nodes of a machine that have the same one share.
    pub cache: Option<PathBuf>,
}

/// How long a node that is told to stop waits for the requests it is generating for.
const DRAIN: Duration = Duration::from_secs(10);

/// Runs a node on `endpoint` until `shutdown` resolves or the coordinator says so. Reconnects
/// with back-off while the coordinator is away. Must run inside an actix system.
///
/// Fails at once if a model can't be described, or if the coordinator is of another cluster;
/// and with [`NodeError::Died`] when a rank or replica has panicked. Its threads may then be in
/// any state: the binary must abort, an embedder give the node up.
pub async fn serve(
    config: NodeConfig,
    endpoint: Endpoint,
    shutdown: impl Future<Output = ()>,
) -> Result<(), NodeError> {
    let (sources, options, cache) = (config.models.clone(), config.compute, config.cache.clone());
    let open = move || match cache {
        Some(cache) => Library::open_cached(sources, options, &cache),
        None => Library::open(sources, options),
    };
    let library = tokio::task::spawn_blocking(open)
        .await
        .map_err(|panic| NodeError::Died { what: panic.to_string() })??;
    let library = Arc::new(library);
    tracing::info!(kernels = kernels::path(), numerics = library.engine(), dtype = %config.compute.dtype, "computes");
    if let Some(Err(reason)) = kernels::amx() {
        tracing::info!("the AMX of this CPU is not used: {reason}");
    }
    let blobs = BlobClient::new(tokio::runtime::Handle::current());

    let (death, mut deaths) = tokio::sync::mpsc::channel(1);
    let on_death = Arc::new(move |what: &str| {
        tracing::error!("{what}");
        // Only the first matters: the node ends with it.
        let _ = death.try_send(what.to_owned());
    });
    let stop = Arc::new(tokio::sync::Notify::new());
    let peers = Peers::new(endpoint.clone(), gpu_seat(&library));
    let limits = Memory::of_node(library.gpu(), config.samplers).replicas;
    let node = NodeActor::launch(Parts {
        config: &config,
        library: library.clone(),
        cores: CoreBudget::new(config.threads),
        blobs: blobs.clone(),
        join: peers.join(),
        limits,
        stop: stop.clone(),
        on_death,
    })
    .map_err(|source| NodeError::Thread { source })?;
    let _accepting = AbortOnDrop(tokio::spawn(peers.clone().accept()));

    let mut shutdown = pin!(shutdown);
    let mut connected = pin!(Sessions::new(config, endpoint, library, blobs, peers, node.clone()).keep());
    let outcome = tokio::select! {
        () = &mut shutdown => Ok(()),
        () = stop.notified() => Ok(()),
        Some(what) = deaths.recv() => Err(NodeError::Died { what }),
        error = &mut connected => Err(error),
    };
    if outcome.is_ok() {
        // The connection stays up meanwhile: answers still go out over it.
        tokio::select! {
            () = actor::drain(&node, DRAIN) => {}
            _ = &mut connected => {}
        }
    }
    // Ranks and replicas stop with their addresses, and their threads with them.
    let _ = node.send(actor::Stop).await;
    outcome
}

/// Where the node's ranks compute, if NCCL may be able to reach it.
fn gpu_seat(library: &Library) -> Option<GpuSeat> {
    let ordinal = library.gpu()?.ordinal()?;
    Some(GpuSeat { ordinal, reduction: library.options().reduction, required: false })
}

/// A task that ends with whoever started it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};

use crate::{
    client::{Connector, ServiceClient},
    coordinator::{self, CoordinatorConfig},
    model::{ComputeOptions, ModelSource},
    node::{self, NodeConfig},
    transport::{Endpoint, MemoryNetwork, Role},
};

use super::{ServiceError, share::Share};

/// Longest that the nodes of an embedded cluster may take to join: they read the models'
/// digests first.
const JOIN_DEADLINE: Duration = Duration::from_secs(120);

/// What an embedded cluster is made of.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Journal and blobs; runs are found again there.
    pub data_dir: PathBuf,
    pub models: Vec<ModelSource>,
    /// Nodes that trainers and samplers are spread over.
    pub nodes: u32,
    pub trainers: u32,
    pub samplers: u32,
    /// Cores to compute on, over all nodes.
    pub threads: usize,
    pub compute: ComputeOptions,
}

/// A whole cluster inside this process: the same actors as in a distributed one, over the
/// in-memory twin of the transport, on threads of its own.
///
/// Dropping it drains and stops it.
pub struct Cluster {
    connector: Connector,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<Result<(), ServiceError>>>,
}

impl Cluster {
    /// Starts a cluster and returns once all its nodes have joined. Blocks; from an async task
    /// call it through `spawn_blocking`.
    pub fn local(config: ClusterConfig) -> Result<Self, ServiceError> {
        let (stop, stopping) = watch::channel(false);
        let (started, bound) = oneshot::channel();
        let nodes = config.nodes.max(1) as usize;
        let thread = std::thread::Builder::new()
            .name("lockstep-control".into())
            .spawn(move || run(config, stopping, started))
            .map_err(|source| ServiceError::Start { what: "the cluster's thread".into(), source })?;
        let Ok(connector) = futures::executor::block_on(bound) else {
            // It ended before it was bound: its own error says why.
            return Err(match thread.join() {
                Ok(Err(error)) => error,
                _ => stopped("it ended while it started"),
            });
        };
        let cluster = Self { connector, stop, thread: Some(thread) };
        cluster.wait_for_nodes(nodes)?;
        Ok(cluster)
    }

    /// The way to connect a client: `ServiceClient::connect(cluster.connector())`.
    pub fn connector(&self) -> Connector {
        self.connector.clone()
    }

    /// Drains and stops the cluster, and says how that went.
    pub fn shutdown(mut self) -> Result<(), ServiceError> {
        self.stop_and_join()
    }

    fn stop_and_join(&mut self) -> Result<(), ServiceError> {
        // Nobody listens only if the thread has ended already.
        let _ = self.stop.send(true);
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(stopped("its control thread panicked")),
        }
    }

    fn wait_for_nodes(&self, nodes: usize) -> Result<(), ServiceError> {
        let client = ServiceClient::connect_blocking(self.connector())?;
        let deadline = Instant::now() + JOIN_DEADLINE;
        loop {
            let status = futures::executor::block_on(client.cluster_status())?;
            if status.nodes.len() >= nodes {
                return Ok(());
            }
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return Err(stopped("a node could not start"));
            }
            if Instant::now() > deadline {
                let seconds = JOIN_DEADLINE.as_secs();
                return Err(ServiceError::NotReady { part: "nodes".into(), seconds, hint: String::new() });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.stop_and_join() {
            tracing::error!("the embedded cluster stopped: {error}");
        }
    }
}

fn stopped(reason: &str) -> ServiceError {
    ServiceError::Refused { part: "embedded cluster".into(), reason: reason.into() }
}

/// The control thread: an actix system of its own, whatever the caller runs.
fn run(
    config: ClusterConfig,
    stopping: watch::Receiver<bool>,
    started: oneshot::Sender<Connector>,
) -> Result<(), ServiceError> {
    super::process::in_system("lockstep-control", async move {
        let network = MemoryNetwork::default();
        let coordinator = Endpoint::memory(&network, Role::Coordinator, "coordinator")?;
        let address = coordinator.local_address();
        let mut parts = vec![];
        let coordinator_config = CoordinatorConfig::new(config.data_dir.clone());
        let serve = coordinator::serve(coordinator_config, coordinator, until(stopping.clone()));
        parts.push(actix_rt::spawn(async move { serve.await.map_err(ServiceError::from) }));
        for index in 0..config.nodes.max(1) {
            let node_config = config.node(index, &address);
            let endpoint = Endpoint::memory(&network, Role::Node, &node_config.name)?;
            // Nodes stop on the coordinator's word, after it has taken snapshots.
            let serve = node::serve(node_config, endpoint, std::future::pending());
            parts.push(actix_rt::spawn(async move { serve.await.map_err(ServiceError::from) }));
        }
        let endpoint = Endpoint::memory(&network, Role::Client, "client")?;
        // Nobody waits for it only if the caller is gone; then `stopping` says so as well.
        let _ = started.send(Connector::new(endpoint, address));
        for part in parts {
            part.await.unwrap_or_else(|e| Err(stopped(&format!("an actor's task died: {e}"))))?;
        }
        Ok(())
    })
}

/// Resolves once the cluster is to stop, or its handle is gone.
async fn until(mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

impl ClusterConfig {
    fn node(&self, index: u32, coordinator: &str) -> NodeConfig {
        let share = Share::of(index, self.nodes, self.trainers, self.samplers, self.threads);
        NodeConfig {
            name: format!("node-{index}"),
            coordinator: coordinator.into(),
            advertise: None,
            trainers: share.trainers,
            samplers: share.samplers,
            threads: share.threads,
            models: self.models.clone(),
            compute: ComputeOptions { device: self.compute.device.of_node(index), ..self.compute },
            cache: Some(self.data_dir.join(super::CACHE)),
        }
    }
}

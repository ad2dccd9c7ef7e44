use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::{
    client::{ClientError, ConnectTarget, RunFollower, ServiceClient},
    gateway,
    transport::ClusterCa,
    types::WandbConfig,
};

use super::{DataDirectory, ServiceError, Supervisor, SupervisorConfig, shutdown_requested};

/// Longest that the nodes may take to join: they read the models' digests first.
const JOIN_DEADLINE: Duration = Duration::from_secs(120);

/// Longest that a gateway waits for its coordinator: launchers start both at once.
const COORDINATOR_DEADLINE: Duration = Duration::from_secs(60);

/// Between two looks whether the coordinator is there.
const COORDINATOR_POLL: Duration = Duration::from_millis(200);

/// Digits of a cluster's name that tell clusters apart on Weights & Biases.
const CLUSTER_ID: usize = 8;

/// What `lockstep up` runs.
#[derive(Debug, Clone)]
pub struct UpConfig {
    pub supervisor: SupervisorConfig,
    /// Where HTTP is served; port 0 is any.
    pub http: SocketAddr,
    pub gateway: gateway::GatewayConfig,
    /// Where the metrics of every run are streamed.
    pub wandb: Option<WandbConfig>,
}

/// Runs a gateway and a local cluster until it is told to stop; prints
/// `ready http://HOST:PORT` once all nodes have joined.
pub fn up(config: UpConfig) -> Result<(), ServiceError> {
    super::process::in_system("gateway", supervise(config))
}

async fn supervise(config: UpConfig) -> Result<(), ServiceError> {
    // First what may be refused at once: a port in use.
    let data = &config.supervisor.data;
    let listener = bind(config.http, config.gateway.clone(), data)?;
    if config.wandb.is_some() {
        RunFollower::require_package().await?;
    }
    let mut stop = std::pin::pin!(shutdown_requested()?);
    let mut supervisor = tokio::select! {
        () = &mut stop => return Ok(()),
        started = Supervisor::start(config.supervisor.clone()) => started?,
    };
    let (found, client) = oneshot::channel();
    let watching = supervisor.watchdog().watch(client);
    let mut follower = None;
    let serving = async {
        let client = wait_until_joined(data.path(), config.supervisor.nodes).await?;
        // The watchdog is gone only if all of this is.
        let _ = found.send(client.clone());
        if let Some(wandb) = config.wandb {
            let cluster = ClusterCa::open_or_create(data.path())?.cluster().to_owned();
            follower = Some(RunFollower::start(client.clone(), wandb, &cluster[..CLUSTER_ID])?);
        }
        tracing::info!("for Rust clients: ServiceClient::connect({:?})", data.path().display().to_string());
        serve(listener, client).await
    };
    let outcome = tokio::select! {
        () = &mut stop => Ok(()),
        error = supervisor.failed() => Err(error),
        ended = serving => ended,
        () = watching => Ok(()),
    };
    if let Some(follower) = follower {
        follower.finish().await;
    }
    supervisor.shutdown().await;
    outcome
}

/// What runs a gateway as a process.
pub struct GatewayProcess {
    /// Of the coordinator, or with an identity and an `endpoint` file of its own.
    pub data_dir: PathBuf,
    /// Where HTTP is served; port 0 is any.
    pub http: SocketAddr,
    pub gateway: gateway::GatewayConfig,
}

/// Runs a gateway until it is told to stop; prints `ready http://HOST:PORT` once the coordinator
/// answers.
pub fn run_gateway(process: GatewayProcess) -> Result<(), ServiceError> {
    super::process::in_system("gateway", async move {
        let data = DataDirectory::open(process.data_dir)?;
        let listener = bind(process.http, process.gateway, &data)?;
        let serving = async { serve(listener, wait_for_coordinator(data.path()).await?).await };
        tokio::select! {
            () = shutdown_requested()? => Ok(()),
            ended = serving => ended,
        }
    })
}

/// A client of the coordinator, which may be on its way.
async fn wait_for_coordinator(data_dir: &Path) -> Result<ServiceClient, ServiceError> {
    let deadline = Instant::now() + COORDINATOR_DEADLINE;
    let mut said = false;
    loop {
        match ServiceClient::connect(ConnectTarget::from(data_dir)).await {
            Ok(client) => return Ok(client),
            Err(ClientError::NoService { reason, .. } | ClientError::Unreachable { reason, .. })
                if Instant::now() < deadline =>
            {
                if !std::mem::replace(&mut said, true) {
                    tracing::info!("waiting for the coordinator of {}: {reason}", data_dir.display());
                }
                tokio::time::sleep(COORDINATOR_POLL).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A listener whose signed URLs outlive it.
fn bind(
    http: SocketAddr,
    mut config: gateway::GatewayConfig,
    data: &DataDirectory,
) -> Result<gateway::Listener, ServiceError> {
    config.presign_key.get_or_insert_with(|| data.presign_key());
    Ok(gateway::Listener::bind(http, config)?)
}

/// Serves HTTP for ever; says `ready` when it does.
async fn serve(listener: gateway::Listener, client: ServiceClient) -> Result<(), ServiceError> {
    let (scheme, address) = (listener.scheme(), listener.address());
    let server = listener.serve(client)?;
    println!("ready {scheme}://{address}");
    Ok(server.await.map_err(gateway::GatewayError::Serve)?)
}

/// A client of the service, once all its nodes are there.
pub async fn wait_until_joined(data_dir: &Path, nodes: u32) -> Result<ServiceClient, ServiceError> {
    let client = ServiceClient::connect(ConnectTarget::from(data_dir)).await?;
    let deadline = Instant::now() + JOIN_DEADLINE;
    while client.cluster_status().await?.nodes.len() < nodes.max(1) as usize {
        if Instant::now() > deadline {
            let seconds = JOIN_DEADLINE.as_secs();
            return Err(ServiceError::NotReady { part: "nodes".into(), seconds, hint: String::new() });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(client)
}

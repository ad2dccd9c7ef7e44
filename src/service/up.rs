use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    client::{ConnectTarget, ServiceClient},
    gateway,
};

use super::{ServiceError, Supervisor, SupervisorConfig, shutdown_requested};

/// Longest that the nodes may take to join: they read the models' digests first.
const JOIN_DEADLINE: Duration = Duration::from_secs(120);

/// What `lockstep up` runs.
#[derive(Debug, Clone)]
pub struct UpConfig {
    pub supervisor: SupervisorConfig,
    /// Where HTTP is served; port 0 is any.
    pub http: SocketAddr,
    pub gateway: gateway::GatewayConfig,
}

/// Runs a gateway and a local cluster until it is told to stop; prints
/// `ready http://HOST:PORT` once all nodes have joined.
pub fn up(config: UpConfig) -> Result<(), ServiceError> {
    super::process::in_system("gateway", supervise(config))
}

async fn supervise(config: UpConfig) -> Result<(), ServiceError> {
    // First what may be refused at once: a port in use.
    let mut serving = config.gateway.clone();
    serving.presign_key.get_or_insert_with(|| config.supervisor.data.presign_key());
    let listener = gateway::Listener::bind(config.http, serving)?;
    let stop = shutdown_requested()?;
    let mut supervisor = Supervisor::start(config.supervisor.clone()).await?;
    let outcome = tokio::select! {
        () = stop => Ok(()),
        error = supervisor.failed() => Err(error),
        ended = serve(listener, &config) => ended,
    };
    supervisor.shutdown().await;
    outcome
}

/// Serves HTTP for ever, once the nodes are there.
async fn serve(listener: gateway::Listener, config: &UpConfig) -> Result<(), ServiceError> {
    let data = config.supervisor.data.path();
    let client = wait_until_joined(data, config.supervisor.nodes).await?;
    let address = listener.address();
    let server = listener.serve(client)?;
    println!("ready http://{address}");
    tracing::info!("for Rust clients: ServiceClient::connect({:?})", data.display().to_string());
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

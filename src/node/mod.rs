//! A node process: connects to the coordinator and hosts the trainer ranks and sampler
//! replicas of one machine.

use crate::{model::ModelSource, transport::Endpoint};

/// What a node is started with.
pub struct NodeConfig {
    /// Unique in the cluster; a node that comes back under its name replaces the lost one.
    pub name: String,
    /// Address of the coordinator.
    pub coordinator: String,
    pub trainers: u32,
    pub samplers: u32,
    /// Cores to compute on.
    pub threads: usize,
    pub models: Vec<ModelSource>,
}

/// Runs a node on `endpoint` until `shutdown` resolves or the coordinator says so. Reconnects
/// with back-off while the coordinator is away. Must run inside an actix system.
pub async fn serve(
    config: NodeConfig,
    endpoint: Endpoint,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let _ = (config, endpoint);
    shutdown.await;
    todo!()
}

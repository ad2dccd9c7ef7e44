//! Sessions, runs, order of operations, membership, versions: decides, never computes.

use std::path::PathBuf;

use crate::transport::Endpoint;

/// What a coordinator is started with.
pub struct CoordinatorConfig {
    /// Holds the journal and the blobs.
    pub data_dir: PathBuf,
}

/// Runs a coordinator on `endpoint` until `shutdown` resolves, then drains: takes snapshots,
/// tells the nodes to stop, closes the journal. Must run inside an actix system.
pub async fn serve(
    config: CoordinatorConfig,
    endpoint: Endpoint,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let _ = (config, endpoint);
    shutdown.await;
    todo!()
}

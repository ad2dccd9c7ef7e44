use std::path::PathBuf;

use clap::Args;
use lockstep::{
    client::{ConnectTarget, ServiceClient},
    protocol::RunInfo,
};

use super::up::DATA_DIR;

/// Which service to look at.
#[derive(Args)]
pub struct Look {
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

impl Look {
    pub(super) fn connect(&self) -> anyhow::Result<ServiceClient> {
        Ok(ServiceClient::connect_blocking(ConnectTarget::from(&self.data_dir))?)
    }

    /// One line a run.
    pub fn runs(self) -> anyhow::Result<()> {
        let status = futures::executor::block_on(self.connect()?.cluster_status())?;
        for run in status.runs {
            println!("{}", line(&run));
        }
        Ok(())
    }

    /// Nodes, then runs.
    pub fn cluster(self) -> anyhow::Result<()> {
        let status = futures::executor::block_on(self.connect()?.cluster_status())?;
        for node in &status.nodes {
            println!(
                "{}  pid {}  {} trainer ranks, {} sampler replicas  {}",
                node.name, node.pid, node.trainers, node.samplers, node.numerics
            );
        }
        for run in &status.runs {
            println!("{}", line(run));
        }
        Ok(())
    }
}

fn line(run: &RunInfo) -> String {
    let live = run
        .live
        .or(run.initial)
        .map_or("nothing published".into(), |policy| format!("serves version {}", policy.step));
    format!(
        "{}  {}  rank {}  {} replicas  step {}  {live}  {} queued  {}",
        run.run, run.name, run.lora.rank, run.replicas, run.step, run.queued, run.phase
    )
}

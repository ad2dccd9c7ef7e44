use std::path::PathBuf;

use clap::Args;
use lockstep::{
    client::{ConnectTarget, ServiceClient},
    protocol::RunInfo,
    types::{CheckpointTarget, RunId},
};

use super::up::DATA_DIR;

/// Which service to look at.
#[derive(Args)]
pub struct Look {
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

#[derive(Args)]
pub struct Checkpoints {
    /// Only those of one run, `run-N`.
    #[arg(long)]
    run: Option<RunId>,
    #[command(flatten)]
    service: Look,
}

impl Look {
    fn connect(&self) -> anyhow::Result<ServiceClient> {
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

impl Checkpoints {
    pub fn run(self) -> anyhow::Result<()> {
        let client = self.service.connect()?;
        for checkpoint in futures::executor::block_on(client.list_checkpoints(self.run))? {
            let target = match checkpoint.target {
                CheckpointTarget::Trainer => "trainer",
                CheckpointTarget::Sampler => "sampler",
            };
            println!(
                "{}  {}  {target}  step {}  {} bytes",
                checkpoint.id, checkpoint.path, checkpoint.step, checkpoint.size_bytes
            );
        }
        Ok(())
    }
}

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lockstep::{
    client::{ConnectTarget, ServiceClient},
    protocol::RunInfo,
    types::{CheckpointTarget, RunId},
};

use super::up::{DATA_DIR, all_cores};

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

/// What this machine has and what Lockstep makes of it.
pub fn doctor() -> anyhow::Result<()> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|name| name.trim_matches([' ', '\t', ':']));
    println!("lockstep {}", env!("CARGO_PKG_VERSION"));
    println!("cpu      {} ({} cores)", cpu.unwrap_or("unknown"), all_cores());
    println!("kernels  {} (f32)", lockstep::kernels::path());
    println!("memory   {}", memory().context("the memory of this machine is not known")?);
    println!("gpu      not built in (this binary computes on the CPU)");
    Ok(())
}

fn memory() -> Option<String> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |field: &str| -> Option<f64> {
        info.lines().find_map(|line| line.strip_prefix(field))?.trim().trim_end_matches(" kB").parse().ok()
    };
    let gib = |kib: f64| kib / (1 << 20) as f64;
    Some(format!("{:.1} GiB, {:.1} available", gib(kib("MemTotal:")?), gib(kib("MemAvailable:")?)))
}

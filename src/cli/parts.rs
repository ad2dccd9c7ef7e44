use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use lockstep::{
    node::NodeConfig,
    service::{run_coordinator, run_node},
};

use super::up::{DATA_DIR, all_cores, parse_models};

#[derive(Args)]
pub struct Coordinator {
    /// Where it listens (QUIC); port 0 is any.
    #[arg(long, default_value = "127.0.0.1:0", env = "LOCKSTEP_LISTEN")]
    listen: SocketAddr,
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

#[derive(Args)]
pub struct Node {
    /// Unique in the cluster; a node that comes back under its name replaces the lost one.
    #[arg(long, env = "LOCKSTEP_NODE_NAME")]
    name: String,
    /// HOST:PORT of the coordinator.
    #[arg(long, env = "LOCKSTEP_COORDINATOR")]
    coordinator: String,
    /// Where it listens for other nodes (QUIC); port 0 is any.
    #[arg(long, default_value = "127.0.0.1:0", env = "LOCKSTEP_NODE_LISTEN")]
    listen: SocketAddr,
    /// Trainer ranks that it holds.
    #[arg(long, default_value_t = 1)]
    trainers: u32,
    /// Sampler replicas that it runs.
    #[arg(long, default_value_t = 1)]
    samplers: u32,
    /// Cores to compute on; by default all of this machine.
    #[arg(long)]
    threads: Option<usize>,
    /// A model to serve, as NAME=PATH. Repeatable.
    #[arg(long = "model", value_name = "NAME=PATH", required = true)]
    models: Vec<String>,
    /// Holds the certificates in `identity/`.
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

impl Coordinator {
    pub fn run(self) -> anyhow::Result<()> {
        Ok(run_coordinator(self.data_dir, self.listen)?)
    }
}

impl Node {
    pub fn run(self) -> anyhow::Result<()> {
        let config = NodeConfig {
            name: self.name,
            coordinator: self.coordinator,
            trainers: self.trainers,
            samplers: self.samplers,
            threads: self.threads.unwrap_or_else(all_cores).max(1),
            models: parse_models(&self.models)?,
        };
        Ok(run_node(config, self.data_dir, self.listen)?)
    }
}

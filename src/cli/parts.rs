use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use lockstep::{
    join::JoinToken,
    node::NodeConfig,
    service::{
        CACHE, CoordinatorProcess, GatewayProcess, NodeProcess, Placement, run_coordinator, run_gateway,
        run_node,
    },
    store::BucketLocation,
};

use super::{
    arguments::{DATA_DIR, HISTORY, all_cores, cores, parse_models, span},
    compute::Compute,
    http::Http,
};

#[derive(Args)]
pub struct Coordinator {
    /// Where it listens (QUIC); port 0 is any.
    #[arg(long, default_value = "127.0.0.1:0", env = "LOCKSTEP_LISTEN")]
    listen: SocketAddr,
    /// Where nodes of other machines show their token (`lockstep token create`); by default none
    /// can join.
    #[arg(long, env = "LOCKSTEP_JOIN_LISTEN")]
    join_listen: Option<SocketAddr>,
    /// Snapshots of each run that are kept to go back to, as long as those of all runs fit into 10 GiB.
    #[arg(long, default_value_t = HISTORY, env = "LOCKSTEP_HISTORY", value_parser = clap::value_parser!(u32).range(1..=1024))]
    history: u32,
    #[command(flatten)]
    store: Store,
    #[command(flatten)]
    certificates: Certificates,
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

/// How processes prove who they are.
#[derive(Args, Clone)]
pub struct Certificates {
    /// How long the certificates of processes are good: a number and s, m, h or d, at least 10s. Processes get new
    /// ones by themselves when two thirds are over.
    #[arg(long = "certificate-life", value_name = "SPAN", default_value = "90d", env = "LOCKSTEP_CERTIFICATE_LIFE", value_parser = certificate_life)]
    pub life: Duration,
}

fn certificate_life(text: &str) -> anyhow::Result<Duration> {
    let life = span(text)?;
    let (least, most) = (Duration::from_secs(10), Duration::from_secs(3_650 * 86_400));
    anyhow::ensure!((least..=most).contains(&life), "must be 10s to 3650d, got {text}");
    Ok(life)
}

/// Where blobs are kept.
#[derive(Args, Clone)]
pub struct Store {
    /// Keep payloads, snapshots and checkpoints in an S3-compatible bucket (s3://BUCKET/PREFIX) instead of the
    /// data directory, which then remembers it. Reached as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION
    /// and AWS_ENDPOINT_URL say.
    #[arg(long, value_name = "URL", env = "LOCKSTEP_STORE", value_parser = str::parse::<BucketLocation>)]
    pub store: Option<BucketLocation>,
}

#[derive(Args)]
pub struct Gateway {
    #[command(flatten)]
    http: Http,
    /// The coordinator's.
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
}

#[derive(Args)]
pub struct Node {
    /// Unique in the cluster; a node that comes back under its name replaces the lost one. By default
    /// from what a launcher set (--print-env shows it).
    #[arg(long, env = "LOCKSTEP_NODE_NAME")]
    name: Option<String>,
    /// HOST:PORT of the coordinator.
    #[arg(long, env = "LOCKSTEP_COORDINATOR")]
    coordinator: Option<String>,
    /// Gets this node a certificate at its first start (`lockstep token create`).
    #[arg(long, env = "LOCKSTEP_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// HOST:PORT where the token is shown; by default the port after the coordinator's.
    #[arg(long, env = "LOCKSTEP_JOIN")]
    join: Option<String>,
    /// Where it listens for other nodes (QUIC); by default any port of the address from which the
    /// coordinator is reached.
    #[arg(long, env = "LOCKSTEP_NODE_LISTEN")]
    listen: Option<SocketAddr>,
    /// Where other nodes reach it, if not where it listens (HOST:PORT).
    #[arg(long, env = "LOCKSTEP_ADVERTISE")]
    advertise: Option<String>,
    /// Trainer ranks that it holds.
    #[arg(long, default_value_t = 1, env = "LOCKSTEP_TRAINERS", value_parser = clap::value_parser!(u32).range(0..=1024))]
    trainers: u32,
    /// Sampler replicas that it runs.
    #[arg(long, default_value_t = 1, env = "LOCKSTEP_SAMPLERS", value_parser = clap::value_parser!(u32).range(0..=1024))]
    samplers: u32,
    /// Cores to compute on; by default all of this machine.
    #[arg(long, value_parser = cores())]
    threads: Option<usize>,
    /// A model to serve, as NAME=PATH. Repeatable.
    #[arg(long = "model", value_name = "NAME=PATH", required_unless_present = "print_env")]
    models: Vec<String>,
    #[command(flatten)]
    compute: Compute,
    /// Holds the certificates in `identity/`.
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    data_dir: PathBuf,
    /// Packed weights, which all nodes of this machine that have this directory share in memory; by default `cache` in
    /// the data directory.
    #[arg(long, env = "LOCKSTEP_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    /// Says what this node takes from its flags and environment, and ends.
    #[arg(long)]
    print_env: bool,
}

impl Coordinator {
    pub fn run(self) -> anyhow::Result<()> {
        Ok(run_coordinator(CoordinatorProcess {
            data_dir: self.data_dir,
            listen: self.listen,
            join: self.join_listen,
            history: self.history,
            store: self.store.store,
            certificate_life: self.certificates.life,
        })?)
    }
}

impl Gateway {
    pub fn run(self) -> anyhow::Result<()> {
        let process =
            GatewayProcess { data_dir: self.data_dir, http: self.http.address, gateway: self.http.config()? };
        Ok(run_gateway(process)?)
    }
}

impl Node {
    pub fn run(self) -> anyhow::Result<()> {
        let placement = Placement::new(self.name, self.coordinator, |name| std::env::var(name).ok());
        if self.print_env {
            println!("{placement}");
            return Ok(());
        }
        let name = placement.name.context(
            "this node has no name: give --name, or start it with a launcher that numbers its processes",
        )?;
        let coordinator = placement.coordinator.context("which coordinator? give --coordinator HOST:PORT")?;
        let join = match &self.token {
            None => None,
            Some(token) => {
                let token: JoinToken = token.parse()?;
                let address = match self.join {
                    Some(address) => address,
                    None => next_port(&coordinator.value)?,
                };
                Some((address, token))
            }
        };
        let config = NodeConfig {
            name: name.value,
            coordinator: coordinator.value,
            advertise: self.advertise,
            trainers: self.trainers,
            samplers: self.samplers,
            threads: self.threads.unwrap_or_else(all_cores),
            models: parse_models(&self.models)?,
            compute: self.compute.options(),
            cache: Some(self.cache_dir.unwrap_or_else(|| self.data_dir.join(CACHE))),
        };
        Ok(run_node(NodeProcess { config, data_dir: self.data_dir, listen: self.listen, join })?)
    }
}

/// HOST:PORT with the port after it.
fn next_port(address: &str) -> anyhow::Result<String> {
    let (host, port) = address.rsplit_once(':').context("--coordinator must be HOST:PORT")?;
    let port: u16 = port.parse().context("--coordinator must be HOST:PORT")?;
    Ok(format!("{host}:{}", port.checked_add(1).context("no port follows 65535; give --join")?))
}

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use lockstep::{
    model::ModelSource,
    pull,
    service::{DataDirectory, SupervisorConfig, UpConfig, up},
    transport::CERTIFICATE_LIFE,
    types::WandbConfig,
};

use super::{
    LogFormat,
    arguments::{DATA_DIR, HISTORY, all_cores, cores, parse_models},
    compute::Compute,
    http::Http,
    parts::{Certificates, Store},
};

#[derive(Args)]
pub struct Up {
    #[command(flatten)]
    http: Http,
    /// Where the coordinator listens (QUIC); port 0 is any.
    #[arg(long, default_value = "127.0.0.1:0", env = "LOCKSTEP_LISTEN")]
    listen: SocketAddr,
    /// Where nodes of other machines show their token (`lockstep token create`); by default none can join.
    #[arg(long, env = "LOCKSTEP_JOIN_LISTEN")]
    join_listen: Option<SocketAddr>,
    /// Snapshots of each run that are kept to go back to, as long as those of all runs fit into 10 GiB.
    #[arg(long, default_value_t = HISTORY, env = "LOCKSTEP_HISTORY", value_parser = clap::value_parser!(u32).range(1..=1024))]
    history: u32,
    /// Stream the metrics of every run to this project on Weights & Biases, whatever client trains it. Needs
    /// `python3` with the package `wandb`.
    #[arg(long, value_name = "PROJECT", env = "LOCKSTEP_WANDB_PROJECT")]
    wandb_project: Option<String>,
    /// User or team of that project, if not the one that is logged in.
    #[arg(long, value_name = "ENTITY", requires = "wandb_project", env = "LOCKSTEP_WANDB_ENTITY")]
    wandb_entity: Option<String>,
    #[command(flatten)]
    store: Store,
    #[command(flatten)]
    certificates: Certificates,
    #[command(flatten)]
    cluster: LocalCluster,
}

/// A cluster on this machine.
#[derive(Args)]
pub struct LocalCluster {
    /// Trainer ranks, over all nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub trainers: u32,
    /// Sampler replicas, over all nodes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub samplers: u32,
    /// Node processes. They share one copy of the base weights, mapped from DATA/cache.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub nodes: u32,
    /// Cores to compute on, over all nodes; by default all of this machine.
    #[arg(long, value_parser = cores())]
    pub threads: Option<usize>,
    /// A model to serve, as NAME=PATH: a Hugging Face directory or a GGUF file. Repeatable; by
    /// default those that `lockstep model pull` fetched.
    #[arg(long = "model", value_name = "NAME=PATH")]
    pub models: Vec<String>,
    #[command(flatten)]
    pub compute: Compute,
    #[arg(long, default_value = DATA_DIR, env = "LOCKSTEP_DATA_DIR")]
    pub data_dir: PathBuf,
}

impl Up {
    pub fn run(self, log_format: LogFormat) -> anyhow::Result<()> {
        let wandb =
            self.wandb_project.map(|project| WandbConfig { entity: self.wandb_entity, project, name: None });
        wandb.as_ref().map_or(Ok(()), WandbConfig::validate).context("--wandb-project")?;
        let config = UpConfig {
            wandb,
            supervisor: SupervisorConfig {
                join: self.join_listen,
                history: self.history,
                store: self.store.store,
                certificate_life: self.certificates.life,
                ..self.cluster.supervisor(self.listen, false, log_format)?
            },
            http: self.http.address,
            gateway: self.http.config()?,
        };
        Ok(up(config)?)
    }
}

impl LocalCluster {
    /// The processes of this cluster.
    pub fn supervisor(
        &self,
        listen: SocketAddr,
        logs_to_files: bool,
        log_format: LogFormat,
    ) -> anyhow::Result<SupervisorConfig> {
        if self.trainers == 0 && self.samplers == 0 {
            bail!("--trainers 0 --samplers 0 leaves nothing to run");
        }
        let data = DataDirectory::open(&self.data_dir)?;
        let models = self.models(&data)?;
        Ok(SupervisorConfig {
            program: std::env::current_exe().context("this program's own path is not known")?,
            data,
            listen,
            join: None,
            history: HISTORY,
            store: None,
            certificate_life: CERTIFICATE_LIFE,
            nodes: self.nodes,
            trainers: self.trainers,
            samplers: self.samplers,
            threads: self.threads.unwrap_or_else(all_cores),
            models,
            compute: self.compute.options(),
            logs_to_files,
            log_format: log_format.name().to_owned(),
        })
    }

    fn models(&self, data: &DataDirectory) -> anyhow::Result<Vec<ModelSource>> {
        let models = match self.models.is_empty() {
            true => pull::installed(data.path()),
            false => parse_models(&self.models)?,
        };
        if models.is_empty() {
            bail!(
                "no model: fetch one with `lockstep model pull smollm2-135m --data-dir {}`, or give --model NAME=PATH",
                data.path().display()
            );
        }
        Ok(models)
    }
}

//! The command line: one file a family of subcommands, each parsing into the configuration
//! of the room that does the work.

mod arguments;
mod backup;
mod bench;
mod checkpoints;
mod cluster;
mod compute;
mod doctor;
mod http;
pub mod log;
mod look;
mod model;
mod parts;
mod quickstart;
mod runs;
mod token;
mod trace;
mod up;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use lockstep::service::{EXIT_REFUSED, ServiceError};

use log::LogFormat;

/// Open, self-hosted training service for language models.
#[derive(Parser)]
#[command(version, propagate_version = true, args_override_self = true)]
pub struct Cli {
    /// Say more on stderr; twice for everything. LOCKSTEP_LOG overrides (tracing's filter syntax).
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Form of the log on stderr: for people, or one JSON object a line, with each request and operation.
    #[arg(long, global = true, value_enum, default_value_t, env = "LOCKSTEP_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// Compute with these kernels instead of the fastest that this machine has: a common path for all nodes of a
    /// cluster, which share runs only if they have the same. `lockstep doctor` lists them.
    #[arg(long, global = true, env = "LOCKSTEP_KERNELS")]
    kernels: Option<String>,
    /// Record where the time goes in a file for each process in this directory, which Perfetto opens.
    #[arg(long, global = true, env = trace::TRACE, value_name = "DIR")]
    trace: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch a small real model, train it on this machine with a verifiable reward, show the curve.
    Quickstart(quickstart::Quickstart),
    /// Run gateway, coordinator and nodes on this machine.
    Up(Box<up::Up>),
    /// Run a coordinator alone.
    Coordinator(parts::Coordinator),
    /// Run a gateway alone: HTTP for a coordinator on this machine.
    Gateway(parts::Gateway),
    /// Run a node alone: trainer ranks and sampler replicas of one machine.
    Node(parts::Node),
    /// Let nodes of other machines into a cluster.
    #[command(subcommand)]
    Token(token::Token),
    /// Fetch and list models.
    #[command(subcommand)]
    Model(model::Model),
    /// List the runs of a service, compute a part of one again, or begin another where one stood.
    Runs(runs::Runs),
    /// List, export, verify, import and merge checkpoints.
    Checkpoints(checkpoints::Checkpoints),
    /// Show the nodes of a service and what they do, or drain one.
    Cluster(cluster::Cluster),
    /// Copy what a running coordinator keeps.
    Backup(backup::Backup),
    /// Say what this machine has and what Lockstep makes of it.
    Doctor(doctor::Doctor),
    #[command(subcommand)]
    Bench(bench::Bench),
}

impl Command {
    /// Of the part that this process is.
    fn name(&self) -> &'static str {
        match self {
            Self::Coordinator(_) => "coordinator",
            Self::Gateway(_) => "gateway",
            Self::Node(_) => "node",
            Self::Up(_) => "up",
            _ => "lockstep",
        }
    }
}

impl Cli {
    /// Does what was asked.
    pub fn run(self) -> anyhow::Result<()> {
        if let Some(path) = self.kernels.filter(|path| !lockstep::kernels::choose_path(path)) {
            let have = lockstep::kernels::paths().join(", ");
            match lockstep::kernels::amx() {
                Some(Err(reason)) if path.starts_with("amx") => {
                    anyhow::bail!("--kernels {path}: this machine has {have}; its AMX is not used: {reason}")
                }
                _ => anyhow::bail!("--kernels {path}: this machine has {have}"),
            }
        }
        match self.command {
            Command::Quickstart(quickstart) => quickstart.run(self.log_format),
            Command::Up(up) => up.run(self.log_format),
            Command::Coordinator(coordinator) => coordinator.run(),
            Command::Gateway(gateway) => gateway.run(),
            Command::Node(node) => node.run(),
            Command::Token(token) => token.run(),
            Command::Model(model) => model.run(),
            Command::Runs(runs) => runs.run(),
            Command::Checkpoints(checkpoints) => checkpoints.run(),
            Command::Cluster(cluster) => cluster.run(),
            Command::Backup(backup) => backup.run(),
            Command::Doctor(doctor) => doctor.run(),
            Command::Bench(bench) => bench.run(),
        }
    }
}

/// A refusal that starting again would not change is told apart, for supervisors.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    let refused = error.downcast_ref::<ServiceError>().is_some_and(ServiceError::is_final);
    ExitCode::from(if refused { EXIT_REFUSED } else { 1 })
}

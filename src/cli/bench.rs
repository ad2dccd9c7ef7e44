use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use lockstep::bench::{self, AllReduceConfig, AllReduceReport, AllReduceResult, Carrier, WorkerKind};

/// Measure this machine, Lockstep on it, and its peers.
#[derive(Subcommand)]
pub enum Bench {
    /// All-reduce between processes of this machine, over shared memory and QUIC.
    #[command(name = "allreduce")]
    AllReduce(AllReduce),
    #[command(hide = true)]
    Worker(Worker),
}

#[derive(Args)]
pub struct AllReduce {
    /// Sizes of the vector, in MB (10^6 bytes).
    #[arg(long, value_delimiter = ',', default_values_t = [16, 64, 336])]
    mb: Vec<u64>,
    /// Numbers of processes.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    processes: Vec<u32>,
    /// What carries it.
    #[arg(long, value_delimiter = ',', default_value = "shm,quic")]
    carrier: Vec<CarrierName>,
    /// Of each figure, after one that is not counted; the median is shown.
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// A Python with torch: measures gloo beside it.
    #[arg(long, env = "LOCKSTEP_PEERS_PYTHON")]
    python: Option<PathBuf>,
    /// One line of JSON instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum CarrierName {
    Shm,
    Quic,
}

#[derive(Args)]
pub struct Worker {
    kind: WorkerName,
    name: String,
    directory: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum WorkerName {
    Rank,
    Bulk,
}

impl Bench {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::AllReduce(all_reduce) => all_reduce.run(),
            Self::Worker(worker) => worker.run(),
        }
    }
}

impl AllReduce {
    fn run(self) -> anyhow::Result<()> {
        let carriers = self.carrier.iter().map(|carrier| match carrier {
            CarrierName::Shm => Carrier::SharedMemory,
            CarrierName::Quic => Carrier::Quic,
        });
        let config = AllReduceConfig {
            program: std::env::current_exe()?,
            megabytes: self.mb,
            processes: self.processes,
            carriers: carriers.collect(),
            repeats: self.repeats,
            python: self.python,
        };
        if self.json {
            let report = bench::all_reduce(&config, |_| {})?;
            println!("{}", serde_json::to_string(&report)?);
            return Ok(());
        }
        println!(
            "{:<14} {:>9} {:>6} {:>10} {:>16} {:>14} {:>10}",
            "carrier", "processes", "MB", "ms", "(range)", "moved MB/s", "CPU s/GB"
        );
        let report = bench::all_reduce(&config, |row| println!("{}", line(row)))?;
        println!("{}", limits(&report));
        Ok(())
    }
}

fn line(row: &AllReduceResult) -> String {
    let carrier = match row.carrier {
        Carrier::SharedMemory => "shared memory",
        Carrier::Quic => "QUIC",
        Carrier::Gloo => "gloo (TCP)",
    };
    let range = format!("{:.1} to {:.1}", row.seconds_min * 1e3, row.seconds_max * 1e3);
    format!(
        "{carrier:<14} {:>9} {:>6} {:>10.1} {range:>16} {:>14.0} {:>10.2}",
        row.processes,
        row.megabytes,
        row.seconds * 1e3,
        row.moved_mb_per_s,
        row.cpu_s_per_gb
    )
}

fn limits(report: &AllReduceReport) -> String {
    let mut said = format!(
        "memcpy: {:.1} GB/s with one thread, {:.1} with all",
        report.memcpy.one_thread_gb_per_s, report.memcpy.all_threads_gb_per_s
    );
    if let Some(bulk) = report.quinn_bulk {
        said += &format!(
            "\nquinn's bulk transfer: {:.0} MB/s one way, {:.0} both ways together, {:.2} CPU s/GB",
            bulk.one_way_mb_per_s, bulk.both_ways_mb_per_s, bulk.cpu_s_per_gb
        );
    }
    format!("{said}\n{}", report.machine)
}

impl Worker {
    fn run(self) -> anyhow::Result<()> {
        let kind = match self.kind {
            WorkerName::Rank => WorkerKind::Rank,
            WorkerName::Bulk => WorkerKind::Bulk,
        };
        Ok(bench::run_worker(kind, &self.name, &self.directory)?)
    }
}

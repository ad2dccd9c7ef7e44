//! What is measured between processes: the collective, publishing, the gateway.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lockstep::bench::{
    self, AllReduceConfig, AllReduceReport, AllReduceResult, Carrier, GatewayConfig, PublishConfig,
    WorkerKind,
};

use super::{
    super::arguments::{all_cores, cores},
    print_line,
};

#[derive(Args)]
pub struct AllReduce {
    /// Sizes of the vector, in MB (10^6 bytes).
    #[arg(long, value_delimiter = ',', default_values_t = [16, 64, 336])]
    mb: Vec<u64>,
    /// Numbers of processes.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    processes: Vec<u32>,
    /// What carries it. `nccl` and `nccl-fast` (`ncclAllReduce`) take a GPU for each process.
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
    Nccl,
    NcclFast,
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

#[derive(Args)]
pub struct Publish {
    /// Ranks of the adapters, which decide their size (654 kB a rank).
    #[arg(long, value_delimiter = ',', default_values_t = [8, 76, 512])]
    rank: Vec<u32>,
    /// Numbers of replicas, each on a node process of its own.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    replicas: Vec<u32>,
    /// Of each figure, after one that is not counted; the median is shown.
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// Cores to compute on, over all nodes; by default all of this machine.
    #[arg(long, value_parser = cores())]
    threads: Option<usize>,
    /// One line of JSON instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Gateway {
    /// Numbers of connections at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64])]
    connections: Vec<u32>,
    /// Requests on each connection.
    #[arg(long, default_value_t = 500)]
    requests: u32,
    /// One line of JSON instead of the table.
    #[arg(long)]
    json: bool,
}

impl AllReduce {
    pub fn run(self) -> anyhow::Result<()> {
        let carriers = self.carrier.iter().map(|carrier| match carrier {
            CarrierName::Shm => Carrier::SharedMemory,
            CarrierName::Quic => Carrier::Quic,
            CarrierName::Nccl => Carrier::Nccl,
            CarrierName::NcclFast => Carrier::NcclFast,
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
            return print_line(&report);
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

/// A row of the table of all-reduces.
pub fn line(row: &AllReduceResult) -> String {
    let carrier = match row.carrier {
        Carrier::SharedMemory => "shared memory",
        Carrier::Quic => "QUIC",
        Carrier::Nccl => "NCCL, tree",
        Carrier::NcclFast => "NCCL, its own",
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

impl Publish {
    pub fn run(self) -> anyhow::Result<()> {
        let config = PublishConfig {
            program: std::env::current_exe()?,
            ranks: self.rank,
            replicas: self.replicas,
            repeats: self.repeats,
            threads: self.threads.unwrap_or_else(all_cores),
        };
        if self.json {
            return print_line(&bench::publish(&config, |_| {})?);
        }
        println!(
            "{:>10} {:>5} {:>9} {:>10} {:>18} {:>18}",
            "adapter MB", "rank", "replicas", "ms", "(range)", "back after kill, s"
        );
        let report = bench::publish(&config, |row| {
            let range = format!("{:.0} to {:.0}", row.seconds_min * 1e3, row.seconds_max * 1e3);
            let back = row.back_after_kill_s.map_or("-".into(), |seconds| format!("{seconds:.2}"));
            println!(
                "{:>10.1} {:>5} {:>9} {:>10.0} {range:>18} {back:>18}",
                row.adapter_mb,
                row.rank,
                row.replicas,
                row.seconds * 1e3
            );
        })?;
        println!("{}", report.machine);
        Ok(())
    }
}

impl Gateway {
    pub fn run(self) -> anyhow::Result<()> {
        let config = GatewayConfig {
            program: std::env::current_exe()?,
            connections: self.connections,
            requests: self.requests,
        };
        if self.json {
            return print_line(&bench::gateway(&config, |_| {})?);
        }
        println!(
            "{:<24} {:>11} {:>11} {:>10} {:>8}",
            "GET", "connections", "requests/s", "median ms", "p99 ms"
        );
        let report = bench::gateway(&config, |row| {
            println!(
                "{:<24} {:>11} {:>11.0} {:>10.3} {:>8.3}",
                row.path, row.connections, row.requests_per_s, row.median_ms, row.p99_ms
            );
        })?;
        println!("{}", report.machine);
        Ok(())
    }
}

impl Worker {
    pub fn run(self) -> anyhow::Result<()> {
        let kind = match self.kind {
            WorkerName::Rank => WorkerKind::Rank,
            WorkerName::Bulk => WorkerKind::Bulk,
        };
        Ok(bench::run_worker(kind, &self.name, &self.directory)?)
    }
}

//! All-reduce between real processes: Lockstep's collective over shared memory and over QUIC, gloo
//! beside it, and what the machine can do at most, in one run.
//!
//! A vector of S bytes on each of n processes, one partial sum each; what counts is from the first
//! process's start to the last one's end. Every algorithm moves 2 (n - 1) S bytes between them in all.

use std::{ops::RangeInclusive, path::PathBuf};

use serde::Serialize;

use super::{
    BenchError, Machine, WorkerKind,
    figures::{Span, median},
    limits::{self, Bulk, Memcpy},
    machine::round,
    worker::{Trust, Worker, tell_all},
};
use crate::{
    collective::{NCCL_IN_ONE_ORDER, Reduction},
    nvidia,
};

mod gloo;
mod rank;

pub(super) use rank::serve_rank;
use rank::{Measured, Seat, Setup, Work};

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct AllReduceConfig {
    /// This program, which the workers are.
    pub program: PathBuf,
    /// Sizes of a process's vector, in MB (10^6 bytes).
    pub megabytes: Vec<u64>,
    pub processes: Vec<u32>,
    pub carriers: Vec<Carrier>,
    pub repeats: u32,
    /// A Python with torch, for gloo; `None`: without the peer.
    pub python: Option<PathBuf>,
}

/// What carries an all-reduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    SharedMemory,
    Quic,
    /// A GPU for each process, added up in the tree's order; from host memory to host memory, as a rank
    /// on the CPU would.
    Nccl,
    /// The same by `ncclAllReduce`.
    NcclFast,
    /// The peer: gloo of torch.distributed, over TCP.
    Gloo,
}

/// Everything that one run measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AllReduceReport {
    pub bench: &'static str,
    pub machine: Machine,
    pub repeats: u32,
    pub memcpy: Memcpy,
    /// Absent where QUIC was not asked for.
    pub quinn_bulk: Option<Bulk>,
    pub results: Vec<AllReduceResult>,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AllReduceResult {
    pub carrier: Carrier,
    pub processes: u32,
    pub megabytes: u64,
    /// Median of the repeats, and their range.
    pub seconds: f64,
    pub seconds_min: f64,
    pub seconds_max: f64,
    /// What is reduced: size of the vector over time.
    pub reduced_mb_per_s: f64,
    /// What is moved between processes: 2 (n - 1) times that.
    pub moved_mb_per_s: f64,
    /// CPU time of all processes for each GB that is moved.
    pub cpu_s_per_gb: f64,
}

/// Values of an f32 vector in a MB.
const VALUES_PER_MB: u64 = 1_000_000 / 4;

/// MB each way of a bulk transfer: as many as the largest vector has, within these bounds. Fewer measure the
/// start of a connection, more nothing new.
const BULK_MB: RangeInclusive<u64> = 16..=256;

impl Carrier {
    /// How GPUs add up, if they do.
    fn reduction(self) -> Option<Reduction> {
        match self {
            Self::Nccl => Some(Reduction::Tree),
            Self::NcclFast => Some(Reduction::Fast),
            Self::SharedMemory | Self::Quic | Self::Gloo => None,
        }
    }
}

/// Runs it all; `each` gets every row as it is there.
pub fn all_reduce(
    config: &AllReduceConfig,
    mut each: impl FnMut(&AllReduceResult),
) -> Result<AllReduceReport, BenchError> {
    check(config)?;
    let trust = Trust::new()?;
    let machine = Machine::here();
    let memcpy = limits::memcpy(config.repeats);
    let largest = config.megabytes.iter().max().copied().unwrap_or(0);
    let bulk_mb = largest.clamp(*BULK_MB.start(), *BULK_MB.end());
    let quinn_bulk = match config.carriers.contains(&Carrier::Quic) {
        true => Some(limits::bulk(&config.program, &trust, bulk_mb, config.repeats)?),
        false => None,
    };
    let mut results = Vec::new();
    for &processes in &config.processes {
        for &carrier in &config.carriers {
            let mut ranks = Ranks::start(config, &trust, carrier, processes)?;
            for &megabytes in &config.megabytes {
                let result = ranks.measure(megabytes, config.repeats)?;
                each(&result);
                results.push(result);
            }
        }
        if let Some(python) = &config.python {
            for result in gloo::measure(python, config, processes)? {
                each(&result);
                results.push(result);
            }
        }
    }
    Ok(AllReduceReport { bench: "allreduce", machine, repeats: config.repeats, memcpy, quinn_bulk, results })
}

fn check(config: &AllReduceConfig) -> Result<(), BenchError> {
    let refused = |flag, problem: &str| Err(BenchError::Refused { flag, problem: problem.into() });
    if config.processes.iter().any(|n| !(2..=64).contains(n)) {
        return refused("--processes", "an all-reduce takes 2 to 64 processes");
    }
    if config.megabytes.iter().any(|mb| !(1..=4096).contains(mb)) {
        return refused("--mb", "a vector has 1 to 4096 MB");
    }
    if config.repeats == 0 {
        return refused("--repeats", "a median takes at least one");
    }
    if config.carriers.iter().any(|carrier| carrier.reduction().is_some()) {
        let most = config.processes.iter().max().copied().unwrap_or(0);
        check_gpus(most).map_err(|problem| BenchError::Refused { flag: "--carrier", problem })?;
    }
    Ok(())
}

/// Before anything is started: the ranks themselves refuse to measure another carrier.
fn check_gpus(processes: u32) -> Result<(), String> {
    if cfg!(not(feature = "nccl")) {
        return Err("nccl: this binary was built without the feature `nccl`".into());
    }
    let gpus = nvidia::gpus().map_err(|why| format!("nccl: {why}"))?.len();
    nvidia::NCCL_LIBRARY.find().map_err(|why| format!("nccl: {why}"))?;
    match gpus as u64 >= u64::from(processes) {
        true => Ok(()),
        false => Err(format!("nccl takes a GPU for each of {processes} processes; {gpus} are here")),
    }
}

/// Processes that have met.
struct Ranks {
    carrier: Carrier,
    workers: Vec<Worker>,
}

impl Ranks {
    fn start(
        config: &AllReduceConfig,
        trust: &Trust,
        carrier: Carrier,
        processes: u32,
    ) -> Result<Self, BenchError> {
        let variables = if carrier == Carrier::NcclFast { &NCCL_IN_ONE_ORDER[..] } else { &[] };
        let start = |index| Worker::start(&config.program, WorkerKind::Rank, trust, index, variables);
        let mut workers = (0..processes).map(start).collect::<Result<Vec<_>, _>>()?;
        let seat = |(rank, worker): (usize, &Worker)| Seat {
            // Ranks that say another host than rank 0's do not share memory with it.
            host: if carrier == Carrier::Quic { format!("host-{rank}") } else { "host".into() },
            address: worker.address.clone(),
        };
        let seats: Vec<Seat> = workers.iter().enumerate().map(seat).collect();
        tell_all::<(), _>(&mut workers, |me| Setup {
            me: me as u32,
            seats: seats.clone(),
            reduction: carrier.reduction(),
        })?;
        Ok(Self { carrier, workers })
    }

    fn measure(&mut self, megabytes: u64, repeats: u32) -> Result<AllReduceResult, BenchError> {
        let work = |_| Work { len: (megabytes * VALUES_PER_MB) as usize, repeats };
        let measured: Vec<Measured> = tell_all(&mut self.workers, work)?;
        if let Some(odd) = measured.iter().position(|m| m.digest != measured[0].digest) {
            return Err(BenchError::worker(format!("rank {odd}"), "its sum is another than rank 0's"));
        }
        let repeat = |i| Span::together(&measured.iter().map(|m| m.spans[i]).collect::<Vec<_>>());
        let spans: Vec<Span> = (0..repeats as usize).map(repeat).collect();
        Ok(AllReduceResult::new(self.carrier, self.workers.len() as u32, megabytes, &spans))
    }
}

impl AllReduceResult {
    /// From what each repeat took, all processes together.
    fn new(carrier: Carrier, processes: u32, megabytes: u64, spans: &[Span]) -> Self {
        let seconds = || spans.iter().map(Span::seconds);
        let (middle, moved) = (median(seconds()), f64::from(2 * (processes - 1)) * megabytes as f64);
        Self {
            carrier,
            processes,
            megabytes,
            seconds: round(middle, 5),
            seconds_min: round(seconds().fold(f64::INFINITY, f64::min), 5),
            seconds_max: round(seconds().fold(0.0, f64::max), 5),
            reduced_mb_per_s: round(megabytes as f64 / middle, 1),
            moved_mb_per_s: round(moved / middle, 1),
            cpu_s_per_gb: round(median(spans.iter().map(|span| span.cpu_s)) / (moved / 1e3), 3),
        }
    }
}

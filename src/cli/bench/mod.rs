//! `lockstep bench`: what it can measure, and how that is printed.

mod compare;
mod engine;
mod gpu;
mod processes;
mod start;

use clap::Subcommand;
use serde::Serialize;
use serde_json::Value;

/// Measure this machine, Lockstep on it, and its peers.
#[derive(Subcommand)]
pub enum Bench {
    /// Training: forward, forward and backward, a whole step, and memory.
    Train(engine::Train),
    /// Sampling: prefill and decoding of many streams together.
    Decode(engine::Decode),
    /// Sampling: the prefill alone.
    Prefill(engine::Prefill),
    /// How far sampler and trainer are apart on the same tokens.
    Parity(engine::Parity),
    /// From a step done to its version served by every replica.
    Publish(processes::Publish),
    /// From `lockstep up` to the first step done, on a new data directory and on a used one.
    Start(start::Start),
    /// All-reduce between processes of this machine, over shared memory and QUIC.
    #[command(name = "allreduce")]
    AllReduce(processes::AllReduce),
    /// What a request costs at the gateway.
    Gateway(processes::Gateway),
    /// Lockstep and its peers on the same work, in turns, as ratios.
    Compare(compare::Compare),
    /// Everything on a GPU: training, prefill, decoding, publishing, all-reduce, as shares of what its chip can do, and
    /// PyTorch on the same card.
    Gpu(gpu::Gpu),
    #[command(hide = true)]
    GpuFigures(gpu::Figures),
    #[command(hide = true)]
    Worker(processes::Worker),
}

impl Bench {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Train(train) => train.run(),
            Self::Decode(decode) => decode.run(),
            Self::Prefill(prefill) => prefill.run(),
            Self::Parity(parity) => parity.run(),
            Self::Publish(publish) => publish.run(),
            Self::Start(start) => start.run(),
            Self::AllReduce(all_reduce) => all_reduce.run(),
            Self::Gateway(gateway) => gateway.run(),
            Self::Compare(compare) => compare.run(),
            Self::Gpu(gpu) => gpu.run(),
            Self::GpuFigures(figures) => figures.run(),
            Self::Worker(worker) => worker.run(),
        }
    }
}

/// One line of JSON.
fn print_line(report: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}

/// One line of JSON, or a line for each figure.
fn print(report: &impl Serialize, machine: &lockstep::bench::Machine, json: bool) -> anyhow::Result<()> {
    if json {
        return print_line(report);
    }
    if let Value::Object(figures) = serde_json::to_value(report)? {
        for (name, value) in figures.iter().filter(|(_, value)| !value.is_object()) {
            println!("{name:<22} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
    }
    println!("{machine}");
    Ok(())
}

//! What is measured of the engine, through a cluster inside this process.

use std::path::PathBuf;

use clap::Args;
use lockstep::bench::{self, GenerateConfig, ParityConfig, Subject, TrainConfig};

use super::{
    super::{
        arguments::{all_cores, cores},
        compute::Compute,
    },
    print,
};

/// The model, and with what it is measured.
#[derive(Args)]
pub(super) struct On {
    /// A Hugging Face directory or a GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// Cores to compute on; by default all of this machine.
    #[arg(long, value_parser = cores())]
    threads: Option<usize>,
    #[command(flatten)]
    compute: Compute,
    /// Of each figure, after one that is not counted; the median is shown.
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// One line of JSON.
    #[arg(long)]
    pub(super) json: bool,
}

impl On {
    pub(super) fn subject(&self) -> Subject {
        Subject {
            model: self.model.clone(),
            threads: self.threads.unwrap_or_else(all_cores),
            compute: self.compute.options(),
            repeats: self.repeats,
        }
    }
}

#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    on: On,
    /// Sequences of a batch.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    seq: u32,
    /// Of the LoRA.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// Trainer ranks that share the batch.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    trainers: u32,
}

#[derive(Args)]
pub struct Decode {
    #[command(flatten)]
    on: On,
    #[command(flatten)]
    streams: Streams,
    /// New tokens of each stream.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    new: u32,
}

#[derive(Args)]
pub struct Prefill {
    #[command(flatten)]
    on: On,
    #[command(flatten)]
    streams: Streams,
}

#[derive(Args)]
struct Streams {
    /// Streams at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Prompt tokens of each.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
}

#[derive(Args)]
pub struct Parity {
    #[command(flatten)]
    on: On,
    #[command(flatten)]
    streams: Streams,
    /// New tokens of each stream.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    new: u32,
    /// Of the LoRA.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
}

impl Train {
    pub fn run(self) -> anyhow::Result<()> {
        let report = bench::train(&TrainConfig {
            subject: self.on.subject(),
            batch: self.batch as usize,
            seq: self.seq as usize,
            rank: self.rank,
            trainers: self.trainers,
        })?;
        print(&report, &report.machine, self.on.json)
    }
}

impl Decode {
    pub fn run(self) -> anyhow::Result<()> {
        generate(&self.on, &self.streams, self.new)
    }
}

impl Prefill {
    pub fn run(self) -> anyhow::Result<()> {
        generate(&self.on, &self.streams, 1)
    }
}

fn generate(on: &On, streams: &Streams, new: u32) -> anyhow::Result<()> {
    let (batch, prompt) = (streams.batch as usize, streams.prompt as usize);
    let report = bench::generate(&GenerateConfig { subject: on.subject(), batch, prompt, new })?;
    print(&report, &report.machine, on.json)
}

impl Parity {
    pub fn run(self) -> anyhow::Result<()> {
        let report = bench::parity(&ParityConfig {
            subject: self.on.subject(),
            batch: self.streams.batch as usize,
            prompt: self.streams.prompt as usize,
            new: self.new,
            rank: self.rank,
        })?;
        print(&report, &report.machine, self.on.json)
    }
}

//! How long a user waits for the first step.

use clap::Args;
use lockstep::bench::{self, StartConfig};

use super::{engine::On, print_line};

#[derive(Args)]
pub struct Start {
    #[command(flatten)]
    on: On,
    /// Tokens of the step's one sequence.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=131_072))]
    tokens: u32,
    /// Of the LoRA.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// Node processes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,
    /// Trainer ranks, over all nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    trainers: u32,
    /// Sampler replicas, over all nodes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=64))]
    samplers: u32,
    /// Read the model and what is cached of it from the disk: the system is asked to drop them from memory.
    #[arg(long)]
    cold: bool,
}

impl Start {
    pub fn run(self) -> anyhow::Result<()> {
        let subject = self.on.subject();
        let report = bench::start(&StartConfig {
            program: std::env::current_exe()?,
            model: subject.model,
            nodes: self.nodes,
            trainers: self.trainers,
            samplers: self.samplers,
            threads: subject.threads,
            compute: subject.compute,
            tokens: self.tokens as usize,
            rank: self.rank,
            repeats: subject.repeats,
            cold: self.cold,
        })?;
        if self.on.json {
            return print_line(&report);
        }
        println!("{:<34} {:>12} {:>12}", "seconds since the start", "new data", "used data");
        let row = |name: &str, fresh: f64, used: f64| println!("{name:<34} {fresh:>12.3} {used:>12.3}");
        let (fresh, used) = (&report.fresh, &report.used);
        row("the coordinator listens", fresh.coordinator_s, used.coordinator_s);
        row("ready: the nodes have joined", fresh.ready_s, used.ready_s);
        row("a client has its run", fresh.run_s, used.run_s);
        row("forward and backward", fresh.forward_backward_s, used.forward_backward_s);
        row("step done", fresh.step_s, used.step_s);
        row("  fastest", fresh.step_s_min, used.step_s_min);
        row("  slowest", fresh.step_s_max, used.step_s_max);
        row("MiB of nodes, shared pages in each", fresh.nodes_rss_mib, used.nodes_rss_mib);
        row("MiB of nodes, shared pages once", fresh.nodes_pss_mib, used.nodes_pss_mib);
        println!("{}", report.machine);
        Ok(())
    }
}

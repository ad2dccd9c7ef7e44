use std::path::PathBuf;

use clap::Args;
use lockstep::{
    bench::{self, FiguresConfig, GpuBenchConfig, GpuReport, GpuRow, Shape, Workload},
    gpu::DeviceChoice,
    kernels::WeightDtype,
};

use super::{
    super::arguments::{all_cores, cores},
    compare::batch_by_seq,
    print_line, processes,
};

#[derive(Args)]
pub struct Gpu {
    /// cuda, cuda:N, or emulated, which tries the benchmark out.
    #[arg(long, default_value = "cuda", env = "LOCKSTEP_DEVICE")]
    device: DeviceChoice,
    /// What products are computed in.
    #[arg(long, default_value = "bf16")]
    dtype: WeightDtype,
    /// Launch every step of decoding kernel by kernel, to see what replaying recorded ones gains.
    #[arg(long)]
    plain_decoding: bool,
    /// Models with random weights: tiny, qwen3-1.7b, qwen3-8b. By default the two last, unless --model is given.
    #[arg(long, value_delimiter = ',')]
    shape: Vec<Shape>,
    /// A Hugging Face directory or a GGUF file. Repeatable.
    #[arg(long = "model")]
    models: Vec<PathBuf>,
    /// Where models with random weights are written and kept; by default a temporary folder, which takes 17 GB.
    #[arg(long, value_name = "DIR")]
    models_dir: Option<PathBuf>,
    /// Cores for what is on the host; by default all of this machine.
    #[arg(long, value_parser = cores())]
    threads: Option<usize>,
    /// Of each figure, after one that is not counted; the median is shown.
    #[arg(long, default_value_t = 3)]
    repeats: u32,
    /// Of the LoRA.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// Training: sequences of a batch, and their tokens, as BxT.
    #[arg(long, default_value = "8x1024", value_parser = batch_by_seq)]
    train: (u32, u32),
    /// Prefill: prompts, and their tokens, as BxT.
    #[arg(long, default_value = "8x1024", value_parser = batch_by_seq)]
    prefill: (u32, u32),
    /// Decoding: streams at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 256], value_parser = clap::value_parser!(u32).range(1..=4096))]
    decode: Vec<u32>,
    /// Prompt tokens of each stream.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// New tokens of each stream.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    new: u32,
    /// A Python with torch, transformers and peft: measures them on the same card.
    #[arg(long, env = "LOCKSTEP_PEERS_PYTHON")]
    python: Option<PathBuf>,
    /// The chip's peak in 10^12 operations a second, instead of its data sheet's.
    #[arg(long, value_name = "TFLOPS")]
    peak_tflops: Option<f64>,
    /// The bandwidth of its memory in 10^9 bytes a second.
    #[arg(long, value_name = "GB")]
    peak_gb_per_s: Option<f64>,
    /// One line of JSON instead of the table.
    #[arg(long)]
    json: bool,
}

/// A model's figures, for the benchmark that starts it.
#[derive(Args)]
pub struct Figures {
    config: String,
}

impl Gpu {
    pub fn run(self) -> anyhow::Result<()> {
        let shapes = match self.shape.is_empty() && self.models.is_empty() {
            true => vec![Shape::Qwen3_1_7b, Shape::Qwen3_8b],
            false => self.shape,
        };
        let config = GpuBenchConfig {
            program: std::env::current_exe()?,
            device: self.device,
            dtype: self.dtype,
            plain_decoding: self.plain_decoding,
            shapes,
            models: self.models,
            folder: self.models_dir,
            workload: Workload {
                threads: self.threads.unwrap_or_else(all_cores),
                repeats: self.repeats,
                rank: self.rank,
                train: self.train,
                prefill: self.prefill,
                decode: self.decode,
                prompt: self.prompt,
                new: self.new,
            },
            python: self.python,
            tflops: self.peak_tflops,
            gb_per_s: self.peak_gb_per_s,
        };
        if self.json {
            let report = bench::gpu(&config, |_| {})?;
            print_line(&report)?;
            return whole(&report);
        }
        println!(
            "{:<14} {:<34} {:>12} {:>8} {:>10} {:>12} {:>6}  peer",
            "model", "work", "Lockstep", "% peak", "% replayed", "peer's", "ratio"
        );
        let report = bench::gpu(&config, |row| println!("{}", line(row)))?;
        println!("{}", beneath(&report));
        whole(&report)
    }
}

fn line(row: &GpuRow) -> String {
    let optional = |value: Option<f64>, decimals: usize| {
        value.map_or_else(String::new, |value| format!("{value:.decimals$}"))
    };
    let lockstep = match row.unit {
        "nats" => format!("{:.1e}", row.lockstep),
        _ => format!("{:.1}", row.lockstep),
    };
    format!(
        "{:<14} {:<34} {lockstep:>12} {:>8} {:>10} {:>12} {:>6}  {}",
        row.model,
        format!("{} ({})", row.work, row.unit),
        optional(row.percent_of_peak, 1),
        optional(row.replayed_percent, 1),
        optional(row.peer_figure, 1),
        optional(row.ratio, 2),
        row.peer.unwrap_or_default()
    )
    .trim_end()
    .to_owned()
}

/// The figures that are there have been printed; the exit code tells a test of the others.
fn whole(report: &GpuReport) -> anyhow::Result<()> {
    anyhow::ensure!(
        report.failed.is_empty(),
        "not everything could be measured: {}",
        report.failed.join("; ")
    );
    Ok(())
}

fn beneath(report: &GpuReport) -> String {
    let mut lines: Vec<String> = report.all_reduce.iter().map(processes::line).collect();
    lines.push(match &report.peak {
        Some(peak) => format!(
            "peak: {} TFLOP/s in training and prefill, {} GB/s in decoding ({})",
            peak.tflops, peak.gb_per_s, peak.source
        ),
        None => "peak: not known of this chip; give --peak-tflops and --peak-gb-per-s".into(),
    });
    lines.extend(report.left_out.iter().map(|why| format!("left out: {why}")));
    lines.extend(report.failed.iter().map(|why| format!("FAILED: {why}")));
    lines.push(report.machine.to_string());
    lines.join("\n")
}

impl Figures {
    pub fn run(self) -> anyhow::Result<()> {
        let config: FiguresConfig = serde_json::from_str(&self.config)?;
        print_line(&bench::gpu_figures(&config)?)
    }
}

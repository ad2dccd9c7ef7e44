use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use lockstep::{
    bench::{self, CompareConfig, CompareRow},
    kernels::WeightDtype,
};

use super::{
    super::arguments::{all_cores, cores},
    print_line,
};

#[derive(Args)]
pub struct Compare {
    /// A Hugging Face directory, for Lockstep, PEFT and transformers.
    #[arg(long)]
    model: PathBuf,
    /// The same model as GGUF files, of one type of weights each, for Lockstep and llama.cpp.
    #[arg(long, value_delimiter = ',')]
    gguf: Vec<PathBuf>,
    /// A Python with torch, transformers and peft, and llama-cpp-python for --gguf.
    #[arg(long, env = "LOCKSTEP_PEERS_PYTHON")]
    python: PathBuf,
    /// Cores to compute on; by default all of this machine.
    #[arg(long, value_parser = cores())]
    threads: Option<usize>,
    /// Types of the base weights.
    #[arg(long, value_delimiter = ',', default_value = "f32")]
    dtype: Vec<WeightDtype>,
    /// Streams that are decoded together.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32], value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: Vec<u32>,
    /// Training: sequences of a batch, and their tokens, as BxT.
    #[arg(long, default_value = "8x256", value_parser = batch_by_seq)]
    train: (u32, u32),
    /// Train PEFT under `torch.compile`, too; it compiles for minutes in each turn.
    #[arg(long)]
    compile: bool,
    /// Turns of Lockstep and each peer; the median of them is shown.
    #[arg(long, default_value_t = 3)]
    turns: u32,
    /// Repeats within a turn.
    #[arg(long, default_value_t = 3)]
    repeats: u32,
    /// Draws the table there.
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
    /// One line of JSON instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn batch_by_seq(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once('x').and_then(|(b, t)| Some((b.parse().ok()?, t.parse().ok()?)));
    parts.filter(|(b, t)| *b > 0 && *t > 0).ok_or_else(|| "give BxT, as 8x256".into())
}

impl Compare {
    pub fn run(self) -> anyhow::Result<()> {
        let config = CompareConfig {
            program: std::env::current_exe()?,
            python: self.python,
            model: self.model,
            ggufs: self.gguf,
            threads: self.threads.unwrap_or_else(all_cores),
            dtypes: self.dtype,
            batches: self.batch,
            train: self.train,
            compile: self.compile,
            turns: self.turns,
            repeats: self.repeats,
        };
        if !self.json {
            println!("{:<46} {:>9} {:>9} {:>6}  peer", "work", "Lockstep", "peer's", "ratio");
        }
        let report = bench::compare(&config, |row| {
            if !self.json {
                println!("{}", line(row));
            }
        })?;
        if let Some(path) = &self.svg {
            let date = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
            let picture = bench::draw(&report, date.split('T').next().unwrap_or_default());
            std::fs::write(path, picture).with_context(|| format!("writing {}", path.display()))?;
        }
        if self.json {
            return print_line(&report);
        }
        for left_out in &report.left_out {
            println!("left out: {left_out}");
        }
        println!("{}", report.machine);
        Ok(())
    }
}

fn line(row: &CompareRow) -> String {
    let work = format!("{} ({})", row.work, row.unit);
    format!("{work:<46} {:>9.1} {:>9.1} {:>6.2}  {}", row.lockstep, row.peer_figure, row.ratio, row.peer)
}

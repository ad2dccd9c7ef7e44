//! Lockstep and its peers on the same work, one after the other in turns, so that a machine that is busy
//! for a while is busy for both; ratios, with the machine beside them.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::{BenchError, Machine, figures::median, machine::round, peer, program::printed};
use crate::kernels::WeightDtype;

mod duels;
mod svg;

use duels::{Better, Duel};
pub use svg::draw;

/// What is compared.
#[derive(Debug, Clone)]
pub struct CompareConfig {
    /// This program: each of its figures comes from a process of its own, as each of a peer's does.
    pub program: PathBuf,
    /// A Python with the peers' packages.
    pub python: PathBuf,
    /// A Hugging Face directory, for Lockstep, PEFT and transformers.
    pub model: PathBuf,
    /// The same model as GGUF files, for Lockstep and llama.cpp.
    pub ggufs: Vec<PathBuf>,
    pub threads: usize,
    /// Numeric types of the base weights.
    pub dtypes: Vec<WeightDtype>,
    /// Streams that are decoded together.
    pub batches: Vec<u32>,
    /// Sequences of a training batch, and their length.
    pub train: (u32, u32),
    /// Whether PEFT trains under `torch.compile`, too.
    pub compile: bool,
    /// Turns; the median of them is shown.
    pub turns: u32,
    /// Repeats within a turn.
    pub repeats: u32,
}

/// The table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompareReport {
    pub bench: &'static str,
    pub machine: Machine,
    pub turns: u32,
    pub rows: Vec<CompareRow>,
    /// Peers that are not installed, or failed, and why.
    pub left_out: Vec<String>,
}

/// One line of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompareRow {
    pub work: String,
    pub unit: &'static str,
    pub lockstep: f64,
    pub peer: String,
    pub peer_figure: f64,
    /// How many times as good as the peer Lockstep is: as fast, or as frugal.
    pub ratio: f64,
}

/// Runs it all; `each` gets every row as it is there.
pub fn compare(
    config: &CompareConfig,
    mut each: impl FnMut(&CompareRow),
) -> Result<CompareReport, BenchError> {
    if config.turns == 0 || config.repeats == 0 {
        let problem = "a median takes at least one".into();
        return Err(BenchError::Refused { flag: "--turns and --repeats", problem });
    }
    let machine = Machine::here();
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    for duel in duels::of(config) {
        if let Some(missing) = duel.peers.iter().find_map(|peer| peer.script.missing(&config.python)) {
            if !left_out.contains(&missing) {
                left_out.push(missing);
            }
            continue;
        }
        match fight(config, &duel) {
            Ok(found) => {
                found.iter().for_each(&mut each);
                rows.extend(found);
            }
            // The other rows are worth having.
            Err(error @ BenchError::Peer { .. }) => left_out.push(format!("{}: {error}", duel.work)),
            Err(error) => return Err(error),
        }
    }
    Ok(CompareReport { bench: "compare", machine, turns: config.turns, rows, left_out })
}

/// All rows of one piece of work.
fn fight(config: &CompareConfig, duel: &Duel) -> Result<Vec<CompareRow>, BenchError> {
    let mut ours = Vec::new();
    let mut theirs: Vec<Vec<Value>> = vec![Vec::new(); duel.peers.len()];
    for _ in 0..config.turns {
        ours.push(lockstep(&config.program, &duel.arguments)?);
        for (peer, said) in duel.peers.iter().zip(&mut theirs) {
            said.push(peer::run(&config.python, peer.script, &peer.arguments)?);
        }
    }
    let mut rows = Vec::new();
    for figure in duel.figures {
        let of = |said: &[Value]| median(said.iter().filter_map(|line| line.pointer(figure.at)?.as_f64()));
        let lockstep = of(&ours);
        for (peer, said) in duel.peers.iter().zip(&theirs) {
            let peer_figure = of(said);
            if lockstep.is_nan() || peer_figure.is_nan() {
                // A compiled peer has no forward alone, for one.
                continue;
            }
            let ratio = match figure.better {
                Better::More => lockstep / peer_figure,
                Better::Less => peer_figure / lockstep,
            };
            rows.push(CompareRow {
                work: format!("{}: {}", duel.work, figure.name),
                unit: figure.unit,
                lockstep,
                peer: peer.name.clone(),
                peer_figure,
                ratio: round(ratio, 2),
            });
        }
    }
    Ok(rows)
}

/// What `lockstep bench ARGUMENTS --json` prints.
fn lockstep(program: &Path, arguments: &[String]) -> Result<Value, BenchError> {
    let what = format!("lockstep bench {}", arguments.join(" "));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["--json"]).collect();
    printed(program, &arguments, &what)
}

//! The peer: `benches/peers/gloo.py`, which travels in this binary.

use std::path::Path;

use serde::Deserialize;

use super::{AllReduceConfig, AllReduceResult, BenchError, Carrier};
use crate::bench::{figures::Span, peer};

#[derive(Deserialize)]
struct Line {
    results: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    megabytes: u64,
    /// Of each repeat, all processes together.
    spans: Vec<Span>,
}

/// The same sizes with so many processes of torch's.
pub(super) fn measure(
    python: &Path,
    config: &AllReduceConfig,
    processes: u32,
) -> Result<Vec<AllReduceResult>, BenchError> {
    let mut arguments =
        vec![format!("--processes={processes}"), format!("--repeats={}", config.repeats), "--mb".into()];
    arguments.extend(config.megabytes.iter().map(ToString::to_string));
    let line: Line = peer::run(python, peer::GLOO, &arguments)?;
    let row = |row: Row| AllReduceResult::new(Carrier::Gloo, processes, row.megabytes, &row.spans);
    Ok(line.results.into_iter().map(row).collect())
}

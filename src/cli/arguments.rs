//! What several commands take, and how it is read.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::builder::RangedU64ValueParser;
use lockstep::model::ModelSource;

/// Where runs, checkpoints and models are kept.
pub const DATA_DIR: &str = "./lockstep-data";

/// Snapshots of a run that are kept.
pub const HISTORY: u32 = 2;

/// Reads `NAME=PATH` arguments; a path that doesn't exist is refused here, not by a child.
pub fn parse_models(models: &[String]) -> anyhow::Result<Vec<ModelSource>> {
    let parse = |text: &String| {
        let source = ModelSource::parse(text)?;
        if !source.path.exists() {
            bail!("--model {text}: there is nothing at {}", source.path.display());
        }
        Ok(source)
    };
    models.iter().map(parse).collect()
}

/// Reads a number of cores.
pub fn cores() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=4096)
}

/// The cores of this machine.
pub fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Reads `90s`, `10m`, `24h` or `7d`.
pub fn span(text: &str) -> anyhow::Result<Duration> {
    let (number, unit) = text.split_at(text.len() - text.chars().next_back().map_or(0, char::len_utf8));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => bail!("expected a number and s, m, h or d, got {text:?}"),
    };
    let number: u32 =
        number.parse().with_context(|| format!("expected a number and s, m, h or d, got {text:?}"))?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read() {
        assert_eq!(span("90s").unwrap().as_secs(), 90);
        assert_eq!(span("24h").unwrap().as_secs(), 86_400);
        for bad in ["", "5", "h", "-1h", "1w", "1 h", "é"] {
            assert!(span(bad).is_err(), "{bad}");
        }
    }
}

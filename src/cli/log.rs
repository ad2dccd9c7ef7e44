//! What a process says of itself: a log on stderr, and spans in a file if asked.

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use super::{Cli, trace};

/// Form of a line of the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl LogFormat {
    /// As the flag and the environment say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// Sends logs to stderr, and spans to a file if asked; that file is complete when what this returns is dropped.
pub fn start(cli: &Cli) -> anyhow::Result<Option<impl Drop + use<>>> {
    let log = to_stderr(cli.verbose, cli.log_format);
    let Some(directory) = &cli.trace else {
        tracing_subscriber::registry().with(log).init();
        return Ok(None);
    };
    // SAFETY: the process has one thread yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var(trace::TRACE, directory) };
    let (spans, guard) = trace::layer(directory, cli.command.name())?;
    tracing_subscriber::registry().with(log).with(spans).init();
    Ok(Some(guard))
}

/// Warnings, or more if asked. Programs that read JSON get each request and operation.
fn to_stderr(verbose: u8, format: LogFormat) -> Box<dyn Layer<Registry> + Send + Sync> {
    let level = match (verbose, format) {
        (0, LogFormat::Text) => "warn,lockstep=info",
        (0, LogFormat::Json) => "warn,lockstep=info,lockstep::request=debug,lockstep::operation=debug",
        (1, _) => "lockstep=debug,info",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("LOCKSTEP_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let lines = fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.with_target(false).with_filter(filter).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).with_filter(filter).boxed(),
    }
}

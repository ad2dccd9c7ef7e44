//! `--trace DIR`: where the time goes, as files that Perfetto (or chrome://tracing) opens.

use std::path::Path;

use anyhow::Context;
use tracing::Subscriber;
use tracing_chrome::{ChromeLayerBuilder, FlushGuard};
use tracing_subscriber::{EnvFilter, Layer, registry::LookupSpan};

/// Names the directory to the parts that this process starts.
pub const TRACE: &str = "LOCKSTEP_TRACE";

/// What is recorded: our own spans, which stand at the level `debug`.
const RECORDED: &str = "off,lockstep=debug";

/// A layer that writes this process's spans, thread by thread, to `directory/part-PID.json`, and what
/// completes the file when it is dropped. A killed process leaves all but the last moments.
pub fn layer<S>(directory: &Path, part: &str) -> anyhow::Result<(impl Layer<S> + use<S>, FlushGuard)>
where
    S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    std::fs::create_dir_all(directory).with_context(|| format!("--trace {}", directory.display()))?;
    let path = directory.join(format!("{part}-{}.json", std::process::id()));
    // Opened here, as the layer would panic where it can't be.
    let file = std::fs::File::create(&path).with_context(|| format!("--trace {}", path.display()))?;
    let (layer, guard) = ChromeLayerBuilder::new().writer(file).include_args(true).build();
    Ok((layer.with_filter(EnvFilter::new(RECORDED)), guard))
}

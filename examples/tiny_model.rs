//! Writes a model of a few kilobytes with random weights, to try a cluster with:
//!
//!     cargo run --example tiny_model -- DIRECTORY

use lockstep::model::tiny;

fn main() -> anyhow::Result<()> {
    let directory = std::env::args_os().nth(1).ok_or_else(|| anyhow::anyhow!("which DIRECTORY?"))?;
    tiny::write(directory.as_ref(), &tiny::config(), 7)?;
    Ok(())
}

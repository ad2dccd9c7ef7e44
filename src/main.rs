//! The `lockstep` command: parses, calls, and says in one sentence what went wrong.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Held to the end: it completes the trace.
    let outcome = cli::log::start(&cli).and_then(|_trace| cli.run());
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lockstep: {}", sentence(&error));
            cli::exit_code(&error)
        }
    }
}

/// The error and its causes, without those that it quotes itself.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said.is_empty() {
        true => cause,
        false if said.contains(&cause) => said,
        false => format!("{said}: {cause}"),
    })
}

use anyhow::bail;
use clap::{Args, Subcommand};
use futures::executor::block_on;
use lockstep::{protocol::RunInfo, types::RunId};

use super::look::Look;

/// Without a subcommand: one line a run.
#[derive(Args)]
pub struct Runs {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    look: Look,
}

#[derive(Subcommand)]
enum Action {
    /// Compute again what led a run to a step, from the nearest earlier snapshot, and compare it with the journal.
    /// Takes ranks meanwhile; changes nothing.
    Replay {
        /// As `lockstep runs` shows it (run-1).
        run: RunId,
        /// The last step that is computed again.
        #[arg(long, value_name = "STEP")]
        to: u64,
    },
    /// Begin a new run where another stood after a step: the same weights, moments and counts.
    Fork {
        /// As `lockstep runs` shows it (run-1).
        run: RunId,
        #[arg(long, value_name = "STEP")]
        at: u64,
        /// Of the new run.
        #[arg(long)]
        name: Option<String>,
    },
}

impl Runs {
    pub fn run(self) -> anyhow::Result<()> {
        match self.action {
            None => {
                for run in block_on(self.look.connect()?.cluster_status())?.runs {
                    println!("{}", line(&run));
                }
            }
            Some(Action::Replay { run, to }) => {
                let found = block_on(self.look.connect()?.replay_run(run, to))?;
                let what = format!(
                    "{run}: {} operations from step {} to step {}",
                    found.operations, found.from_step, found.to_step
                );
                if let Some(difference) = found.difference {
                    bail!("{what} differ: {difference}");
                }
                println!("{what} came out equal");
            }
            Some(Action::Fork { run, at, name }) => {
                let forked = block_on(self.look.connect()?.fork_run(run, at, name))?;
                println!("{}", forked.run);
            }
        }
        Ok(())
    }
}

pub(super) fn line(run: &RunInfo) -> String {
    let live = run
        .live
        .or(run.initial)
        .map_or("nothing published".into(), |policy| format!("serves version {}", policy.step));
    format!(
        "{}  {}  rank {}  {} replicas  step {}  {live}  {} queued  {}",
        run.run, run.name, run.lora.rank, run.replicas, run.step, run.queued, run.phase
    )
}

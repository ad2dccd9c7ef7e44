use clap::{Args, Subcommand};
use futures::executor::block_on;
use lockstep::protocol::{ClusterStatus, NodeStatus};

use super::{look::Look, runs::line};

/// Without a subcommand: nodes, then runs.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Cluster {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    look: Look,
}

#[derive(Subcommand)]
enum Action {
    /// Give a node nothing new: its ranks move before their runs' next operations, its replicas finish what they
    /// have. `lockstep cluster` says when it can stop. It stays so until it is undone.
    Drain {
        /// As `lockstep cluster` shows it.
        node: String,
        /// Give it work again.
        #[arg(long)]
        undo: bool,
        #[command(flatten)]
        look: Look,
    },
}

impl Cluster {
    pub fn run(self) -> anyhow::Result<()> {
        let status = match self.action {
            None => block_on(self.look.connect()?.cluster_status())?,
            Some(Action::Drain { node, undo, look }) => block_on(look.connect()?.drain_node(&node, !undo))?,
        };
        show(&status);
        Ok(())
    }
}

fn show(status: &ClusterStatus) {
    for node in &status.nodes {
        println!(
            "{}  pid {}  {} trainer ranks, {} sampler replicas  {}{}",
            node.name,
            node.pid,
            node.trainers,
            node.samplers,
            node.numerics,
            drain(node)
        );
    }
    for name in &status.drained_away {
        println!("{name}  drained, and not there");
    }
    for run in &status.runs {
        println!("{}", line(run));
    }
}

fn drain(node: &NodeStatus) -> String {
    match &node.drain {
        None => String::new(),
        Some(drain) if drain.is_over() => "  drained: it can stop".to_owned(),
        Some(drain) => format!("  draining: {} runs, {} samples", drain.runs, drain.samples),
    }
}

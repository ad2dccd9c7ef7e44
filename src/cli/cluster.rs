use clap::{Args, Subcommand};
use futures::executor::block_on;
use lockstep::{
    protocol::{ClusterStatus, NodeStatus, TrustStatus},
    transport::unix_now,
};

use super::{look::Look, runs::line};

/// Without a subcommand: nodes, then runs.
#[derive(Args)]
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
    },
    /// Refuse what certificates a process has, and end its connections. With a new token it can join again.
    Revoke {
        /// Of the node, gateway or client.
        name: String,
        /// What it is; needed if several are called so, or none has been seen.
        #[arg(long, value_parser = ["node", "gateway", "client"])]
        role: Option<String>,
    },
    /// Have a new CA sign. Processes get certificates of it by themselves, and the former CA is trusted until all that
    /// are known have one.
    RotateCa {
        /// Trust the former CA no more, whoever has no new certificate: those need a new token.
        #[arg(long)]
        finish: bool,
    },
}

impl Cluster {
    pub fn run(self) -> anyhow::Result<()> {
        let service = self.look.connect()?;
        let status = match self.action {
            None => block_on(service.cluster_status())?,
            Some(Action::Revoke { name, role }) => {
                let status = block_on(service.revoke(role.as_deref(), &name))?;
                self.look.warn_of_tokens(&name);
                status
            }
            Some(Action::RotateCa { finish }) => block_on(service.rotate_ca(finish))?,
            Some(Action::Drain { node, undo }) => block_on(service.drain_node(&node, !undo))?,
        };
        show(&status);
        Ok(())
    }
}

fn show(status: &ClusterStatus) {
    for node in &status.nodes {
        println!(
            "{}  pid {}  {} trainer ranks, {} sampler replicas  {}{}{}",
            node.name,
            node.pid,
            node.trainers,
            node.samplers,
            node.numerics,
            certified(node),
            drain(node)
        );
    }
    for name in &status.drained_away {
        println!("{name}  drained, and not there");
    }
    trust(&status.trust);
    for run in &status.runs {
        println!("{}", line(run));
    }
}

fn certified(node: &NodeStatus) -> String {
    let left = |until: u64| match until.saturating_sub(unix_now()) {
        seconds @ 0..=172_799 => format!("{} minutes", seconds / 60),
        seconds => format!("{} days", seconds / 86_400),
    };
    node.certified_until.map_or(String::new(), |until| format!("  certified for {}", left(until)))
}

fn trust(status: &TrustStatus) {
    for process in &status.revoked {
        println!("{process}  revoked");
    }
    match &status.rotation {
        None => {}
        Some(waits) if waits.is_empty() => println!("a new CA signs; the former one's end is near"),
        Some(waits) => println!(
            "a new CA signs; the former one is trusted until these have new certificates: {}",
            waits.join(", ")
        ),
    }
}

fn drain(node: &NodeStatus) -> String {
    match &node.drain {
        None => String::new(),
        Some(drain) if drain.is_over() => "  drained: it can stop".to_owned(),
        Some(drain) => format!("  draining: {} runs, {} samples", drain.runs, drain.samples),
    }
}

//! Sessions, runs, order of operations, membership, versions: decides, never computes.

mod error;
pub mod state;

mod actor;
mod backup;
mod blobs;
mod doorkeeper;
mod serve;
mod sweep;
mod tally;

pub use error::{CoordinatorError, Refusal};
pub use serve::serve;

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{join::Authority, store::BucketLocation};

/// What a coordinator is started with.
pub struct CoordinatorConfig {
    /// Holds the journal, and the blobs if no bucket does.
    pub data_dir: PathBuf,
    /// Holds the blobs; absent: the bucket of an earlier start, or else the data directory.
    pub store: Option<BucketLocation>,
    /// Deadlines and bounds; the defaults fit a cluster of CPU nodes.
    pub limits: Limits,
    /// Renews and revokes certificates; absent: nobody has one.
    pub authority: Option<Arc<Authority>>,
    /// Called once the data directory is this coordinator's: what is said to others about it
    /// (its address) may not be said by a coordinator that will be refused.
    pub opened: Option<Box<dyn FnOnce() + Send>>,
}

impl CoordinatorConfig {
    /// The defaults for a data directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            store: None,
            limits: Limits::default(),
            authority: None,
            opened: None,
        }
    }
}

/// How long the coordinator waits for others, and how much it holds at once.
#[derive(Debug, Clone)]
pub struct Limits {
    /// From `Execute`, or from the last progress of any of its ranks, to the last rank's answer.
    pub operation_deadline: Duration,
    /// From `FormRanks` to the last node's answer; covers loading the base model, and the nodes' own deadlines for
    /// meeting and for NCCL's start, which name who is missing.
    pub form_deadline: Duration,
    /// From `Stage` or `Activate` to a node's answer.
    pub stage_deadline: Duration,
    /// From a publish's durable outcome until some replica must serve it.
    pub publish_deadline: Duration,
    /// How long a publish waits for a node with a sampler for its model.
    pub sampler_grace: Duration,
    /// A node without a pong for this long is lost.
    pub node_deadline: Duration,
    /// How long a drain waits for what is executing.
    pub drain_deadline: Duration,
    /// From handing a sample request to a replica to its answer.
    pub generate_deadline: Duration,
    /// How long a run waits for all of its `replicas` before it goes on with fewer.
    pub placement_grace: Duration,
    /// Optimiser steps between snapshots of a run.
    pub snapshot_every_steps: u32,
    /// Snapshots of a run that are kept, at least 1: replay reaches back to the oldest.
    pub history_snapshots: usize,
    /// Bytes of all runs' snapshots and the payloads between them, beyond which fewer are kept.
    pub history_bytes: u64,
    /// Finished operations of a run whose results are kept for whoever asks again: more than a
    /// client can have submitted ahead.
    pub results_kept: usize,
    /// Sampler checkpoints of a run that were made by publishing and are kept.
    pub publishes_kept: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            operation_deadline: Duration::from_secs(600),
            form_deadline: Duration::from_secs(400),
            stage_deadline: Duration::from_secs(60),
            publish_deadline: Duration::from_secs(180),
            sampler_grace: Duration::from_secs(30),
            node_deadline: Duration::from_secs(15),
            drain_deadline: Duration::from_secs(30),
            generate_deadline: Duration::from_secs(1800),
            placement_grace: Duration::from_secs(3),
            snapshot_every_steps: 8,
            history_snapshots: 2,
            history_bytes: 10 << 30,
            results_kept: 512,
            publishes_kept: 8,
        }
    }
}

#[cfg(test)]
mod tests;

//! The actor of a rank slot: performs what [`RankState`] decides.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
};

use actix::{Actor, Addr, Context, Handler};

use crate::{protocol::Generation, types::RunId};

use super::{
    RankConfig, RankReport,
    abort::AbortSwitch,
    compute::{self, Work},
    state::{Effect, Event, Job, RankState},
};

/// Control messages that may wait for a rank. A run has at most a handful under way (an
/// operation, its commit, a snapshot), and a slot has at most [`super::state::MAX_RUNS`] runs.
const MAILBOX: usize = 512;

/// Hosts one trainer slot of a node: decides; its compute thread computes.
pub struct TrainerRank {
    slot: u32,
    state: RankState,
    /// Capacity 1 and used only while the thread is idle, so never full.
    compute: mpsc::SyncSender<Work>,
    aborts: HashMap<(RunId, Generation), Arc<AbortSwitch>>,
    reports: tokio::sync::mpsc::Sender<RankReport>,
    on_death: Arc<dyn Fn(&str) + Send + Sync>,
}

/// An event for a rank slot.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Deliver(pub Event);

impl TrainerRank {
    /// Starts the actor (in the current actix system) and its compute thread, which ends with it.
    ///
    /// `reports` must be drained: a rank whose report finds no room calls `on_death`, because
    /// its coordinator would wait for it for ever.
    pub fn launch(
        config: RankConfig,
        reports: tokio::sync::mpsc::Sender<RankReport>,
    ) -> std::io::Result<Addr<Self>> {
        let (compute, work) = mpsc::sync_channel(1);
        let (slot, on_death) = (config.slot, config.on_death.clone());
        let context = Context::<Self>::new();
        let address = actix::AsyncContext::address(&context);
        compute::spawn(config, work, address)?;
        Ok(context.run(Self {
            slot,
            state: RankState::default(),
            compute,
            aborts: HashMap::new(),
            reports,
            on_death,
        }))
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Run(job) => self.run(job),
            Effect::Abort { run, generation } => {
                if let Some(switch) = self.aborts.remove(&(run, generation)) {
                    switch.throw();
                }
            }
            Effect::Report(report) => {
                if self.reports.try_send(report).is_err() {
                    (self.on_death)(&format!("rank-{}: nobody takes its reports", self.slot));
                }
            }
            Effect::Ignore(ignored) => tracing::warn!(slot = self.slot, ?ignored, "message ignored"),
        }
    }

    fn run(&mut self, job: Job) {
        let abort = match &job {
            Job::Form(formation) => {
                let switch = Arc::new(AbortSwitch::default());
                self.aborts.insert((formation.spec.run, formation.generation), switch.clone());
                Some(switch)
            }
            _ => None,
        };
        if self.compute.try_send(Work { job, abort }).is_err() {
            // The thread is gone; its guard has reported that already.
            tracing::error!(slot = self.slot, "the compute thread takes no work");
        }
    }
}

impl Actor for TrainerRank {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(MAILBOX);
    }
}

impl Handler<Deliver> for TrainerRank {
    type Result = ();

    fn handle(&mut self, Deliver(event): Deliver, _context: &mut Self::Context) {
        for effect in self.state.handle(event) {
            self.perform(effect);
        }
    }
}

impl Drop for TrainerRank {
    fn drop(&mut self) {
        // Whatever the thread waits in ends, so that it sees its channel closed.
        self.aborts.values().for_each(|switch| switch.throw());
        if std::thread::panicking() {
            (self.on_death)(&format!("the actor of rank-{} has panicked", self.slot));
        }
    }
}

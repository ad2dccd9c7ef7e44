//! The compute thread of a rank slot: owns the weights, works through jobs one by one.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use actix::{Addr, WeakAddr};
use bytes::Bytes;

use crate::{
    collective::Collective,
    kernels::lower_thread_priority,
    model::{BaseModel, LoraLayout, ModelError, TrainState, Workspace},
    protocol::{OpToken, Operation, RankIndex, RunSpec},
    types::{ErrorKind, OperationError, RunId},
};

use super::{
    Failure, Prepared, RankConfig,
    abort::AbortSwitch,
    actor::{Deliver, TrainerRank},
    operation,
    state::{Done, Event, Formation, Job},
};

/// A job, and for a formation the switch that breaks its collectives.
pub(super) struct Work {
    pub(super) job: Job,
    pub(super) abort: Option<Arc<AbortSwitch>>,
}

/// What a rank holds of one run.
pub(super) struct HeldRun {
    pub(super) spec: RunSpec,
    pub(super) rank: RankIndex,
    /// Cores that this rank asks for: the node's, divided among the run's ranks on it.
    pub(super) cores: usize,
    pub(super) model: Arc<BaseModel>,
    pub(super) collective: Box<dyn Collective>,
    pub(super) abort: Arc<AbortSwitch>,
    /// The committed state.
    pub(super) state: TrainState,
    pending: Option<Pending>,
}

/// The second buffer.
struct Pending {
    token: OpToken,
    /// Becomes the state on commit; absent if the operation failed here.
    on_commit: Option<TrainState>,
    /// Becomes the state on discard; absent: it stays as it is.
    on_discard: Option<TrainState>,
}

/// What every run of the slot computes with.
pub(super) struct Tools {
    pub(super) config: RankConfig,
    pub(super) workspace: Workspace,
    pub(super) progress: Progress,
}

/// Tells the actor how far an operation is, no more often than the rank is configured to. Shared with
/// the workspace, which calls after each layer: one micro-batch of a long sequence may take longer than
/// an operation may be silent.
#[derive(Clone)]
pub(super) struct Progress(Arc<Mutex<Told>>);

struct Told {
    outlet: Outlet,
    every: Duration,
    at: Instant,
    /// The operation at work, its micro-batches done, and all of them.
    place: Option<(OpToken, u32, u32)>,
}

impl Progress {
    fn new(outlet: Outlet, every: Duration) -> Self {
        Self(Arc::new(Mutex::new(Told { outlet, every, at: Instant::now(), place: None })))
    }

    /// A new operation has begun, or one of its micro-batches is done.
    pub(super) fn stands_at(&self, token: OpToken, done: u32, of: u32) {
        self.told().place = Some((token, done, of));
        self.tell();
    }

    fn ended(&self) {
        self.told().place = None;
    }

    fn tell(&self) {
        let mut told = self.told();
        if let Some((token, done, of)) = told.place
            && told.at.elapsed() >= told.every
        {
            told.at = Instant::now();
            told.outlet.offer(Event::Progress { token, done, of });
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Compute {
    tools: Tools,
    runs: HashMap<RunId, HeldRun>,
    outlet: Outlet,
}

/// How this thread, and those that store its snapshots, reach the actor.
#[derive(Clone)]
struct Outlet {
    /// Weak, so that the actor ends with its node, and its threads with it.
    actor: WeakAddr<TrainerRank>,
    control: tokio::runtime::Handle,
}

/// Starts the thread `rank-N`. It ends when the sender of `work` is dropped.
pub(super) fn spawn(
    config: RankConfig,
    work: mpsc::Receiver<Work>,
    actor: Addr<TrainerRank>,
) -> std::io::Result<()> {
    let name = format!("rank-{}", config.slot);
    let outlet = Outlet { actor: actor.downgrade(), control: tokio::runtime::Handle::current() };
    spawn_guarded(name, config.on_death.clone(), move || {
        lower_thread_priority();
        let progress = Progress::new(outlet.clone(), config.progress_every);
        let mut workspace = Workspace::new(config.library.options());
        let at_work = progress.clone();
        workspace.after_each_layer(move || at_work.tell());
        let tools = Tools { config, workspace, progress };
        let mut compute = Compute { tools, runs: HashMap::new(), outlet };
        while let Ok(Work { job, abort }) = work.recv() {
            let done = compute.perform(job, abort);
            if !compute.outlet.deliver(Event::Done(done)) {
                break;
            }
        }
    })
}

impl Outlet {
    /// Waits for room in the mailbox, which no handler blocks. False once the actor has stopped.
    fn deliver(&self, event: Event) -> bool {
        let Some(actor) = self.actor.upgrade() else { return false };
        self.control.block_on(actor.send(Deliver(event))).is_ok()
    }

    /// For what is better left out than waited for.
    fn offer(&self, event: Event) {
        if let Some(actor) = self.actor.upgrade()
            && actor.try_send(Deliver(event)).is_err()
        {
            tracing::debug!("a rank's mailbox is full, or it has stopped");
        }
    }
}

/// A thread whose panic is told.
fn spawn_guarded(
    name: String,
    on_death: Arc<dyn Fn(&str) + Send + Sync>,
    work: impl FnOnce() + Send + 'static,
) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            on_death(&format!("thread {name} has panicked: {}", panic_message(&*panic)));
        }
    })?;
    Ok(())
}

impl Compute {
    fn perform(&mut self, job: Job, abort: Option<Arc<AbortSwitch>>) -> Done {
        match job {
            Job::Form(formation) => {
                let (run, epoch, generation) = (formation.spec.run, formation.epoch, formation.generation);
                let result = self.form(formation, abort.unwrap_or_default());
                Done::Formed { run, epoch, generation, result }
            }
            Job::Execute { token, operation } => {
                Done::Executed { token, result: self.execute(token, operation) }
            }
            Job::Commit { token } => self.settle(token, |pending| pending.on_commit),
            Job::Discard { token } => self.settle(token, |pending| pending.on_discard),
            Job::Snapshot { token } => Done::Snapshot { token, result: self.snapshot(token) },
            Job::Drop { run, .. } => {
                self.runs.remove(&run);
                Done::Applied
            }
        }
    }

    fn form(&mut self, formation: Formation, abort: Arc<AbortSwitch>) -> Result<(), Failure> {
        let config = &self.tools.config;
        let spec = &formation.spec;
        let model = config.library.load(&spec.base_model).map_err(|e| {
            let kind = match e {
                ModelError::Unknown { .. } => ErrorKind::NotFound,
                _ => ErrorKind::Internal,
            };
            OperationError::new(kind, format!("loading {:?}: {e}", spec.base_model))
        })?;
        let state = match formation.restore {
            Some(blob) => TrainState::from_bytes(&model.config, &config.blobs.get(blob)?).map_err(|e| {
                OperationError::new(ErrorKind::Internal, format!("restoring {}: {e}", spec.run))
            })?,
            None => TrainState::fresh(Arc::new(
                LoraLayout::new(&model.config, &spec.lora).map_err(OperationError::from)?,
            )),
        };
        let collective = self.join(&formation, &abort)?;
        abort.install(collective.abort_handle());
        let node = formation.roster.iter().find(|seat| seat.rank == formation.rank).map(|seat| seat.node);
        let neighbours = formation.roster.iter().filter(|seat| Some(seat.node) == node).count();
        let held = HeldRun {
            rank: formation.rank,
            cores: config.cores.cores().div_ceil(neighbours.max(1)),
            spec: formation.spec,
            model,
            collective,
            abort,
            state,
            pending: None,
        };
        self.runs.insert(held.spec.run, held);
        Ok(())
    }

    /// Meets the run's other ranks. A peer that died meanwhile would be waited for to the
    /// deadline: so the meeting is left to a thread of its own, and a release goes on without it.
    fn join(&self, formation: &Formation, abort: &AbortSwitch) -> Result<Box<dyn Collective>, Failure> {
        let config = &self.tools.config;
        if formation.roster.len() == 1 {
            return (config.join)(formation);
        }
        let run = formation.spec.run;
        let (met, meeting) = mpsc::channel();
        let called_off = met.clone();
        abort.install(Box::new(move || {
            let problem = format!("the ranks of {run} were called off while they met");
            // Nobody listens once the ranks have met.
            let _ = called_off.send(Err(Failure::environment(ErrorKind::Unavailable, problem)));
        }));
        let (join, formation) = (config.join.clone(), formation.clone());
        spawn_guarded(format!("rank-{}-join", config.slot), config.on_death.clone(), move || {
            // Nor if they were called off: what was joined is left again.
            let _ = met.send(join(&formation));
        })
        .map_err(|e| OperationError::new(ErrorKind::ResourceExhausted, format!("joining {run}: {e}")))?;
        meeting.recv().unwrap_or_else(|_| {
            let problem = format!("the ranks of {run} could not meet: the joining thread died");
            Err(Failure::environment(ErrorKind::Internal, problem))
        })
    }

    fn execute(&mut self, token: OpToken, operation: Operation) -> Result<Prepared, Failure> {
        let run = self.runs.get_mut(&token.run).ok_or_else(|| not_held(token))?;
        if run.abort.is_thrown() {
            return Err(Failure::environment(ErrorKind::Unavailable, format!("{token} was called off")));
        }
        let _span = tracing::debug_span!("execute", %token, operation = operation.name()).entered();
        let clears_gradient = matches!(operation, Operation::OptimStep { .. });
        let outcome = operation::run(run, &mut self.tools, token, operation);
        self.tools.progress.ended();
        match outcome {
            Ok(operation::Outcome { next, result, saved }) => {
                let _span = tracing::debug_span!("digest").entered();
                let prepared = Prepared { state: next.digest(), result, saved, step: next.step };
                run.pending = Some(Pending { token, on_commit: Some(next), on_discard: None });
                Ok(prepared)
            }
            Err(failure) => {
                // A step whose gradient is not finite uses the gradient up; everything else
                // that fails leaves no trace.
                let used_up = clears_gradient && failure.error.kind == ErrorKind::NotFinite;
                let on_discard = used_up.then(|| run.state.without_gradient());
                run.pending = Some(Pending { token, on_commit: None, on_discard });
                Err(failure)
            }
        }
    }

    fn settle(&mut self, token: OpToken, choose: fn(Pending) -> Option<TrainState>) -> Done {
        if let Some(run) = self.runs.get_mut(&token.run)
            && let Some(pending) = run.pending.take_if(|pending| pending.token == token)
            && let Some(state) = choose(pending)
        {
            run.state = state;
        }
        Done::Applied
    }

    /// Stores the present state from a thread of its own: the next operation need not wait for
    /// a disk. The state is shared with it, not copied.
    fn snapshot(&self, token: OpToken) -> Result<(), OperationError> {
        let state = self.runs.get(&token.run).ok_or_else(|| not_held(token).error)?.state.clone();
        let config = &self.tools.config;
        let (blobs, outlet) = (config.blobs.clone(), self.outlet.clone());
        spawn_guarded(format!("rank-{}-store", config.slot), config.on_death.clone(), move || {
            lower_thread_priority();
            let result = blobs.put(Bytes::from(state.to_bytes()));
            outlet.deliver(Event::SnapshotStored { token, result });
        })
        .map_err(|e| OperationError::new(ErrorKind::ResourceExhausted, format!("storing {token}: {e}")))
    }
}

fn not_held(token: OpToken) -> Failure {
    Failure::environment(ErrorKind::Unavailable, format!("{token}: its rank is no longer held here"))
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

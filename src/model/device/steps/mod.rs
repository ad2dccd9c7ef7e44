//! Steps of decoding that are recorded and replayed.
//!
//! A step in which each sequence gets one token is some fifteen small launches a layer, of which a GPU does each in less
//! time than it takes to launch it. The next step is the same launches over other inputs: so they are recorded once and done
//! again as one launch.
//!
//! ```text
//!   one copy    tokens, positions, pages of this step ──► lists       at the same addresses each time
//!   one launch  lists ──► embedding, layers ──► residual stream        recorded
//!   one kernel  the rows that were asked for ──► last norm             into an array of the caller's own
//! ```
//!
//! Steps of about as many rows and pages are made the same by rows that nobody reads ([`padded`](Draft::padded)). What the
//! recording has the addresses of stays as it is as long as the recording is kept: the lists' array, the pool of what is
//! computed in between, the rotary tables, the adapters, the weights. Which pages a sequence has is one of the lists, so
//! pages may come, go and be copied.
//!
//! The first time that a step of a kind comes it runs plainly, which fills the pool and has cuBLAS choose; the second time
//! it is recorded. Steps of one number of rows share a pool: they take turns, and nothing in it outlives a step. If
//! anything fails, the step runs plainly and says so, and after three failures in a row all do.

mod padded;
#[cfg(test)]
mod tests;

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    gpu::{Array, Element, Gpu, GpuError, Graph, Lists, PAGE, Pool},
    model::ModelConfig,
};

use super::{
    DeviceAdapter, DeviceModel, DeviceSequence,
    forward::layers,
    memory::{step_row, steps_most},
    plan::{Draft, Plan},
};
use padded::{Asked, Padded};

/// Recorded steps of a model, at most. What the driver keeps of each, some hundred bytes a launch, is in no figure of memory.
const STEPS_MOST: usize = 32;

/// Failures in a row after which none is recorded any more: one may be a moment's, such as memory that is short.
const FAILURES_MOST: u32 = 3;

/// The recorded steps of a model.
pub(super) struct Steps {
    /// None is recorded any more.
    is_off: bool,
    /// In a row.
    failures: u32,
    /// Bytes that they hold at most, all together, and about those of a row of one.
    most: u64,
    row: u64,
    /// What rows that nobody reads have for a cache: a page.
    padding: Option<Array>,
    /// The one that was used last is the last.
    recorded: Vec<Recorded>,
}

/// One of them.
struct Recorded {
    // Before what it has addresses of.
    /// Absent: it came once, and ran plainly.
    graph: Option<Graph>,
    key: Key,
    /// The plan's lists, written anew for each step.
    lists: Array,
    /// The residual stream behind the last layer, f32 `[padded rows, d]`.
    last: Option<Array>,
    /// What else the recording reads: rotary tables, adapters.
    _reads: Vec<Array>,
    /// What is computed in between.
    pool: Pool,
}

/// What steps have in common that are one recording.
struct Key {
    /// Rows, padded, and their adapter.
    segments: Vec<(usize, Option<Weak<DeviceAdapter>>)>,
    /// Of the table.
    per_sequence: usize,
}

/// Steps of decoding, each sequence getting one token; of a model, or of a process.
#[derive(Debug, Default)]
pub struct StepCounts {
    plain: AtomicU64,
    replayed: AtomicU64,
    recorded: AtomicU64,
}

/// Of all models of this process, for whoever measures it.
static OF_PROCESS: StepCounts =
    StepCounts { plain: AtomicU64::new(0), replayed: AtomicU64::new(0), recorded: AtomicU64::new(0) };

/// How a step was done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Plainly,
    Replayed,
    /// And replayed at once.
    Recorded,
}

/// The final hidden states of a step, if it is one of decoding that may be replayed; `None`: it is to be run plainly.
///
/// # Panics
///
/// As [`forward`](super::forward()).
pub(super) fn decode(
    model: &DeviceModel,
    sequences: &mut [DeviceSequence<'_>],
) -> Result<Option<Array>, GpuError> {
    let gets_a_token = |s: &DeviceSequence<'_>| s.cache.is_some() && s.tokens.len() == 1;
    if sequences.is_empty() || !sequences.iter().all(gets_a_token) {
        return Ok(None);
    }
    let mut steps = model.steps();
    let mut ran = None;
    if !steps.is_off {
        let draft = Draft::new(model, sequences)?;
        ran = steps.run(model, draft).unwrap_or_else(|error| {
            steps.failed(&error);
            None
        });
    }
    let done = ran.as_ref().map_or(Done::Plainly, |(.., done)| *done);
    model.counts.count(done);
    OF_PROCESS.count(done);
    ran.map(|(last, rows, _)| rows.final_norm(model, &last)).transpose()
}

impl Steps {
    pub(super) fn new(config: &ModelConfig, element: Element) -> Self {
        let element = element.bytes() as u64;
        let (most, row) = (steps_most(config, element), step_row(config, element));
        Self { is_off: false, failures: 0, most, row, padding: None, recorded: Vec::new() }
    }

    /// Forgets all, and records none any more.
    pub(super) fn turn_off(&mut self) {
        self.is_off = true;
        self.forget();
    }

    /// Forgets all: whatever failed, the next step begins anew, unless that has failed too often.
    fn failed(&mut self, error: &GpuError) {
        self.forget();
        self.failures += 1;
        if self.failures < FAILURES_MOST {
            tracing::warn!("a step of decoding can't be recorded or replayed, and runs plainly: {error}");
        } else {
            tracing::warn!("steps of decoding are not recorded any more, which makes them slower: {error}");
            self.turn_off();
        }
    }

    fn forget(&mut self) {
        self.recorded.clear();
        self.padding = None;
    }

    /// Forgets those whose adapter nobody has any more.
    pub(super) fn forget_retired(&mut self) {
        self.recorded.retain(|step| !step.key.is_retired());
    }

    /// Bytes that they hold.
    fn bytes(&self) -> u64 {
        let lists: u64 = self.recorded.iter().map(|step| step.lists.bytes() as u64).sum();
        let of_pool = |(i, step): (usize, &Recorded)| {
            let is_known = self.recorded[..i].iter().any(|before| before.pool.is(&step.pool));
            if is_known { 0 } else { step.pool.bytes() }
        };
        let pools: u64 = self.recorded.iter().enumerate().map(of_pool).sum();
        lists + pools + self.padding.as_ref().map_or(0, |page| page.bytes() as u64)
    }

    /// Runs a step: the residual stream behind its last layer, and which of the rows were asked for. `None` if it is of too
    /// many rows or adapters.
    fn run(
        &mut self,
        model: &DeviceModel,
        draft: Draft<'_>,
    ) -> Result<Option<(Array, Asked, Done)>, GpuError> {
        self.forget_retired();
        let Some(Padded { draft, rows }) = draft.padded(self.padding(model)?) else { return Ok(None) };
        let (lists, layout) = draft.lists(model);
        let found = self.recorded.iter().position(|step| step.key.is_of(&draft));
        let mut step = match found {
            Some(index) => self.recorded.remove(index),
            None => self.new_step(&model.gpu, &draft, &lists)?,
        };
        model.gpu.write_lists(&lists, &step.lists)?;
        let done = match (&step.graph, found) {
            (Some(graph), _) => {
                // SAFETY: the step has all that the graph reads and writes, but for the weights, which the model has, and
                // pages of caches: of those it has no address but what the lists say, which are these sequences' own.
                unsafe { model.gpu.replay(graph) }?;
                Done::Replayed
            }
            (None, Some(_)) => {
                step.record(model, Plan::over(model, draft, &step.lists, &layout)?)?;
                Done::Recorded
            }
            (None, None) => {
                let plan = Plan::over(model, draft, &step.lists, &layout)?;
                step.last = Some(model.gpu.pooled(&step.pool, || layers(model, &plan, None))?);
                Done::Plainly
            }
        };
        let last = step.last.clone();
        self.recorded.push(step);
        if done != Done::Plainly {
            self.failures = 0;
        }
        if done != Done::Replayed {
            self.make_room(0);
        }
        Ok(Some((last.expect("a step that ran has left the residual stream"), rows, done)))
    }

    /// A page for rows that nobody reads, counted in elements from address 0.
    fn padding(&mut self, model: &DeviceModel) -> Result<u64, GpuError> {
        let page = match self.padding.take() {
            Some(page) => page,
            None => model.gpu.array(model.element, 2 * model.config.num_layers * PAGE * model.key_width())?,
        };
        let page = self.padding.insert(page);
        Ok(page.address() / page.element().bytes() as u64)
    }

    /// A step that has not come yet, with the pool of those of as many rows.
    fn new_step(&mut self, gpu: &Gpu, draft: &Draft<'_>, lists: &Lists) -> Result<Recorded, GpuError> {
        let rows = draft.rows();
        let pool = self.recorded.iter().find(|step| step.key.rows() == rows).map(|step| step.pool.clone());
        let pool = pool.unwrap_or_else(|| {
            self.make_room(rows as u64 * self.row);
            gpu.pool()
        });
        let (key, lists) = (Key::of(draft), gpu.array_for(lists)?);
        Ok(Recorded { graph: None, key, lists, last: None, _reads: Vec::new(), pool })
    }

    /// Forgets what was not used for longest, until there is room for so many bytes more, and the rest is few enough.
    fn make_room(&mut self, bytes: u64) {
        let is_full = |steps: &Self| steps.recorded.len() > STEPS_MOST || steps.bytes() + bytes > steps.most;
        while !self.recorded.is_empty() && is_full(self) {
            self.recorded.remove(0);
        }
    }
}

impl Recorded {
    /// Records the step and does it.
    fn record(&mut self, model: &DeviceModel, plan: Plan) -> Result<(), GpuError> {
        // It goes back to the pool, where the recording finds it.
        self.last = None;
        let (graph, last) = model.gpu.record(&self.pool, || layers(model, &plan, None))?;
        let adapters = plan.segments.iter().filter_map(|segment| segment.adapter.as_ref());
        let reads = adapters.map(|adapter| adapter.values.clone()).chain(plan.cos_sin);
        self._reads = reads.collect();
        self.last = Some(last);
        // SAFETY: as at every replay.
        unsafe { model.gpu.replay(&graph) }?;
        self.graph = Some(graph);
        Ok(())
    }
}

impl Key {
    fn of(draft: &Draft<'_>) -> Self {
        let segments = draft.segments.iter();
        let segments = segments.map(|s| (s.rows.len(), s.adapter.as_ref().map(Arc::downgrade))).collect();
        Self { segments, per_sequence: draft.per_sequence }
    }

    fn is_of(&self, draft: &Draft<'_>) -> bool {
        // A watch keeps the place of what it watched, so no later adapter is taken for it.
        let is_same = |watched: &Option<Weak<DeviceAdapter>>, adapter: &Option<Arc<DeviceAdapter>>| match (
            watched, adapter,
        ) {
            (Some(watched), Some(adapter)) => watched.as_ptr() == Arc::as_ptr(adapter),
            (None, None) => true,
            _ => false,
        };
        self.per_sequence == draft.per_sequence
            && self.segments.len() == draft.segments.len()
            && self.segments.iter().zip(&draft.segments).all(|((rows, watched), segment)| {
                *rows == segment.rows.len() && is_same(watched, &segment.adapter)
            })
    }

    fn rows(&self) -> usize {
        self.segments.iter().map(|(rows, _)| rows).sum()
    }

    fn is_retired(&self) -> bool {
        self.segments.iter().any(|(_, adapter)| adapter.as_ref().is_some_and(|a| a.strong_count() == 0))
    }
}

impl StepCounts {
    /// Of all models of this process.
    pub fn of_process() -> &'static Self {
        &OF_PROCESS
    }

    /// Steps that were launched kernel by kernel, those that were replayed, and those of the latter that were recorded for it.
    pub fn now(&self) -> [u64; 3] {
        [&self.plain, &self.replayed, &self.recorded].map(|count| count.load(Ordering::Relaxed))
    }

    fn count(&self, done: Done) {
        let counts: &[&AtomicU64] = match done {
            Done::Plainly => &[&self.plain],
            Done::Replayed => &[&self.replayed],
            Done::Recorded => &[&self.replayed, &self.recorded],
        };
        counts.iter().for_each(|count| _ = count.fetch_add(1, Ordering::Relaxed));
    }
}

//! Who may compute, on how many cores.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use super::team::{Team, Worker};

/// A node's cores: a persistent pool of worker threads, leased step by step.
#[derive(Clone)]
pub struct CoreBudget {
    pool: Arc<Pool>,
}

/// Who asks for cores: sampling yields to training between two of its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    Training,
    Sampling,
}

/// Cores held until dropped.
pub struct Lease {
    pool: Arc<Pool>,
    priority: Priority,
    cores: usize,
    team: Team,
}

struct Pool {
    cores: usize,
    state: Mutex<State>,
    changed: Condvar,
    threads: Vec<(Arc<Worker>, JoinHandle<()>)>,
}

struct State {
    free_cores: usize,
    /// Workers that no lease holds: at least `free_cores - 1`, since each lease brings the
    /// thread that asked for it.
    idle: Vec<Arc<Worker>>,
    training: Queue,
    sampling: Queue,
}

/// Those of one priority.
#[derive(Default)]
struct Queue {
    /// Tickets of those who wait, in order of arrival.
    waiting: VecDeque<u64>,
    next_ticket: u64,
    holders: usize,
    rivals: Rivals,
}

/// How many have lately wanted cores at the same time.
///
/// A rank holds no lease while it reduces or waits for its next operation. If a share counted
/// only those present, the rank that comes first would take all cores, and the second would
/// wait a whole step; so a share remembers who was there during the last few steps.
struct Rivals {
    recent: usize,
    peak: usize,
    releases: usize,
}

/// Releases after which a rival that never came back is forgotten.
const MEMORY: usize = 8;

impl CoreBudget {
    /// A budget of `cores` (at least 1). Starts `cores - 1` worker threads, or as many as the
    /// system allows: the budget then is smaller.
    pub fn new(cores: usize) -> Self {
        let mut threads = Vec::new();
        for index in 1..cores.max(1) {
            match Worker::spawn(index) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    tracing::warn!(%error, cores, started = index, "fewer compute threads than asked for");
                    break;
                }
            }
        }
        let cores = threads.len() + 1;
        let state = State {
            free_cores: cores,
            idle: threads.iter().map(|(worker, _)| worker.clone()).collect(),
            training: Queue::default(),
            sampling: Queue::default(),
        };
        let pool = Pool { cores, state: Mutex::new(state), changed: Condvar::new(), threads };
        Self { pool: Arc::new(pool) }
    }

    /// Number of cores.
    pub fn cores(&self) -> usize {
        self.pool.cores
    }

    /// Waits until a core is free (and, for sampling, no training waits), then takes between
    /// 1 and `want` cores: what is free, and no more than a fair share of all cores if others
    /// of the same priority want some. Equals are served in order of arrival.
    ///
    /// A thread that holds a lease may not ask for another one: it could wait for itself.
    pub fn lease(&self, want: usize, priority: Priority) -> Lease {
        let mut state = self.pool.lock();
        let ticket = state.queue(priority).arrive();
        while !state.may_take(priority, ticket) {
            state = self.pool.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let share = state.queue(priority).enter(self.pool.cores);
        let cores = want.clamp(1, share).min(state.free_cores);
        state.free_cores -= cores;
        let keep = state.idle.len() - (cores - 1);
        let team = Team::of(state.idle.split_off(keep));
        drop(state);
        // Whoever is next may find cores left.
        self.pool.changed.notify_all();
        Lease { pool: self.pool.clone(), priority, cores, team }
    }
}

#[cfg(test)]
impl CoreBudget {
    /// How many of a priority wait.
    pub(super) fn waiting(&self, priority: Priority) -> usize {
        self.pool.lock().queue(priority).waiting.len()
    }
}

impl Lease {
    /// The team of this lease.
    pub fn team(&self) -> &Team {
        &self.team
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.free_cores += self.cores;
        state.idle.append(&mut self.team.take_workers());
        state.queue(self.priority).leave();
        drop(state);
        self.pool.changed.notify_all();
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (worker, _) in &self.threads {
            worker.quit();
        }
        for (_, thread) in self.threads.drain(..) {
            // A worker catches what its tasks throw, so it ends in order.
            let _ = thread.join();
        }
    }
}

impl State {
    fn queue(&mut self, priority: Priority) -> &mut Queue {
        match priority {
            Priority::Training => &mut self.training,
            Priority::Sampling => &mut self.sampling,
        }
    }

    fn may_take(&mut self, priority: Priority, ticket: u64) -> bool {
        let yields = priority == Priority::Sampling && !self.training.waiting.is_empty();
        self.free_cores > 0 && !yields && self.queue(priority).waiting.front() == Some(&ticket)
    }
}

impl Queue {
    fn arrive(&mut self) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.push_back(ticket);
        ticket
    }

    /// The first in the queue becomes a holder; returns its share of `cores`.
    fn enter(&mut self, cores: usize) -> usize {
        self.waiting.pop_front();
        self.holders += 1;
        cores.div_ceil(self.rivals.seen(self.holders + self.waiting.len()))
    }

    fn leave(&mut self) {
        let rivals = self.holders + self.waiting.len();
        self.holders -= 1;
        self.rivals.released(rivals);
    }
}

impl Rivals {
    /// Notes how many are there now; returns how many share.
    fn seen(&mut self, now: usize) -> usize {
        self.peak = self.peak.max(now);
        self.recent.max(self.peak)
    }

    fn released(&mut self, now: usize) {
        self.peak = self.peak.max(now);
        self.releases += 1;
        if self.releases == MEMORY {
            *self = Self { recent: self.peak, ..Self::default() };
        }
    }
}

impl Default for Rivals {
    fn default() -> Self {
        Self { recent: 1, peak: 1, releases: 0 }
    }
}

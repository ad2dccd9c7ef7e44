//! The cores of a node, leased to whoever computes.

/// A node's cores: a persistent pool of worker threads, leased step by step.
#[derive(Clone)]
pub struct CoreBudget {}

/// Who asks for cores: sampling yields to training between two of its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    Training,
    Sampling,
}

/// Cores held until dropped.
pub struct Lease {}

/// The threads that one computation runs on; the caller's own thread is one of them.
pub struct Team {}

impl CoreBudget {
    /// A budget of `cores` (at least 1); starts `cores - 1` … worker threads.
    pub fn new(cores: usize) -> Self {
        let _ = cores;
        todo!()
    }

    /// Waits until a core is free (and, for sampling, no training waits), then takes between
    /// 1 and `want` cores.
    pub fn lease(&self, want: usize, priority: Priority) -> Lease {
        let _ = (want, priority);
        todo!()
    }
}

impl Lease {
    /// The team of this lease.
    pub fn team(&self) -> &Team {
        todo!()
    }
}

impl Team {
    /// Only the calling thread.
    pub fn solo() -> Self {
        todo!()
    }

    /// Number of threads.
    pub fn width(&self) -> usize {
        todo!()
    }

    /// Runs `task(0) … task(tasks - 1)` on the team and returns when all are done. Results
    /// may not depend on which thread ran what.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, task: F) {
        let _ = (tasks, task);
        todo!()
    }
}

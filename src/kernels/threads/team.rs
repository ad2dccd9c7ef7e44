//! Threads that work on one computation.
//!
//! The caller posts a job to each of its workers, takes tasks itself, takes back what no worker
//! has picked up, and waits for those that did. A worker that the system has put aside thus
//! delays nobody.

use std::{
    any::Any,
    cell::Cell,
    hint,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, Thread},
};

use super::lower_thread_priority;

/// Looks at a flag this often before a thread goes to sleep: some 30 µs, a few times what
/// waking a thread costs, and longer than the gaps between two kernels of a layer.
const SPINS: usize = 2_000;

/// The threads that one computation runs on; the caller's own thread is one of them.
pub struct Team {
    workers: Vec<Arc<Worker>>,
    /// A worker has room for one job, so only one thread may post: a team is not `Sync`.
    one_caller: PhantomData<Cell<()>>,
}

/// A thread of the pool, asleep unless it has a job.
pub(super) struct Worker {
    /// The job it shall help with; null when it has none or has picked it up.
    job: AtomicPtr<Job>,
    quit: AtomicBool,
    thread: OnceLock<Thread>,
}

/// What a team runs, on the stack of the caller.
struct Job {
    task: *const (),
    call: unsafe fn(*const (), usize),
    tasks: usize,
    next: AtomicUsize,
    /// Workers that have or may still pick up this job.
    helpers: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

impl Team {
    /// Only the calling thread.
    pub fn solo() -> Self {
        Self::of(Vec::new())
    }

    pub(super) fn of(workers: Vec<Arc<Worker>>) -> Self {
        Self { workers, one_caller: PhantomData }
    }

    pub(super) fn take_workers(&mut self) -> Vec<Arc<Worker>> {
        std::mem::take(&mut self.workers)
    }

    /// Number of threads.
    pub fn width(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0) … task(tasks - 1)` on the team and returns when all are done. Results
    /// may not depend on which thread ran what.
    ///
    /// # Panics
    ///
    /// If a task panics, with its payload, after the others have ended.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, task: F) {
        unsafe fn call<F: Fn(usize)>(task: *const (), index: usize) {
            // SAFETY: `run` made this pointer from an `F` that it keeps until all are done.
            unsafe { (*task.cast::<F>())(index) }
        }
        let helpers = self.workers.len().min(tasks.saturating_sub(1));
        if helpers == 0 {
            return (0..tasks).for_each(task);
        }
        let job = Job {
            task: ptr::from_ref(&task).cast(),
            call: call::<F>,
            tasks,
            next: AtomicUsize::new(0),
            helpers: AtomicUsize::new(helpers),
            panic: Mutex::new(None),
            caller: thread::current(),
        };
        for worker in &self.workers[..helpers] {
            worker.post(&job);
        }
        job.work();
        for worker in &self.workers[..helpers] {
            worker.take_back(&job);
        }
        wait_until(|| job.helpers.load(Ordering::Acquire) == 0);
        let panic = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Worker {
    /// Starts a worker's thread; it ends with [`Worker::quit`].
    pub(super) fn spawn(index: usize) -> std::io::Result<(Arc<Self>, JoinHandle<()>)> {
        let worker = Arc::new(Self {
            job: AtomicPtr::new(ptr::null_mut()),
            quit: AtomicBool::new(false),
            thread: OnceLock::new(),
        });
        let its = worker.clone();
        let handle = thread::Builder::new().name(format!("compute-{index}")).spawn(move || its.serve())?;
        worker.thread.get_or_init(|| handle.thread().clone());
        Ok((worker, handle))
    }

    /// Tells the thread to end.
    pub(super) fn quit(&self) {
        self.quit.store(true, Ordering::Release);
        self.wake();
    }

    fn serve(&self) {
        lower_thread_priority();
        while !self.quit.load(Ordering::Acquire) {
            let job = self.job.swap(ptr::null_mut(), Ordering::AcqRel);
            if job.is_null() {
                wait_once(|| {
                    !self.job.load(Ordering::Relaxed).is_null() || self.quit.load(Ordering::Relaxed)
                });
                continue;
            }
            // SAFETY: whoever posted the job keeps it until `helpers` is 0, and this worker,
            // having picked it up, is one of them until `leave`.
            let job = unsafe { &*job };
            job.work();
            job.leave();
        }
    }

    fn post(&self, job: &Job) {
        self.job.store(ptr::from_ref(job).cast_mut(), Ordering::Release);
        self.wake();
    }

    /// Takes a job back unless the worker has picked it up.
    fn take_back(&self, job: &Job) {
        let posted = ptr::from_ref(job).cast_mut();
        let null = ptr::null_mut();
        if self.job.compare_exchange(posted, null, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            job.helpers.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

impl Job {
    /// Runs tasks until none is left.
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                return;
            }
            // SAFETY: `task` is the closure that `call` was made for, alive while the job is.
            let run = AssertUnwindSafe(|| unsafe { (self.call)(self.task, index) });
            if let Err(payload) = catch_unwind(run) {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
        }
    }

    /// A worker's last touch of the job.
    fn leave(&self) {
        // Cloned first: once `helpers` is 0 the job may be gone.
        let caller = self.caller.clone();
        if self.helpers.fetch_sub(1, Ordering::AcqRel) == 1 {
            caller.unpark();
        }
    }
}

/// Spins for a moment, then sleeps, until `done`.
fn wait_until(done: impl Fn() -> bool) {
    while !done() {
        wait_once(&done);
    }
}

/// Spins for a moment, then sleeps until somebody unparks this thread.
fn wait_once(done: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if done() {
            return;
        }
        hint::spin_loop();
    }
    thread::park();
}

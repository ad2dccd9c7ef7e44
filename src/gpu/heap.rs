//! A GPU's memory in use: counted, and given back to where it came from.
//!
//! ```text
//!   mostly                     backend ──► array ──► backend
//!   a step that is prepared    pool, else backend ──► array ──► pool
//!   a step that is recorded    pool ──► array ──► pool;  what else is freed waits for the end
//! ```
//!
//! While a CUDA stream is recorded, whatever is done on it becomes part of the recording: an allocation memory of its own,
//! and a free, on any thread, an error that ends the recording. So every free asks here first.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{GpuError, emulator, graph};

/// Memory of a GPU, counted as long as it lives.
pub(super) struct Memory {
    /// There until it is dropped.
    place: Option<Place>,
    bytes: usize,
    heap: Arc<Heap>,
    /// Where it goes then; absent: back to the backend.
    pool: Option<Pool>,
}

/// Memory as the backend has it.
pub(super) enum Place {
    Emulated(emulator::Memory),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Memory),
}

/// Memory that one step leaves to the next: of each size, as much as a step has had at once. It goes when the pool and all
/// arrays out of it are gone.
#[derive(Clone)]
pub(crate) struct Pool(Arc<PoolInner>);

struct PoolInner {
    heap: Arc<Heap>,
    /// By bytes.
    free: Mutex<HashMap<usize, Vec<Place>>>,
    /// Of all its memory, free or not.
    bytes: AtomicU64,
}

/// What a GPU's arrays hold, and where they are allocated now.
#[derive(Default)]
pub(super) struct Heap {
    now: AtomicU64,
    most: AtomicU64,
    mode: Mutex<Mode>,
}

/// Where memory comes from.
#[derive(Default)]
enum Mode {
    #[default]
    Backend,
    /// For one thread, from a pool.
    Pooled(ThreadId, Pool),
    /// The same while what the thread launches is recorded, with what has to wait for the end.
    Recording(ThreadId, Pool, Vec<Garbage>),
}

/// What may not go while something is recorded.
pub(super) enum Garbage {
    Memory { _place: Place },
    Graph { _place: graph::Place },
}

/// Memory for an array, as [`Heap::source`] finds it.
pub(super) enum Source {
    Pool(Memory),
    /// The backend allocates; then it is [counted](Heap::counted), and the pool's if there is one.
    Backend(Option<Pool>),
}

/// A thread's use of a pool, until it is dropped.
pub(super) struct Pooled<'a>(&'a Heap);

impl Heap {
    /// Bytes that are held now, and the most at once.
    pub(super) fn held(&self) -> [u64; 2] {
        [self.now.load(Ordering::Relaxed), self.most.load(Ordering::Relaxed)]
    }

    /// Where this thread gets so many bytes. While it records, only what a run before has left is there.
    pub(super) fn source(&self, bytes: usize) -> Result<Source, GpuError> {
        self.admit(true)?;
        let (pool, is_recording) = match &*self.mode() {
            Mode::Pooled(thread, pool) if *thread == thread::current().id() => (pool.clone(), false),
            Mode::Recording(_, pool, _) => (pool.clone(), true),
            Mode::Pooled(..) | Mode::Backend => return Ok(Source::Backend(None)),
        };
        match pool.take(bytes) {
            Some(memory) => Ok(Source::Pool(memory)),
            None if is_recording => {
                Err(unrecordable(format!("it asks for {bytes} bytes that the run before did not have")))
            }
            None => Ok(Source::Backend(Some(pool))),
        }
    }

    pub(super) fn counted(self: &Arc<Self>, place: Place, bytes: usize, pool: Option<Pool>) -> Memory {
        let now = self.now.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.most.fetch_max(now, Ordering::Relaxed);
        if let Some(Pool(pool)) = &pool {
            pool.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        Memory { place: Some(place), bytes, heap: self.clone(), pool }
    }

    /// Refuses what would spoil a recording: that of another thread, or this one's by what can't be part of it.
    pub(super) fn admit(&self, is_recordable: bool) -> Result<(), GpuError> {
        match &*self.mode() {
            Mode::Recording(thread, ..) if *thread != thread::current().id() => {
                Err(unrecordable("a thread computes that has no turn".to_owned()))
            }
            Mode::Recording(..) if !is_recordable => {
                Err(unrecordable("copies to and from the host are no part of a recording".to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// From here on this thread's memory comes from a pool, and goes back to it.
    pub(super) fn pooled(&self, pool: &Pool) -> Pooled<'_> {
        *self.mode() = Mode::Pooled(thread::current().id(), pool.clone());
        Pooled(self)
    }

    /// From here on nothing is freed, and memory comes from the pool alone.
    pub(super) fn recording(&self, pool: &Pool) -> Pooled<'_> {
        *self.mode() = Mode::Recording(thread::current().id(), pool.clone(), Vec::new());
        Pooled(self)
    }

    /// Lets something go, now or when nothing is recorded.
    pub(super) fn discard(&self, garbage: Garbage) {
        let mut mode = self.mode();
        match &mut *mode {
            Mode::Recording(.., waiting) => waiting.push(garbage),
            // Under the lock: no recording begins meanwhile.
            Mode::Backend | Mode::Pooled(..) => drop(garbage),
        }
    }

    fn mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, place: Place, bytes: usize) {
        self.now.fetch_sub(bytes as u64, Ordering::Relaxed);
        self.discard(Garbage::Memory { _place: place });
    }
}

impl Drop for Pooled<'_> {
    fn drop(&mut self) {
        let mut mode = self.0.mode();
        let pool = match mem::take(&mut *mode) {
            Mode::Backend => return,
            Mode::Pooled(_, pool) => pool,
            Mode::Recording(_, pool, waiting) => {
                drop(waiting);
                pool
            }
        };
        drop(mode);
        // The last of a pool frees its memory, for which it asks again.
        drop(pool);
    }
}

impl Memory {
    pub(super) fn place(&self) -> &Place {
        self.place.as_ref().expect("memory has its place until it is dropped")
    }

    pub(super) fn address(&self) -> u64 {
        match self.place() {
            Place::Emulated(memory) => memory.address(),
            #[cfg(feature = "cuda")]
            Place::Cuda(memory) => memory.address(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(place) = self.place.take() else { return };
        match &self.pool {
            Some(pool) => pool.put(self.bytes, place),
            None => self.heap.free(place, self.bytes),
        }
    }
}

impl Pool {
    pub(super) fn new(heap: &Arc<Heap>) -> Self {
        Self(Arc::new(PoolInner { heap: heap.clone(), free: Mutex::default(), bytes: AtomicU64::new(0) }))
    }

    /// Bytes of all its memory, in use or not.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Whether both are one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn take(&self, bytes: usize) -> Option<Memory> {
        let place = self.free().get_mut(&bytes)?.pop()?;
        Some(Memory { place: Some(place), bytes, heap: self.0.heap.clone(), pool: Some(self.clone()) })
    }

    fn put(&self, bytes: usize, place: Place) {
        self.free().entry(bytes).or_default().push(place);
    }

    fn free(&self) -> MutexGuard<'_, HashMap<usize, Vec<Place>>> {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PoolInner {
    fn drop(&mut self) {
        let free = mem::take(self.free.get_mut().unwrap_or_else(PoisonError::into_inner));
        for (bytes, places) in free {
            places.into_iter().for_each(|place| self.heap.free(place, bytes));
        }
    }
}

fn unrecordable(problem: String) -> GpuError {
    GpuError::Failed { call: "recording", problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On CUDA a free in the middle of a recording would end it.
    #[test]
    fn what_is_freed_while_something_is_recorded_waits_for_the_end() {
        let heap = Arc::new(Heap::default());
        let memory = |pool| {
            let place = Place::Emulated(emulator::Memory::new(64).unwrap());
            heap.counted(place, 64, pool)
        };
        let (pool, other) = (Pool::new(&heap), Pool::new(&heap));
        let [from_pool, from_other, from_backend] = [Some(pool.clone()), Some(other), None].map(memory);
        let waiting = || match &*heap.mode() {
            Mode::Recording(.., waiting) => waiting.len(),
            _ => 0,
        };
        let recording = heap.recording(&pool);
        drop(from_pool);
        assert_eq!(waiting(), 0, "it went back to its pool");
        drop(from_backend);
        assert_eq!(waiting(), 1);
        // Its pool is gone but for it.
        drop(from_other);
        assert_eq!((waiting(), heap.held()), (2, [64, 192]));
        drop(recording);
        assert!(matches!(&*heap.mode(), Mode::Backend));
        drop(pool);
        assert_eq!(heap.held(), [0, 192]);
    }

    #[test]
    fn memory_of_a_pool_is_for_its_size_and_for_the_thread_that_uses_it() {
        let heap = Arc::new(Heap::default());
        let pool = Pool::new(&heap);
        let place = Place::Emulated(emulator::Memory::new(64).unwrap());
        drop(heap.counted(place, 64, Some(pool.clone())));
        let _pooled = heap.pooled(&pool);
        let from_pool = |bytes| matches!(heap.source(bytes).unwrap(), Source::Pool(_));
        assert_eq!([from_pool(64), from_pool(32), from_pool(128)], [true, false, false]);
        assert!(!thread::scope(|scope| scope.spawn(|| from_pool(64)).join().unwrap()));
        assert!(from_pool(64), "it came back");
    }
}

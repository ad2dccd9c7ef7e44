//! Work that is recorded once and done again as one launch: on CUDA by capturing the stream into a graph, in the emulation
//! as a list.
//!
//! A recording has addresses, not arrays: what it is done again with is written to the same places before, and whoever
//! holds it keeps everything that it reads and writes. It allocates nothing, so a run that is not recorded comes first, and
//! leaves its memory in a [`Pool`].

use std::sync::Arc;

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    Gpu, GpuError, Pool, emulator,
    heap::{Garbage, Heap, Pooled},
};

/// What was recorded.
pub(crate) struct Graph {
    /// There until it is dropped.
    place: Option<Place>,
    heap: Arc<Heap>,
}

/// A recording as the backend has it.
pub(super) enum Place {
    Emulated(emulator::Graph),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Graph),
}

/// A recording that has begun: it ends with it, whatever comes in between.
struct Recording<'a> {
    gpu: &'a Gpu,
    // Dropped behind it, when the stream is itself again.
    _pooled: Pooled<'a>,
    has_ended: bool,
}

impl Gpu {
    /// A pool without any memory.
    pub(crate) fn pool(&self) -> Pool {
        Pool::new(self.heap())
    }

    /// Runs `work`, whose arrays come from the pool as far as it has them, and go back to it.
    pub(crate) fn pooled<R>(
        &self,
        pool: &Pool,
        work: impl FnOnce() -> Result<R, GpuError>,
    ) -> Result<R, GpuError> {
        let _pooled = self.heap().pooled(pool);
        work()
    }

    /// Records what `work` launches instead of doing it. Whoever records has a [turn](Gpu::turn).
    ///
    /// Fails, and leaves the GPU as it was, if `work` does, if it asks for memory that the pool hasn't left of a
    /// [run](Self::pooled) before, or copies from or to the host.
    pub(crate) fn record<R>(
        &self,
        pool: &Pool,
        work: impl FnOnce() -> Result<R, GpuError>,
    ) -> Result<(Graph, R), GpuError> {
        let recording = Recording::begin(self, pool)?;
        let done = work();
        let graph = recording.end();
        // If both failed, the work did first.
        let done = done?;
        Ok((graph?, done))
    }

    /// Does again what was recorded.
    ///
    /// # Safety
    ///
    /// The arrays that the recorded work read and wrote are still there, those that were dropped within it in its pool.
    pub(crate) unsafe fn replay(&self, graph: &Graph) -> Result<(), GpuError> {
        self.heap().admit(false)?;
        let place = graph.place.as_ref().expect("a graph has its place until it is dropped");
        // SAFETY: by the caller's promise.
        unsafe { self.launch_graph(place) }
    }
}

impl<'a> Recording<'a> {
    fn begin(gpu: &'a Gpu, pool: &Pool) -> Result<Self, GpuError> {
        // First: a free that comes now waits already.
        let pooled = gpu.heap().recording(pool);
        gpu.begin_capture()?;
        Ok(Self { gpu, _pooled: pooled, has_ended: false })
    }

    fn end(mut self) -> Result<Graph, GpuError> {
        self.has_ended = true;
        let place = self.gpu.end_capture()?;
        Ok(Graph { place: Some(place), heap: self.gpu.heap().clone() })
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            // A panic is on its way: what was recorded is of no use.
            let _ = self.gpu.end_capture();
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.heap.discard(Garbage::Graph { _place: place });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{panic, thread};

    use super::*;
    use crate::gpu::{Array, Element, Factor, Product};

    const LEN: usize = 6;

    /// `(a + b) · 1`, by a kernel and a product, with an array in between.
    fn work(gpu: &Gpu, [a, b, one]: [&Array; 3]) -> Result<Array, GpuError> {
        let sum = gpu.sum(a, b)?;
        let result = gpu.array(Element::F32, LEN)?;
        let (left, right) = (Factor::Plain(&sum), Factor::Plain(one));
        let (alpha, beta, m, n, k) = (1.0, 0.0, LEN, 1, 1);
        gpu.product(Product { left, right, alpha, beta, result: &result, m, n, k })?;
        Ok(result)
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    #[test]
    fn what_is_recorded_is_done_at_each_replay_with_what_is_there_then() {
        let gpu = Gpu::emulated().unwrap();
        let [a, b] = [1.0, 10.0].map(|value| gpu.upload(Element::F32, &[value; LEN]).unwrap());
        let one = gpu.upload(Element::F32, &[1.0]).unwrap();
        let before = gpu.held()[0];
        let pool = gpu.pool();
        let plain = gpu.pooled(&pool, || work(&gpu, [&a, &b, &one])).unwrap();
        assert_eq!(gpu.download(&plain).unwrap(), [11.0; LEN]);
        drop(plain);
        let in_pool = 2 * 4 * LEN as u64;
        assert_eq!((pool.bytes(), gpu.held()[0]), (in_pool, before + in_pool), "the pool is counted");

        gpu.overwrite(&a, &bytes(&[2.0; LEN])).unwrap();
        let (graph, result) = gpu.record(&pool, || work(&gpu, [&a, &b, &one])).unwrap();
        assert_eq!(gpu.download(&result).unwrap(), [11.0; LEN], "nothing is done yet");
        assert_eq!(gpu.held()[0], before + in_pool, "nothing is allocated");
        for value in [2.0, 3.0, 4.0] {
            gpu.overwrite(&a, &bytes(&[value; LEN])).unwrap();
            // SAFETY: `a`, `b`, `one`, the result and the pool are there.
            unsafe { gpu.replay(&graph) }.unwrap();
            assert_eq!(gpu.download(&result).unwrap(), [value + 10.0; LEN]);
        }
        drop((graph, result, pool));
        assert_eq!(gpu.held()[0], before);
    }

    #[test]
    fn what_cannot_be_recorded_is_refused_and_leaves_the_gpu_as_it_was() {
        let gpu = Gpu::emulated().unwrap();
        let [a, b] = [1.0, 10.0].map(|value| gpu.upload(Element::F32, &[value; LEN]).unwrap());
        let one = gpu.upload(Element::F32, &[1.0]).unwrap();
        let pool = gpu.pool();
        let refused = |work: &dyn Fn() -> Result<(), GpuError>| {
            gpu.record(&pool, work).err().expect("it cannot be recorded").to_string()
        };
        let error = refused(&|| work(&gpu, [&a, &b, &one]).map(drop));
        assert!(error.contains("asks for 24 bytes that the run before did not have"), "{error}");
        gpu.pooled(&pool, || work(&gpu, [&a, &b, &one])).unwrap();
        let copies: [&dyn Fn() -> Result<(), GpuError>; 5] = [
            &|| gpu.overwrite(&a, &bytes(&[5.0; LEN])),
            &|| gpu.upload(Element::F32, &[5.0; LEN]).map(drop),
            &|| gpu.download(&a).map(drop),
            &|| gpu.zeros(Element::F32, LEN).map(drop),
            &|| gpu.synchronize(),
        ];
        for copy in copies {
            let error = refused(copy);
            assert!(error.contains("no part of a recording"), "{error}");
        }
        let panicked = panic::catch_unwind(panic::AssertUnwindSafe(|| {
            let _ = gpu.record::<()>(&pool, || {
                work(&gpu, [&a, &b, &one]).unwrap();
                panic!("in the middle");
            });
        }));
        assert!(panicked.is_err());
        assert_eq!(gpu.download(&work(&gpu, [&a, &b, &one]).unwrap()).unwrap(), [11.0; LEN]);
        assert!(gpu.record(&pool, || work(&gpu, [&a, &b, &one])).is_ok());
    }

    #[test]
    fn another_thread_gets_nothing_into_a_recording() {
        let gpu = Gpu::emulated().unwrap();
        let [a, b] = [1.0, 10.0].map(|value| gpu.upload(Element::F32, &[value; LEN]).unwrap());
        let (held, pool) = (gpu.held()[0], gpu.pool());
        gpu.pooled(&pool, || gpu.sum(&a, &b)).unwrap();
        let other = gpu.upload(Element::F32, &[7.0; LEN]).unwrap();
        let recorded = gpu.record(&pool, || {
            thread::scope(|scope| {
                let other = other;
                let computed = scope.spawn(|| {
                    let refused = gpu.sum(&other, &other).unwrap_err();
                    drop(other);
                    refused.to_string()
                });
                let refused = computed.join().unwrap();
                assert!(refused.contains("has no turn"), "{refused}");
            });
            gpu.sum(&a, &b)
        });
        let (graph, sum) = recorded.unwrap();
        // SAFETY: `a`, `b`, the sum and the pool are there.
        unsafe { gpu.replay(&graph) }.unwrap();
        assert_eq!(gpu.download(&sum).unwrap(), [11.0; LEN]);
        drop((graph, sum, pool));
        assert_eq!(gpu.held()[0], held);
    }
}

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

/// A handle of a C library that one thread uses and that any thread may end.
///
/// NCCL allows `ncclCommAbort` beside another call on the same communicator, and nothing else; and it
/// frees the communicator. So a call says that it runs, and the end waits until it has returned; only a call
/// that is stuck is broken into. Behind the end nothing gets the handle.
pub(super) struct Abortable<H> {
    state: Mutex<State<H>>,
    returned: Condvar,
}

struct State<H> {
    handle: Option<H>,
    in_call: bool,
}

/// How long a call may go on that an abort found running: none is meant to block.
pub(super) const CALL_GRACE: Duration = Duration::from_secs(2);

impl<H: Copy + Send + 'static> Abortable<H> {
    pub(super) fn new(handle: H) -> Self {
        Self { state: Mutex::new(State { handle: Some(handle), in_call: false }), returned: Condvar::new() }
    }

    /// Runs one call, of one thread at a time; `None` once it was ended.
    pub(super) fn call<T>(&self, body: impl FnOnce(H) -> T) -> Option<T> {
        let handle = {
            let mut state = self.lock();
            let handle = state.handle?;
            state.in_call = true;
            handle
        };
        let result = body(handle);
        self.lock().in_call = false;
        self.returned.notify_all();
        Some(result)
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().handle.is_none()
    }

    /// Takes the handle for good, once no call runs or the grace is over.
    pub(super) fn take(&self, grace: Duration) -> Option<H> {
        let mut state = self.lock();
        let handle = state.handle.take()?;
        let until = Instant::now() + grace;
        while state.in_call {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                break;
            }
            state = self.returned.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(handle)
    }

    /// Ends it with `end` on a thread of its own; what comes back tells when that is done. If it is not done
    /// within `patience`, `hung` is called instead.
    pub(super) fn end(
        self: &Arc<Self>,
        end: impl FnOnce(H) + Send + 'static,
        patience: Duration,
        hung: impl FnOnce() + Send + 'static,
    ) -> Receiver<()> {
        let (done, wait) = mpsc::channel::<()>();
        let (told, watched) = mpsc::channel::<()>();
        let this = self.clone();
        let ending = move || {
            if let Some(handle) = this.take(CALL_GRACE) {
                end(handle);
            }
            // Either may listen no longer.
            let _ = told.send(());
            let _ = done.send(());
        };
        let watching = move || {
            if watched.recv_timeout(CALL_GRACE + patience) == Err(RecvTimeoutError::Timeout) {
                hung();
            }
        };
        // A process that can't start a thread can't stop its GPU either.
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(name.into()).spawn(body).expect("a thread to end a communicator")
        };
        spawn("nccl-abort", Box::new(ending));
        spawn("nccl-abort-watch", Box::new(watching));
        wait
    }

    fn lock(&self) -> MutexGuard<'_, State<H>> {
        // Its critical sections leave a whole state behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn after_the_end_nothing_gets_the_handle() {
        let handle = Arc::new(Abortable::new(7));
        assert_eq!(handle.call(|h| h + 1), Some(8));
        let (ended, seen) = mpsc::channel();
        handle.end(move |h| ended.send(h).unwrap(), PATIENCE, || ()).recv().unwrap();
        assert_eq!(seen.recv(), Ok(7));
        assert_eq!(handle.call(|h| h), None);
        assert!(handle.is_ended());
        // A second end finds nothing to do.
        handle.end(|_| panic!("ended twice"), PATIENCE, || ()).recv().unwrap();
    }

    #[test]
    fn the_end_waits_for_a_call_that_returns_and_not_for_one_that_is_stuck() {
        for (stuck, grace) in [(false, PATIENCE), (true, Duration::from_millis(30))] {
            let handle = Arc::new(Abortable::new(7));
            let (entered, inside) = mpsc::channel();
            let (let_go, gate) = mpsc::channel::<()>();
            thread::scope(|scope| {
                let calling = handle.clone();
                scope.spawn(move || {
                    calling.call(|_| {
                        entered.send(()).unwrap();
                        let _ = gate.recv();
                    })
                });
                inside.recv().unwrap();
                let taking = scope.spawn(|| handle.take(grace));
                thread::sleep(Duration::from_millis(100));
                assert_eq!(taking.is_finished(), stuck);
                let_go.send(()).unwrap();
                assert_eq!(taking.join().unwrap(), Some(7));
            });
        }
    }

    #[test]
    fn an_end_that_hangs_is_told() {
        let handle = Arc::new(Abortable::new(7));
        let (let_go, gate) = mpsc::channel::<()>();
        let (hung, told) = mpsc::channel();
        let hang = move |_| {
            let _ = gate.recv();
        };
        let done = handle.end(hang, Duration::from_millis(10), move || hung.send(()).unwrap());
        told.recv_timeout(PATIENCE).unwrap();
        let_go.send(()).unwrap();
        done.recv_timeout(PATIENCE).unwrap();
    }
}

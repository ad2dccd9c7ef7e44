//! Handles to operations that take a while.
//!
//! ```text
//!   OperationFuture::pair() ─► OperationCompleter ── complete(outcome) ──┐
//!                         └──► OperationFuture ◄── result / await ◄──────┘
//! ```
//!
//! The outcome is kept: it can be asked for again, by several holders, and an error is
//! replayed. Nothing here needs a runtime: waiting blocks a thread or parks a task of
//! whatever executor the caller uses.

use std::{
    fmt,
    future::{Future, IntoFuture},
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use super::{ErrorKind, ForwardBackwardOutput, OperationError};

/// Handle to a long-running operation.
///
/// [`result`](Self::result) blocks, [`result_timeout`](Self::result_timeout) blocks for a
/// while, `.await` parks the task. Dropping the handle, or running out of time, leaves the
/// operation running.
pub struct OperationFuture<T> {
    shared: Arc<Shared<T>>,
}

/// The other end of an [`OperationFuture`]: gives it its outcome, once. Dropped without one,
/// the handle fails with `Internal`, so that nobody waits for ever.
pub struct OperationCompleter<T> {
    shared: Arc<Shared<T>>,
}

/// What `forward` and `forward_backward` return. A call that was split into several
/// operations is joined again: outputs in order, the loss weighted by active tokens.
pub type ForwardBackwardFuture = OperationFuture<ForwardBackwardOutput>;

/// The time given to [`OperationFuture::result_timeout`] ran out; the operation goes on and
/// the handle can be asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the operation has not finished within {0:?}; it goes on, ask again")]
pub struct ResultTimeout(pub Duration);

struct Shared<T> {
    state: Mutex<State<T>>,
    completed: Condvar,
}

struct State<T> {
    outcome: Option<Result<T, OperationError>>,
    /// One per task that waits.
    wakers: Vec<Waker>,
}

impl<T> Shared<T> {
    /// The state; a panic in another holder can't leave it half written, so poison is ignored.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn complete(&self, outcome: Result<T, OperationError>) {
        let wakers = {
            let mut state = self.lock();
            if state.outcome.is_some() {
                return;
            }
            state.outcome = Some(outcome);
            std::mem::take(&mut state.wakers)
        };
        self.completed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl<T> OperationFuture<T> {
    /// A handle and the end that completes it.
    pub fn pair() -> (OperationCompleter<T>, Self) {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { outcome: None, wakers: Vec::new() }),
            completed: Condvar::new(),
        });
        (OperationCompleter { shared: shared.clone() }, Self { shared })
    }

    /// A handle whose outcome is known already.
    pub fn ready(outcome: Result<T, OperationError>) -> Self {
        let (completer, future) = Self::pair();
        completer.complete(outcome);
        future
    }

    /// Whether the outcome is there.
    pub fn is_done(&self) -> bool {
        self.shared.lock().outcome.is_some()
    }
}

impl<T: Clone> OperationFuture<T> {
    /// Blocks this thread until the operation has finished. Not for use inside an async
    /// task: `.await` there.
    pub fn result(&self) -> Result<T, OperationError> {
        let mut state = self.shared.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            state = self.shared.completed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Blocks this thread for at most `timeout`. The outer error says that time ran out, the
    /// inner one that the operation failed.
    pub fn result_timeout(&self, timeout: Duration) -> Result<Result<T, OperationError>, ResultTimeout> {
        let Some(deadline) = Instant::now().checked_add(timeout) else {
            return Ok(self.result()); // Further away than time is counted.
        };
        let mut state = self.shared.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return Ok(outcome.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ResultTimeout(timeout));
            }
            let waited = self.shared.completed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

impl<T> Clone for OperationFuture<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<T> fmt::Debug for OperationFuture<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OperationFuture").field("done", &self.is_done()).finish()
    }
}

impl<T: Clone> Future for OperationFuture<T> {
    type Output = Result<T, OperationError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.shared.lock();
        match &state.outcome {
            Some(outcome) => Poll::Ready(outcome.clone()),
            None => {
                if !state.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                    state.wakers.push(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }
}

impl<T: Clone> IntoFuture for &OperationFuture<T> {
    type Output = Result<T, OperationError>;
    type IntoFuture = OperationFuture<T>;

    fn into_future(self) -> Self::IntoFuture {
        self.clone()
    }
}

impl<T> OperationCompleter<T> {
    /// Gives the operation its outcome; whoever waits goes on.
    pub fn complete(self, outcome: Result<T, OperationError>) {
        self.shared.complete(outcome);
    }
}

impl<T> Drop for OperationCompleter<T> {
    fn drop(&mut self) {
        let lost = OperationError::new(
            ErrorKind::Internal,
            "the task that ran this operation ended without a result",
        );
        self.shared.complete(Err(lost));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_leaves_the_handle_usable() {
        let (completer, future) = OperationFuture::<u32>::pair();
        let waited = Duration::from_millis(5);
        assert_eq!(future.result_timeout(waited), Err(ResultTimeout(waited)));
        completer.complete(Ok(7));
        assert_eq!(future.result_timeout(waited), Ok(Ok(7)));
        assert_eq!(future.result(), Ok(7));
    }

    #[test]
    fn an_error_is_replayed_to_everyone() {
        let (completer, future) = OperationFuture::<u32>::pair();
        let error = OperationError::new(ErrorKind::NotFinite, "the loss of datum 3 is NaN");
        completer.complete(Err(error.clone()));
        assert_eq!(future.result(), Err(error.clone()));
        assert_eq!(future.clone().result(), Err(error));
    }

    #[test]
    fn a_lost_completer_fails_instead_of_hanging() {
        let (completer, future) = OperationFuture::<u32>::pair();
        drop(completer);
        assert_eq!(future.result().map_err(|e| e.kind), Err(ErrorKind::Internal));
    }

    #[test]
    fn every_waiter_wakes_whatever_its_executor() {
        let (completer, future) = OperationFuture::<u32>::pair();
        let threads: Vec<_> = (0..3)
            .map(|i| {
                let future = future.clone();
                std::thread::spawn(move || match i {
                    0 => future.result(),
                    1 => futures::executor::block_on(future),
                    _ => futures::executor::block_on(async { (&future).await }),
                })
            })
            .collect();
        completer.complete(Ok(1));
        for thread in threads {
            assert_eq!(thread.join().expect("a waiter panicked"), Ok(1));
        }
    }
}

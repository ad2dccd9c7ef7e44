//! Breaks off what a compute thread waits in, from any thread.

use std::sync::Mutex;

/// A switch that is thrown once: when a run's rank is dropped while its thread may be deep in
/// a collective, or about to enter one.
#[derive(Default)]
pub(super) struct AbortSwitch(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    thrown: bool,
    breaker: Option<Box<dyn Fn() + Send + Sync>>,
}

impl AbortSwitch {
    /// What throwing the switch does from now on; done at once if it was thrown before.
    pub(super) fn install(&self, breaker: Box<dyn Fn() + Send + Sync>) {
        let mut inner = self.lock();
        if inner.thrown {
            breaker();
        }
        inner.breaker = Some(breaker);
    }

    /// Breaks what runs; what comes later sees [`AbortSwitch::is_thrown`].
    pub(super) fn throw(&self) {
        let mut inner = self.lock();
        inner.thrown = true;
        if let Some(breaker) = inner.breaker.take() {
            breaker();
        }
    }

    pub(super) fn is_thrown(&self) -> bool {
        self.lock().thrown
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic under this lock leaves nothing half done that the next caller could trip on.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    fn counter() -> (Arc<AtomicU32>, Box<dyn Fn() + Send + Sync>) {
        let count = Arc::new(AtomicU32::new(0));
        let seen = count.clone();
        (
            count,
            Box::new(move || {
                seen.fetch_add(1, Ordering::SeqCst);
            }),
        )
    }

    #[test]
    fn throwing_breaks_what_is_installed() {
        let (count, breaker) = counter();
        let switch = AbortSwitch::default();
        switch.install(breaker);
        assert_eq!((count.load(Ordering::SeqCst), switch.is_thrown()), (0, false));
        switch.throw();
        switch.throw();
        assert_eq!((count.load(Ordering::SeqCst), switch.is_thrown()), (1, true));
    }

    #[test]
    fn a_switch_thrown_too_early_breaks_what_comes_later() {
        let (count, breaker) = counter();
        let switch = AbortSwitch::default();
        switch.throw();
        switch.install(breaker);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }
}

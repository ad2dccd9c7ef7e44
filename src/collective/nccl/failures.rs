//! Which GPUs NCCL could not start between, so that the next rank set over them doesn't wait for it again.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long a set of GPUs is left alone. What was in the way may be gone by then, a firewall or a port that was
/// taken, and if not the next try costs as long as the first one did: a minute at most.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(30 * 60);

/// Sets of GPUs that are remembered at once, the latest ones: a node has one GPU, and few neighbours.
const MOST: usize = 64;

/// Of one process, whatever the run. Another set of GPUs is another matter: one node's firewall keeps no others
/// from NCCL.
#[derive(Default)]
pub(super) struct StartFailures(Mutex<VecDeque<Failure>>);

struct Failure {
    /// Sorted.
    gpus: Vec<String>,
    why: String,
    at: Instant,
}

impl StartFailures {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    /// Why these GPUs, named by their UUIDs in any order, are not to be tried again yet.
    pub(super) fn recall(&self, gpus: &[String], now: Instant) -> Option<String> {
        let mut failures = self.lock();
        failures.retain(|failure| now.saturating_duration_since(failure.at) < RETRY_AFTER);
        let gpus = sorted(gpus);
        let failure = failures.iter().find(|failure| failure.gpus == gpus)?;
        let minutes = now.saturating_duration_since(failure.at).as_secs() / 60;
        Some(format!("NCCL did not start between these GPUs {minutes} min ago ({})", failure.why))
    }

    pub(super) fn remember(&self, gpus: &[String], why: String, now: Instant) {
        let mut failures = self.lock();
        let gpus = sorted(gpus);
        failures.retain(|failure| failure.gpus != gpus);
        if failures.len() == MOST {
            failures.pop_front();
        }
        failures.push_back(Failure { gpus, why, at: now });
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Failure>> {
        // Its critical sections leave a whole list behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sorted(gpus: &[String]) -> Vec<String> {
    let mut gpus = gpus.to_vec();
    gpus.sort_unstable();
    gpus
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(gpus: &[&str]) -> Vec<String> {
        gpus.iter().map(|gpu| gpu.to_string()).collect()
    }

    #[test]
    fn a_set_of_gpus_is_left_alone_for_a_while_and_no_other() {
        let (failures, begun) = (StartFailures::new(), Instant::now());
        failures.remember(&set(&["a", "b"]), "rank 1: refused".into(), begun);
        let later = begun + Duration::from_secs(150);
        let why = failures.recall(&set(&["b", "a"]), later).unwrap();
        assert!(why.contains("2 min ago (rank 1: refused)"), "{why}");
        for other in [&["a", "c"][..], &["a", "b", "c"], &["a"]] {
            assert_eq!(failures.recall(&set(other), later), None, "{other:?}");
        }
        assert_eq!(failures.recall(&set(&["a", "b"]), begun + RETRY_AFTER), None);
    }

    #[test]
    fn only_the_latest_are_remembered() {
        let (failures, now) = (StartFailures::new(), Instant::now());
        let nth = |n: usize| vec![n.to_string()];
        for n in 0..=MOST {
            // The same one again is not one more.
            failures.remember(&nth(n), "once".into(), now);
            failures.remember(&nth(n), "twice".into(), now);
        }
        assert_eq!(failures.recall(&nth(0), now), None);
        assert!((1..=MOST).all(|n| failures.recall(&nth(n), now).unwrap().contains("twice")));
    }
}

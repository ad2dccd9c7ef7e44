use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::client::ServiceClient;

use super::supervisor::Life;

/// How often the coordinator is asked.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How long a node that has joined may be missing from the cluster while its process lives: it needs a
/// second to come back after its coordinator did.
const MISSING_FOR: Duration = Duration::from_secs(10);

/// Finds the processes that live and do nothing.
pub(super) struct Watchdog {
    lives: Vec<Arc<Life>>,
    /// By process: when the coordinator last had it.
    seen: BTreeMap<u32, Instant>,
}

impl Watchdog {
    pub(super) fn new(lives: Vec<Arc<Life>>) -> Self {
        Self { lives, seen: BTreeMap::new() }
    }

    /// Looks until it is dropped, once there is a client. Asks nothing of the processes themselves; a
    /// coordinator that can't be asked says nothing about its nodes.
    pub(super) async fn watch(mut self, client: oneshot::Receiver<ServiceClient>) {
        let Ok(service) = client.await else { return std::future::pending().await };
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let Ok(status) = service.cluster_status().await else { continue };
            let present: Vec<u32> = status.nodes.iter().map(|node| node.pid).collect();
            for life in self.hung(&present, Instant::now()) {
                tracing::warn!(pid = life.pid.load(Ordering::Relaxed), "a node hangs and is started again");
                life.kill.notify_one();
            }
        }
    }

    /// Processes that had joined, are missing for too long, and have not ended. Each is named once.
    fn hung(&mut self, present: &[u32], now: Instant) -> Vec<Arc<Life>> {
        let living: Vec<u32> = self.lives.iter().map(|life| life.pid.load(Ordering::Relaxed)).collect();
        self.seen.retain(|pid, _| living.contains(pid));
        self.seen.extend(present.iter().filter(|pid| living.contains(pid)).map(|pid| (*pid, now)));
        let lost: Vec<u32> =
            self.seen.iter().filter(|(_, seen)| now - **seen >= MISSING_FOR).map(|(pid, _)| *pid).collect();
        self.seen.retain(|pid, _| !lost.contains(pid));
        let hangs = |life: &&Arc<Life>| lost.contains(&life.pid.load(Ordering::Relaxed));
        self.lives.iter().filter(hangs).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_had_joined_and_is_missing_for_long_hangs() {
        let lives: Vec<Arc<Life>> = (0..2).map(|_| Arc::default()).collect();
        lives[0].pid.store(100, Ordering::Relaxed);
        lives[1].pid.store(200, Ordering::Relaxed);
        let mut watchdog = Watchdog::new(lives.clone());
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut hung = |present: &[u32], seconds| -> Vec<u32> {
            let hung = watchdog.hung(present, at(seconds));
            hung.iter().map(|life| life.pid.load(Ordering::Relaxed)).collect()
        };
        let none: [u32; 0] = [];
        assert_eq!(hung(&[], 60), none, "neither has joined yet: they load models");
        assert_eq!(hung(&[100, 200, 7], 61), none);
        assert_eq!(hung(&[200], 62), none);
        assert_eq!(hung(&[200], 70), none, "it may be on its way back");
        assert_eq!(hung(&[200], 71), [100u32]);
        assert_eq!(hung(&[200], 90), none, "once is enough");
        lives[1].pid.store(201, Ordering::Relaxed);
        assert_eq!(hung(&[], 120), none, "a new process has not joined yet");
    }
}

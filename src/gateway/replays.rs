//! Retries of sample requests: a retry joins what is being generated, and gets again what was.
//!
//! A sampler that started anew for each retry would give another answer to the same question,
//! and a client that lost its connection would pay for the tokens twice.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::AbortHandle};
use tracing::Instrument;

use crate::types::{Digest, InvalidInput};

use super::{loops::Completion, refusal::Refused};

/// How long an answer is kept for whoever has lost it.
const KEPT_FOR: Duration = Duration::from_secs(300);

/// Bytes of answers that are kept; the oldest go first.
const KEPT_BYTES: usize = 64 << 20;

/// How long a generation goes on that nobody waits for: its caller may be on the way back.
const GRACE: Duration = Duration::from_secs(10);

type Outcome = Result<Arc<Completion>, Refused>;

/// Requests by their idempotency key.
#[derive(Clone)]
pub struct Replays {
    entries: Arc<Mutex<HashMap<String, Entry>>>,
    grace: Duration,
}

impl Default for Replays {
    fn default() -> Self {
        Self { entries: Arc::default(), grace: GRACE }
    }
}

struct Entry {
    /// Of the request: the same key for another one is refused.
    body: Digest,
    outcome: watch::Receiver<Option<Outcome>>,
    task: AbortHandle,
    waiting: usize,
    /// When it was answered, and how long the answer is.
    answered: Option<(Instant, usize)>,
}

/// One caller that waits; leaves when it is dropped.
struct Waiting {
    replays: Replays,
    key: String,
    /// Tells its generation from a later one under the same key.
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Replays {
    /// The outcome of `generate`, or of what was begun under the same key. Only answers are kept:
    /// after a failure the next try begins anew.
    pub async fn join<F>(&self, key: String, body: Digest, generate: F) -> Outcome
    where
        F: Future<Output = Result<Completion, Refused>> + Send + 'static,
    {
        let mut outcome = self.enter(&key, body, generate)?;
        let _waiting = Waiting { replays: self.clone(), key, outcome: outcome.clone() };
        let told = outcome.wait_for(Option::is_some).await;
        let told = told.map_err(|_| Refused::fault("the generation ended without a word"))?;
        told.clone().unwrap_or_else(|| Err(Refused::fault("the generation ended without a word")))
    }

    fn enter<F>(
        &self,
        key: &str,
        body: Digest,
        generate: F,
    ) -> Result<watch::Receiver<Option<Outcome>>, Refused>
    where
        F: Future<Output = Result<Completion, Refused>> + Send + 'static,
    {
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(key) {
            if entry.body != body {
                let problem = "was used for another request; every request needs one of its own";
                return Err(InvalidInput::new("Idempotency-Key", problem).into());
            }
            entry.waiting += 1;
            return Ok(entry.outcome.clone());
        }
        make_room(&mut entries);
        let (tell, outcome) = watch::channel(None);
        let (replays, at) = (self.clone(), key.to_owned());
        // What is generated belongs to the request that asked first, in the log as well.
        let generate = generate.in_current_span();
        let task = tokio::spawn(async move {
            let generated = generate.await.map(Arc::new);
            replays.finish(&at, &generated);
            // Whoever waits has the receiving end.
            let _ = tell.send(Some(generated));
        });
        let entry =
            Entry { body, outcome: outcome.clone(), task: task.abort_handle(), waiting: 1, answered: None };
        entries.insert(key.to_owned(), entry);
        Ok(outcome)
    }

    fn finish(&self, key: &str, outcome: &Outcome) {
        let mut entries = self.entries();
        match outcome {
            Err(_) => drop(entries.remove(key)),
            Ok(completion) => {
                if let Some(entry) = entries.get_mut(key) {
                    entry.answered = Some((Instant::now(), completion.json.len()));
                }
            }
        }
    }

    /// Ends a generation that still nobody waits for.
    fn end_if_deserted(&self, key: &str, outcome: &watch::Receiver<Option<Outcome>>) {
        let mut entries = self.entries();
        let deserted = |entry: &Entry| entry.waiting == 0 && entry.answered.is_none() && entry.is(outcome);
        if entries.get(key).is_some_and(deserted)
            && let Some(entry) = entries.remove(key)
        {
            entry.task.abort();
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Nothing panics while it holds the lock; if it did, the map would still be whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn is(&self, outcome: &watch::Receiver<Option<Outcome>>) -> bool {
        self.outcome.same_channel(outcome)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut entries = self.replays.entries();
        let Some(entry) = entries.get_mut(&self.key).filter(|entry| entry.is(&self.outcome)) else { return };
        entry.waiting -= 1;
        if entry.waiting == 0 && entry.answered.is_none() {
            let (replays, key, outcome) = (self.replays.clone(), self.key.clone(), self.outcome.clone());
            tokio::spawn(async move {
                tokio::time::sleep(replays.grace).await;
                replays.end_if_deserted(&key, &outcome);
            });
        }
    }
}

/// Lets go of answers that are old or too many. What is being generated stays: its number is
/// bounded by the connections.
fn make_room(entries: &mut HashMap<String, Entry>) {
    entries.retain(|_, entry| entry.answered.is_none_or(|(at, _)| at.elapsed() < KEPT_FOR));
    let answered = |(key, entry): (&String, &Entry)| {
        let (at, bytes) = entry.answered?;
        Some((at, key.clone(), bytes))
    };
    let mut kept: Vec<_> = entries.iter().filter_map(answered).collect();
    kept.sort_unstable_by_key(|(at, ..)| std::cmp::Reverse(*at));
    let mut bytes = 0;
    for (_, key, size) in kept {
        bytes += size;
        if bytes > KEPT_BYTES {
            entries.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn completion() -> Completion {
        Completion { json: "{}".into(), policy_version: 1 }
    }

    fn body(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    #[tokio::test]
    async fn one_key_is_generated_once() {
        let (replays, begun) = (Replays::default(), Arc::new(AtomicUsize::new(0)));
        let ask = || {
            let begun = begun.clone();
            replays.join("a".into(), body("x"), async move {
                begun.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
                Ok(completion())
            })
        };
        let (first, second) = tokio::join!(ask(), ask());
        assert!(first.is_ok() && second.is_ok());
        assert!(ask().await.is_ok(), "also after the answer");
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        let other = replays.join("a".into(), body("y"), async { Ok(completion()) }).await;
        assert_eq!(other.unwrap_err().status().as_u16(), 422);
    }

    #[tokio::test]
    async fn a_failure_is_not_kept() {
        let replays = Replays::default();
        let failed = replays.join("a".into(), body("x"), async { Err(Refused::not_yet("behind")) }).await;
        assert_eq!(failed.unwrap_err().status().as_u16(), 408);
        assert!(replays.join("a".into(), body("x"), async { Ok(completion()) }).await.is_ok());
    }

    #[tokio::test]
    async fn a_generation_that_nobody_comes_back_for_is_ended() {
        struct Ended(Arc<AtomicUsize>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let grace = Duration::from_millis(200);
        let replays = Replays { grace, ..Replays::default() };
        let ended = Arc::new(AtomicUsize::new(0));
        let forever = |ended: Ended| async move {
            let _ended = ended;
            std::future::pending::<Result<Completion, Refused>>().await
        };
        let asked = replays.join("a".into(), body("x"), forever(Ended(ended.clone())));
        assert!(tokio::time::timeout(grace / 10, asked).await.is_err(), "the caller leaves");
        let back = replays.join("a".into(), body("x"), async { Ok(completion()) });
        assert!(tokio::time::timeout(2 * grace, back).await.is_err(), "the retry waits for the first");
        assert_eq!(ended.load(Ordering::SeqCst), 0);
        tokio::time::sleep(3 * grace).await;
        assert_eq!(ended.load(Ordering::SeqCst), 1);
        assert!(replays.entries().is_empty());
    }
}

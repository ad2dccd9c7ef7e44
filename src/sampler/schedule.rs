//! Which rows the next step computes: a pure function of what waits and what runs.
//!
//! Sequences begin in the order of their requests' arrival and nobody overtakes, so nobody
//! starves: what has begun ends by itself and makes room for whoever waits longest. A request's
//! sequences may begin in several waves. A long prompt is computed piece by piece beside the
//! sequences that decode.

use std::collections::BTreeMap;

use super::budget::Need;

/// A request within its replica, numbered in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

/// A model within its replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelIndex(pub usize);

/// A request as the planner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    pub model: ModelIndex,
    pub need: Need,
    /// Its prompt's cache is reserved, and the compute thread knows it.
    pub admitted: bool,
    /// Prompt rows that are still to be computed.
    pub prompt_rows: usize,
    /// Sequences in all; they are numbered, and begin, from 0.
    pub samples: u32,
    /// Those that have not begun.
    pub waiting: u32,
    /// Sequences that have begun and not ended, by their number.
    pub live: Vec<u32>,
}

/// A replica's bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Most sequences that have begun and not ended.
    pub max_batch: usize,
    /// Most bytes of keys and values reserved.
    pub kv_bytes: usize,
    /// Most prompt rows of one step: as many as a product is fastest with, so that neither the decoding sequences nor
    /// training that wants to compute waits much longer for the step's end than without them.
    pub prefill_rows: usize,
}

/// The rows of one step, all of one model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    pub model: Option<ModelIndex>,
    /// Prompts, and how many of their rows.
    pub prefill: Vec<(RequestKey, usize)>,
    /// Sequences that get one token more.
    pub decode: Vec<(RequestKey, u32)>,
}

/// Begins sequences in order while there is room; returns the requests admitted by it. `ready`
/// says whether a model's weights are loaded: requests for others are passed over.
pub fn admit(
    works: &mut BTreeMap<RequestKey, Work>,
    capacity: Capacity,
    ready: impl Fn(ModelIndex) -> bool,
) -> Vec<RequestKey> {
    let mut live: usize = works.values().map(|work| work.live.len()).sum();
    let mut bytes = reserved_bytes(works);
    let mut admitted = Vec::new();
    for (&key, work) in works.iter_mut().filter(|(_, work)| ready(work.model)) {
        let Need { prompt_bytes, sequence_bytes } = work.need;
        while work.waiting > 0 {
            let bytes_more = sequence_bytes + if work.admitted { 0 } else { prompt_bytes };
            if live == capacity.max_batch || bytes + bytes_more > capacity.kv_bytes {
                return admitted;
            }
            live += 1;
            bytes += bytes_more;
            if !work.admitted {
                work.admitted = true;
                admitted.push(key);
            }
            work.live.push(work.samples - work.waiting);
            work.waiting -= 1;
        }
    }
    admitted
}

/// The next step of the first model from `turn` on (cyclically) that has rows to compute.
pub fn plan(works: &BTreeMap<RequestKey, Work>, capacity: Capacity, models: usize, turn: ModelIndex) -> Step {
    let from_turn = |model: ModelIndex| (model.0 + models - turn.0 % models) % models;
    let runnable = works.values().filter(|work| work.has_rows());
    let Some(model) = runnable.map(|work| work.model).min_by_key(|&model| from_turn(model)) else {
        return Step::default();
    };
    let mut step = Step { model: Some(model), ..Step::default() };
    let mut room = capacity.prefill_rows;
    for (&key, work) in works.iter().filter(|(_, work)| work.model == model && work.admitted) {
        if work.prompt_rows == 0 {
            step.decode.extend(work.live.iter().map(|&sequence| (key, sequence)));
        } else if room > 0 {
            let rows = work.prompt_rows.min(room);
            room -= rows;
            step.prefill.push((key, rows));
        }
    }
    step
}

/// Bytes of KV cache that are spoken for.
pub fn reserved_bytes(works: &BTreeMap<RequestKey, Work>) -> usize {
    let admitted = works.values().filter(|work| work.admitted);
    admitted.map(|work| work.need.prompt_bytes + work.live.len() * work.need.sequence_bytes).sum()
}

impl Work {
    fn has_rows(&self) -> bool {
        self.admitted && (self.prompt_rows > 0 || !self.live.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: fn(ModelIndex) -> bool = |_| true;

    fn capacity(max_batch: usize, kv_bytes: usize) -> Capacity {
        Capacity { max_batch, kv_bytes, prefill_rows: 256 }
    }

    fn work(model: usize, prompt_rows: usize, samples: u32) -> Work {
        Work {
            model: ModelIndex(model),
            need: Need { prompt_bytes: 10, sequence_bytes: 5 },
            admitted: false,
            prompt_rows,
            samples,
            waiting: samples,
            live: Vec::new(),
        }
    }

    fn works(list: Vec<Work>) -> BTreeMap<RequestKey, Work> {
        (1..).map(RequestKey).zip(list).collect()
    }

    fn live(works: &BTreeMap<RequestKey, Work>) -> Vec<Vec<u32>> {
        works.values().map(|work| work.live.clone()).collect()
    }

    #[test]
    fn nobody_overtakes_one_who_waits_for_room() {
        let mut queue = works(vec![work(0, 4, 2), work(0, 4, 4), work(0, 4, 1)]);
        let capacity = capacity(4, 1000);
        assert_eq!(admit(&mut queue, capacity, READY), [RequestKey(1), RequestKey(2)]);
        // The third fits neither before nor beside the second's remaining two.
        assert_eq!(live(&queue), [vec![0, 1], vec![0, 1], vec![]]);
        queue.remove(&RequestKey(1));
        assert_eq!(admit(&mut queue, capacity, READY), []);
        assert_eq!(live(&queue), [vec![0, 1, 2, 3], vec![]]);
    }

    #[test]
    fn bytes_bound_what_begins() {
        let mut queue = works(vec![work(0, 4, 3), work(0, 4, 1)]);
        let capacity = capacity(100, 24);
        admit(&mut queue, capacity, READY);
        assert_eq!(live(&queue), [vec![0, 1], vec![]]);
        assert_eq!(reserved_bytes(&queue), 20);
    }

    #[test]
    fn requests_of_a_model_that_loads_are_passed_over() {
        let mut queue = works(vec![work(0, 4, 1), work(1, 4, 1)]);
        let admitted = admit(&mut queue, capacity(8, 1000), |model| model == ModelIndex(1));
        assert_eq!(admitted, [RequestKey(2)]);
        assert_eq!(plan(&queue, capacity(8, 1000), 2, ModelIndex(0)).model, Some(ModelIndex(1)));
    }

    #[test]
    fn prompts_are_computed_in_pieces_beside_those_that_decode() {
        let mut queue = works(vec![work(0, 0, 2), work(0, 200, 1), work(0, 300, 1), work(0, 9, 1)]);
        admit(&mut queue, capacity(8, 1000), READY);
        let step = plan(&queue, capacity(8, 1000), 1, ModelIndex(0));
        assert_eq!(step.prefill, [(RequestKey(2), 200), (RequestKey(3), 56)]);
        assert_eq!(step.decode, [(RequestKey(1), 0), (RequestKey(1), 1)]);
    }

    #[test]
    fn models_take_turns() {
        let mut queue = works(vec![work(0, 4, 1), work(2, 4, 1)]);
        admit(&mut queue, capacity(8, 1000), READY);
        let chosen = |turn| plan(&queue, capacity(8, 1000), 3, ModelIndex(turn)).model;
        assert_eq!(chosen(0), Some(ModelIndex(0)));
        assert_eq!(chosen(1), Some(ModelIndex(2)));
        assert_eq!(chosen(2), Some(ModelIndex(2)));
        assert_eq!(chosen(3), Some(ModelIndex(0)));
        assert_eq!(plan(&BTreeMap::new(), capacity(8, 1000), 3, ModelIndex(0)), Step::default());
    }
}

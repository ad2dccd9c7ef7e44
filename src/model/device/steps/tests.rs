//! Replayed steps against plain ones, to the bit: two models of the same weights, one of which records nothing.

use std::sync::Arc;

use super::*;
use crate::{
    kernels::WeightDtype,
    model::{
        Adapter, BaseModel, ComputeOptions,
        decoder::tests::{ALL, adapter, distance, models, noise, tokens},
        device::{
            DeviceCache, forward,
            tests::{bits, is_real, open, tolerance, wide},
        },
    },
};

/// A model twice.
struct Twins {
    /// On the CPU.
    model: &'static BaseModel,
    plain: DeviceModel,
    recording: DeviceModel,
}

/// A sequence, with a cache in each of the twins.
struct Sequence {
    caches: [DeviceCache; 2],
    adapter: Option<Arc<Adapter>>,
}

impl Twins {
    fn new(model: &'static BaseModel) -> Self {
        let new = |gpu: &Gpu| DeviceModel::new(gpu, &model.config, model.weights()).unwrap();
        // GPUs of their own: what each holds is told apart.
        Self { model, plain: new(&open()).with_plain_decoding(), recording: new(&open()) }
    }

    /// Appends rows to each sequence in both, and holds the hidden states of one against the other's.
    fn extend(&self, sequences: &mut [Sequence], rows: &[Vec<u32>]) {
        let hidden = [&self.plain, &self.recording].into_iter().enumerate().map(|(which, model)| {
            let of_gpu = |adapter: &Arc<Adapter>| model.adapter((&**adapter).into()).unwrap();
            let parts = sequences.iter_mut().zip(rows).map(|(sequence, tokens)| DeviceSequence {
                tokens,
                cache: Some(&mut sequence.caches[which]),
                adapter: sequence.adapter.as_ref().map(of_gpu),
            });
            let hidden = forward(model, &mut parts.collect::<Vec<_>>(), None).unwrap();
            model.gpu().download(&hidden).unwrap()
        });
        let [plain, replayed]: [Vec<f32>; 2] = hidden.collect::<Vec<_>>().try_into().unwrap();
        match is_real() {
            true => assert!(distance(&replayed, &wide(&plain)) < tolerance(self.model)),
            false => assert_eq!(bits(&plain), bits(&replayed), "{}", self.model.name),
        }
    }

    /// One token for each, which differ.
    fn step(&self, sequences: &mut [Sequence], seed: usize) {
        let row = |i| vec![((noise(77, 1000 * seed + i) + 1.0) * 120.0) as u32];
        self.extend(sequences, &(0..sequences.len()).map(row).collect::<Vec<_>>());
    }

    fn begin(&self, adapter: Option<Arc<Adapter>>, prompt: Vec<u32>) -> Sequence {
        let mut sequence = [Sequence { caches: Default::default(), adapter }];
        self.extend(&mut sequence, &[prompt]);
        let [sequence] = sequence;
        sequence
    }

    /// Plain, replayed, recorded.
    fn counts(&self) -> [u64; 3] {
        self.recording.counts.now()
    }
}

impl Sequence {
    fn fork(&self) -> Self {
        Self { caches: self.caches.each_ref().map(DeviceCache::fork), adapter: self.adapter.clone() }
    }
}

/// One of each family, and one in bf16.
fn kinds() -> Vec<&'static BaseModel> {
    let kind = |model: &BaseModel| (model.config.family, model.weights().embed.rounds_inputs());
    let mut kinds: Vec<&BaseModel> = Vec::new();
    for model in models().iter().filter(|model| model.config.experts.is_none()) {
        if kinds.iter().all(|known| kind(known) != kind(model)) {
            kinds.push(model);
        }
    }
    kinds
}

fn fresh() -> Twins {
    Twins::new(&models()[0])
}

/// Sequences come, fork, end and cross pages, under the base model, two adapters and later versions of them.
#[test]
fn replayed_steps_have_the_bits_of_plain_ones_whoever_comes_and_goes() {
    for model in kinds() {
        let twins = Twins::new(model);
        let version = |of: u64, number: u64| Some(Arc::new(adapter(model, 2 * number + of, &ALL)));
        let mut adapters = [None, version(0, 0), version(1, 0)];
        let mut live: Vec<Sequence> = Vec::new();
        let mut drawn = 0;
        let mut below = |most: usize| {
            drawn += 1;
            ((noise(5, drawn) + 1.0) / 2.0 * most as f32) as usize
        };
        for round in 0..24 {
            match below(6) {
                0 | 1 if live.len() < 7 => {
                    let prompt = tokens(round as u64, 1 + below(70));
                    live.push(twins.begin(adapters[below(3)].clone(), prompt));
                }
                2 | 3 if !live.is_empty() && live.len() < 7 => {
                    let at = below(live.len());
                    let fork = live[at].fork();
                    live.insert(below(live.len()), fork);
                }
                4 if !live.is_empty() => {
                    live.remove(below(live.len()));
                }
                5 => {
                    let of = below(2);
                    adapters[1 + of] = version(of as u64, round as u64);
                }
                _ => {}
            }
            for step in 0..3 * usize::from(!live.is_empty()) {
                twins.step(&mut live, 3 * round + step);
            }
        }
        let [plain, replayed, recorded] = twins.counts();
        assert!(replayed > plain && recorded > 5, "{}: {plain} {replayed} {recorded}", model.name);
        // Forks share pages still, and each has gone its own way.
        assert!(live.iter().any(|sequence| sequence.caches[0].len() > 64), "some cross a page");
    }
}

/// The first step of a kind is plain, the second recorded; the table of pages and the rotary table grow with a sequence,
/// and what was recorded before goes on with the smaller ones.
#[test]
fn a_kind_of_step_is_recorded_the_second_time_and_its_tables_stay() {
    let twins = fresh();
    let mut short = [twins.begin(None, tokens(1, 20))];
    for step in 0..20 {
        twins.step(&mut short, step);
    }
    assert_eq!(twins.counts(), [1, 19, 1]);
    let mut long = [twins.begin(None, tokens(2, 505))];
    for step in 0..12 {
        twins.step(&mut long, step);
        twins.step(&mut short, step);
    }
    // 505 to 511 and the short one are of the kind that is known; from 512 on there is another one, of 32 pages.
    assert_eq!(twins.counts(), [2, 42, 2]);
}

#[test]
fn a_retired_version_takes_its_steps_along() {
    let twins = fresh();
    let model = twins.model;
    let gpu = twins.recording.gpu();
    let first = Arc::new(adapter(model, 1, &ALL));
    let mut sequence = [twins.begin(Some(first.clone()), tokens(1, 5))];
    for step in 0..3 {
        twins.step(&mut sequence, step);
    }
    assert_eq!(twins.recording.steps().recorded.len(), 1);
    let [_, cache] = sequence.map(|sequence| sequence.caches).into_iter().next().unwrap();
    let held = gpu.held()[0] - twins.recording.steps().bytes();
    drop((cache, first));

    // Another one comes to the same place on the host, perhaps, but is not taken for it.
    let second = Arc::new(adapter(model, 5, &ALL));
    twins.recording.adapter((&*second).into()).unwrap();
    let steps = twins.recording.steps();
    assert!(steps.recorded.is_empty());
    // The one for rows that nobody reads.
    let page = 2 * 3 * PAGE * 24 * 4;
    assert_eq!(steps.bytes(), page as u64);
    assert_eq!(gpu.held()[0], held, "a version and a cache's page went, as much came");
    drop(steps);
    let mut sequence = [twins.begin(Some(second), tokens(1, 5))];
    (0..3).for_each(|step| twins.step(&mut sequence, step));
    assert_eq!(twins.counts(), [2, 4, 2]);
}

#[test]
fn as_many_are_held_as_fit_and_the_latest() {
    let twins = fresh();
    let model = twins.model;
    let adapters: Vec<_> = (0..12).map(|seed| Arc::new(adapter(model, seed, &ALL[..2]))).collect();
    let mut live: Vec<Vec<Sequence>> = Vec::new();
    for adapter in &adapters {
        let sequence = twins.begin(Some(adapter.clone()), tokens(1, 3));
        live.push((0..5).map(|_| sequence.fork()).collect());
    }
    // Three kinds of each adapter, of 1, 2 and 8 rows: 36.
    let run = |live: &mut [Vec<Sequence>], seed: usize| {
        for sequences in live {
            for (step, rows) in [1, 2, 5, 1, 2, 5].into_iter().enumerate() {
                twins.step(&mut sequences[..rows], seed + step);
            }
        }
    };
    run(&mut live, 0);
    assert_eq!(twins.counts(), [36, 36, 36]);
    let steps = twins.recording.steps();
    assert!(steps.recorded.len() == STEPS_MOST && steps.bytes() <= steps.most, "{}", steps.bytes());
    drop(steps);
    // The last adapter's are there, and the first one's are not.
    twins.step(&mut live[11][..2], 50);
    assert_eq!(twins.counts(), [36, 37, 36]);
    twins.step(&mut live[0][..1], 51);
    assert_eq!(twins.counts(), [37, 37, 36]);

    // A third of the room: the pools of 1, 2 and 8 rows, which all have, don't all fit.
    let few = twins.recording.steps().bytes() / 3;
    twins.recording.steps().most = few;
    run(&mut live, 60);
    let steps = twins.recording.steps();
    assert!(steps.bytes() <= few && steps.recorded.len() < STEPS_MOST, "{} of {few}", steps.bytes());
}

#[test]
fn what_a_step_holds_is_what_the_formula_says() {
    for model in kinds() {
        let twins = Twins::new(model);
        let dtype = if model.weights().embed.rounds_inputs() { WeightDtype::Bf16 } else { WeightDtype::F32 };
        let footprint = model.config.gpu_footprint(&ComputeOptions { dtype, ..ComputeOptions::default() });
        let gpu = twins.recording.gpu();
        let mut live = vec![twins.begin(None, tokens(1, 3))];
        live.extend((1..20).map(|_| live[0].fork()).collect::<Vec<_>>());
        for step in 0..2 {
            twins.step(&mut live, step);
        }
        let steps = twins.recording.steps();
        assert_eq!((steps.most, steps.most <= footprint.steps), (footprint.steps, true));
        let step = &steps.recorded[0];
        let (pool, rows) = (step.pool.bytes(), 24);
        let said = rows * steps.row;
        let ratio = said as f64 / pool as f64;
        assert!((1.0..1.15).contains(&ratio), "{}: {said} said, {pool} allocated", model.name);
        let pages = live.iter().map(|s| s.caches[1].len().div_ceil(PAGE)).sum::<usize>() as u64;
        let page = DeviceCache::bytes_per_position(&model.config, dtype) * PAGE;
        let held = footprint.weights + footprint.workspace + pages * page as u64 + steps.bytes();
        assert_eq!(gpu.held()[0], held, "{}: all that is held is counted", model.name);
    }
}

/// On a GPU, too, where cuBLAS has to choose alike for what is recorded.
#[test]
fn a_step_has_the_same_bits_as_it_is_run_recorded_and_replayed() {
    for model in kinds() {
        let twins = Twins::new(model);
        let sequence = twins.begin(Some(Arc::new(adapter(model, 3, &ALL))), tokens(1, 40));
        let model = &twins.recording;
        let on_gpu = sequence.adapter.as_ref().map(|adapter| model.adapter((&**adapter).into()).unwrap());
        let hidden = [(); 3].map(|()| {
            let mut cache = sequence.caches[1].fork();
            let mut step =
                [DeviceSequence { tokens: &[7], cache: Some(&mut cache), adapter: on_gpu.clone() }];
            bits(&model.gpu().download(&forward(model, &mut step, None).unwrap()).unwrap())
        });
        assert_eq!(twins.counts(), [1, 2, 1]);
        assert_eq!([&hidden[1], &hidden[2]], [&hidden[0]; 2]);
    }
}

#[test]
fn a_recording_that_fails_makes_decoding_plain_and_not_wrong() {
    // As it is recorded, and as it is replayed.
    for steps_before in [1, 3] {
        let twins = fresh();
        if is_real() {
            return;
        }
        let mut live = [twins.begin(None, tokens(1, 30))];
        for step in 0..steps_before {
            twins.step(&mut live, step);
        }
        let [plain, replayed, recorded] = twins.counts();
        twins.recording.gpu().break_recordings();
        // Every second one comes for the first time again.
        for step in 0..8 {
            assert_eq!(twins.recording.steps().is_off, step > 4);
            twins.step(&mut live, 10 + step);
        }
        assert_eq!(twins.counts(), [plain + 8, replayed, recorded]);
        let steps = twins.recording.steps();
        assert!(steps.is_off && steps.bytes() == 0);
        // One page of the sequence, the weights, the angles.
        assert!(twins.plain.gpu().held()[0] == twins.recording.gpu().held()[0]);
    }
}

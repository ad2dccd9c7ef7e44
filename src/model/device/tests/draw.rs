//! Draws on a GPU against the host's, which `model/draw/` holds against the definition.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_oneof, proptest};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::*;
use crate::{
    gpu::{RowDraw, RowStatistics},
    model::{
        Decoding, DrawBuffers, DrawKey, DrawRow, Filter, HiddenStates,
        draw::{Wanted, pick},
        draw_rows, logprobs_of,
    },
};

/// How far exponentials in f32 move the border between two tokens, as a share of the whole: by 2.5e-7 at most of the
/// weights before it (the host's; a GPU's, and g++'s, are a little better), and as much of the weights that the uniform
/// number is a share of.
const ROUNDING: f64 = 5e-7;

const LARGEST_UNIFORM: f64 = 1.0 - f64::EPSILON / 2.0;

fn random(temperature: f32) -> Decoding {
    filtered(temperature, None, None)
}

fn filtered(temperature: f32, top_k: Option<usize>, top_p: Option<f64>) -> Decoding {
    Decoding::Random(Filter { temperature, top_k, top_p })
}

fn picked(logits_v: &[f32], wanted: Wanted) -> Option<u32> {
    pick(logits_v, wanted, &mut Vec::new()).ok()
}

/// What the GPU draws from rows of logits, and the log-probabilities that the trainer gives the drawn tokens.
struct Draws {
    drawn: Vec<Option<(u32, f32)>>,
    trainers: Vec<Option<f32>>,
}

fn draw(logits_cv: &[f32], wanted: &[Wanted], vocab: usize) -> Draws {
    let (gpu, _turn) = (gpu(), gpu().turn());
    let logits = gpu.upload(Element::F32, logits_cv).unwrap();
    let statistics = gpu.row_statistics(&logits, vocab).unwrap();
    let draws: Vec<RowDraw> = wanted.iter().map(RowDraw::from).collect();
    let drawn = gpu.draw(&logits, &statistics, &draws, vocab).unwrap();
    let RowStatistics { lse, .. } = statistics;
    let rows: Vec<u32> = (0..wanted.len() as u32).collect();
    let tokens: Vec<u32> = drawn.iter().map(|drawn| drawn.map_or(0, |(token, _)| token)).collect();
    let [rows, tokens] = [rows, tokens].map(|values| gpu.upload_u32(&values).unwrap());
    let logprobs = gpu.target_logprobs(&logits, &lse, &rows, &tokens, vocab).unwrap();
    let logprobs = gpu.download(&logprobs).unwrap();
    let trainers = drawn.iter().zip(logprobs).map(|(drawn, logprob)| drawn.map(|_| logprob)).collect();
    Draws { drawn, trainers }
}

/// The definition in f64: weights of one row, and sums of all before each token and of all.
struct Definition {
    weights: Vec<f64>,
    below: Vec<f64>,
    total: f64,
}

impl Definition {
    fn of(logits_v: &[f32], temperature: f32) -> Self {
        let largest = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| f64::from((logit - largest) / temperature).exp();
        let weights: Vec<f64> = logits_v.iter().map(weight).collect();
        let mut total = 0.0;
        let mut before = |weight: &f64| {
            let below = total;
            total += weight;
            below
        };
        let below = weights.iter().map(&mut before).collect();
        Self { weights, below, total }
    }

    /// The token's share of [0, 1).
    fn share(&self, token: u32) -> [f64; 2] {
        let below = self.below[token as usize];
        [below / self.total, (below + self.weights[token as usize]) / self.total]
    }

    /// Whether the token may come of the uniform number, its borders moved by rounding.
    fn allows(&self, token: u32, uniform: f64) -> bool {
        let [begin, end] = self.share(token);
        begin - ROUNDING <= uniform && uniform < end + ROUNDING && self.weights[token as usize] > 0.0
    }

    /// Whether rounding explains that one drew this token and the other that: all between them is as close to the
    /// uniform number as it moves a border.
    fn are_neighbours(&self, one: u32, other: u32, uniform: f64) -> bool {
        let (first, last) = (one.min(other), one.max(other));
        [self.share(first)[1], self.share(last)[0]].iter().all(|border| (border - uniform).abs() <= ROUNDING)
    }
}

/// A row with ties, and with tokens that a mask has forbidden; at least one is not.
fn row(seed: u64, vocab: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let scale = [1.0, 4.0, 12.0][random.next_u32() as usize % 3];
    let mut row_v: Vec<f32> = (0..vocab)
        .map(|_| match random.next_u32() % 12 {
            0 => 3.0,
            1 => f32::NEG_INFINITY,
            _ => scale * (random.next_u32() as f32 / 2f32.powi(31) - 1.0),
        })
        .collect();
    row_v[random.next_u32() as usize % vocab] = scale;
    row_v
}

fn vocab() -> impl Strategy<Value = usize> {
    // Beside one chunk, two and three, a few tokens more or less.
    prop_oneof![3 => 1usize..700, 1 => 4090usize..4103, 1 => 8186usize..8400]
}

fn wanted() -> impl Strategy<Value = Wanted> {
    let temperature = prop_oneof![2 => Just(1.0f32), 3 => 0.05f32..3.0, 1 => Just(1e-3f32), 1 => Just(1e-40f32), 1 => Just(1e30f32)];
    let decoding = prop_oneof![1 => Just(Decoding::Greedy), 3 => temperature.prop_map(random)];
    let uniform = prop_oneof![4 => 0.0f64..1.0, 1 => Just(0.0), 1 => Just(LARGEST_UNIFORM)];
    (decoding, uniform).prop_map(|(decoding, uniform)| Wanted { decoding, uniform })
}

/// What is written over one value of a row, or with −∞ over all.
fn flaw() -> impl Strategy<Value = Option<f32>> {
    let flaw = prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)];
    prop_oneof![5 => Just(None), 1 => flaw.prop_map(Some)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// And its log-probability is the trainer's, to the bit; rows that are not finite harm no others.
    #[test]
    fn a_gpu_draws_what_the_host_draws(
        vocab in vocab(),
        rows in prop::collection::vec((any::<u64>(), flaw(), wanted()), 1..7),
    ) {
        let rows: Vec<(Vec<f32>, Wanted)> = rows
            .into_iter()
            .map(|(seed, flaw, wanted)| {
                let mut row_v = row(seed, vocab);
                match flaw {
                    Some(f32::NEG_INFINITY) => row_v.fill(f32::NEG_INFINITY),
                    Some(flaw) => row_v[seed as usize % vocab] = flaw,
                    None => {}
                }
                (row_v, wanted)
            })
            .collect();
        let logits: Vec<f32> = rows.iter().flat_map(|(row_v, _)| row_v.iter().copied()).collect();
        let wanted: Vec<Wanted> = rows.iter().map(|(_, wanted)| *wanted).collect();
        let Draws { drawn, trainers } = draw(&logits, &wanted, vocab);
        for (((row_v, wanted), drawn), trainers) in rows.iter().zip(drawn).zip(trainers) {
            let host = picked(row_v, *wanted);
            assert_eq!(drawn.map(|(_, logprob)| logprob.to_bits()), trainers.map(f32::to_bits));
            let (token, host) = match (drawn, host) {
                (Some((token, _)), Some(host)) => (token, host),
                (drawn, host) => {
                    assert_eq!((drawn, host), (None, None), "{wanted:?}");
                    continue;
                }
            };
            let Wanted { decoding: Decoding::Random(filter), uniform } = *wanted else {
                assert_eq!(token, host, "the likeliest");
                continue;
            };
            let definition = Definition::of(row_v, filter.temperature);
            assert!(definition.allows(token, uniform), "{token} of {wanted:?}: {:?}", definition.share(token));
            assert!(
                token == host || definition.are_neighbours(token, host, uniform),
                "{token}, and the host drew {host}, of {wanted:?}"
            );
        }
    }
}

/// Weights of 1 have exact sums, so there is no rounding to allow for: nobody's share is lost, however small.
#[test]
fn equal_logits_share_the_uniform_numbers_equally() {
    for vocab in [1, 2, 255, 4095, 4096, 4097, 20_000, 151_936] {
        let last = vocab - 1;
        let mut uniforms = vec![0.0, 0.37, LARGEST_UNIFORM];
        // In the middle of a token's share, at its begin, and just below it.
        for token in [last / 2, last, 4095.min(last), 4096.min(last)] {
            let begin = token as f64 / vocab as f64;
            uniforms.extend([(token as f64 + 0.5) / vocab as f64, begin, begin.next_down().max(0.0)]);
        }
        let wanted: Vec<Wanted> =
            uniforms.iter().map(|u| Wanted { decoding: random(0.3), uniform: *u }).collect();
        let Draws { drawn, .. } = draw(&vec![-7.25; vocab * wanted.len()], &wanted, vocab);
        for (uniform, drawn) in uniforms.iter().zip(drawn) {
            let (token, logprob) = drawn.expect("a row of numbers");
            assert_eq!(token, (uniform * vocab as f64) as u32, "{uniform} of {vocab}");
            let off = (f64::from(logprob) + (vocab as f64).ln()).abs();
            // A logarithm of up to 11.9 and two sums of that size, each rounded to 1e-6.
            assert!(off < 4e-6, "{vocab}: {off:e}");
        }
    }
}

/// A grid of uniform numbers counts a token's share exactly, give or take the points at its two borders.
#[test]
fn a_grid_of_uniform_numbers_counts_the_shares_of_tokens() {
    let (vocab, points) = (4300, 500u32);
    let mut row_v = row(5, vocab);
    // At temperature 1 a few tokens have a tenth each, on both sides of the border between chunks; thousands share
    // what is left.
    row_v.iter_mut().for_each(|logit| *logit = logit.min(3.0));
    let tail: f64 = row_v.iter().map(|logit| f64::from(*logit).exp()).sum();
    for token in [0, 17, 4095, 4096, 4299] {
        row_v[token] = (tail / 5.0).ln() as f32;
    }
    for temperature in [1.0, 0.8, 2.0] {
        let uniforms: Vec<f64> = (0..points).map(|i| (f64::from(i) + 0.5) / f64::from(points)).collect();
        let wanted: Vec<Wanted> =
            uniforms.iter().map(|u| Wanted { decoding: random(temperature), uniform: *u }).collect();
        let Draws { drawn, .. } = draw(&row_v.repeat(points as usize), &wanted, vocab);
        let tokens: Vec<u32> = drawn.into_iter().map(|drawn| drawn.expect("a row of numbers").0).collect();
        assert!(tokens.is_sorted(), "the walk is in the order of ids");
        let definition = Definition::of(&row_v, temperature);
        let mut counts = vec![0.0; vocab];
        for (token, uniform) in tokens.iter().zip(uniforms) {
            assert!(definition.allows(*token, uniform), "{token} of {uniform}");
            counts[*token as usize] += 1.0;
        }
        for token in 0..vocab as u32 {
            let [begin, end] = definition.share(token);
            let expected = (end - begin) * f64::from(points);
            let off = (counts[token as usize] - expected).abs();
            assert!(off <= 1.0 + 2.0 * ROUNDING * f64::from(points), "{token}: {expected} were due");
        }
        let likely = [0, 17, 4095, 4096, 4299].map(|token| counts[token]);
        assert!(temperature > 1.0 || likely.iter().all(|count| *count > 40.0), "{likely:?}");
    }
}

/// Every way of drawing, over the whole pass: tokens are the host's for these logits, log-probabilities the trainer's.
#[test]
fn a_pass_draws_each_row_as_it_is_asked() {
    for (model, _) in device_models() {
        let adapters = [adapter(model, 3, &ALL), adapter(model, 4, &ALL[6..])];
        let sequence = &sequences()[0];
        let (device, hidden) = {
            let _turn = gpu().turn();
            let device = DeviceModel::new(gpu(), &model.config, model.weights()).unwrap();
            let on_device = device.adapter((&adapters[0]).into()).unwrap();
            let hidden = alone(&device, sequence, &Some(on_device));
            let hidden = gpu().upload(device.element, &hidden).unwrap();
            (device, hidden)
        };
        let on_gpu = placed(model, device);
        let decodings = [
            random(1.0),
            Decoding::Greedy,
            filtered(0.8, Some(3), None),
            filtered(1.0, None, Some(0.7)),
            random(0.6),
            filtered(1.0, Some(2), Some(0.9)),
        ];
        let rows = sequence.len().min(20);
        // One adapter for all of them, and several, the base model among them.
        for which in [&[Some(0)][..], &[Some(0), Some(0), None, Some(1)]] {
            let rows: Vec<DrawRow<'_>> = (0..rows)
                .map(|row| DrawRow {
                    row,
                    adapter: which[row % which.len()].map(|i: usize| (&adapters[i]).into()),
                    decoding: decodings[row % decodings.len()],
                    key: DrawKey { seed: 9, sequence: 1, position: row as u64 },
                })
                .collect();
            assert_pass(&on_gpu, &HiddenStates::Gpu(hidden.clone()), &rows, which.len() > 1);
        }
    }
}

fn assert_pass(model: &BaseModel, hidden: &HiddenStates, rows: &[DrawRow<'_>], is_mixed: bool) {
    let (workspace, team) = (&mut Workspace::default(), &Team::solo());
    let drawn = draw_rows(model, hidden, rows, &mut DrawBuffers::default(), workspace, team).unwrap();
    let (Place::Gpu(device), HiddenStates::Gpu(on_gpu)) = (&model.place, hidden) else { unreachable!() };
    let logits = {
        let _turn = gpu().turn();
        let of_head: Vec<_> =
            rows.iter().map(|row| (row.row, row.adapter.map(|a| device.adapter(a).unwrap()))).collect();
        gpu().download(&head_logits(device, on_gpu, &of_head).unwrap()).unwrap()
    };
    for ((row, drawn), logits_v) in rows.iter().zip(&drawn).zip(logits.chunks(model.config.vocab_size)) {
        let drawn = drawn.expect("a row of numbers");
        let uniform = row.key.uniform();
        let host = picked(logits_v, Wanted { decoding: row.decoding, uniform }).expect("a row of numbers");
        match row.decoding {
            Decoding::Random(filter) if !row.decoding.is_filtered() => {
                let definition = Definition::of(logits_v, filter.temperature);
                assert!(definition.allows(drawn.token, uniform), "{}: {drawn:?}", model.name);
            }
            _ => assert_eq!(drawn.token, host, "{}: {:?}", model.name, row.decoding),
        }
        // The trainer's, of all rows at once under this row's adapter.
        let targets: Vec<_> = rows.iter().map(|other| (other.row, drawn.token)).collect();
        let request = HeadRequest { targets: &targets, top_k: 0, entropy: false };
        let trainers = logprobs_of(model, row.adapter, hidden, request, workspace, team).unwrap().logprobs;
        let at = targets.iter().position(|(other, _)| *other == row.row).expect("it is one of them");
        match is_mixed && is_real() {
            // cuBLAS chooses by the number of rows, and an adapter's are fewer here.
            true => assert!(distance(&[drawn.logprob], &[trainers[at].into()]) < tolerance_of(model)),
            false => assert_eq!(drawn.logprob.to_bits(), trainers[at].to_bits(), "{}", model.name),
        }
    }
}

fn tolerance_of(model: &BaseModel) -> f64 {
    let Place::Gpu(device) = &model.place else { unreachable!() };
    if device.element == Element::F32 { F32_TOLERANCE } else { BF16_TOLERANCE }
}

/// More rows than a chunk of logits has: the second chunk's are counted on from the first's.
#[test]
fn a_draw_of_many_rows_goes_chunk_by_chunk() {
    let (model, device) = &device_models()[0];
    let rows_most = head::rows_most(model.config.vocab_size);
    let hidden = {
        let _turn = gpu().turn();
        gpu().upload(device.element, &alone(device, &sequences()[0], &None)).unwrap()
    };
    let decodings = [Decoding::Greedy, filtered(1.0, Some(4), None), random(1.0)];
    let rows: Vec<_> = (0..rows_most + 6).map(|row| (row % rows_most % 40, None)).collect();
    let wanted = |row: usize| Wanted { decoding: decodings[row % rows_most % 3], uniform: 0.4 };
    let wanted: Vec<Wanted> = (0..rows.len()).map(wanted).collect();
    let mut logits_sv = Vec::new();
    let (drawn, left) = {
        let _turn = gpu().turn();
        super::draw_rows(device, &hidden, &rows, &wanted, &mut logits_sv).unwrap()
    };
    assert_eq!(drawn.len(), rows.len());
    let filtered: Vec<usize> = (0..rows.len()).filter(|row| row % rows_most % 3 == 1).collect();
    assert_eq!((&left.rows, left.lse.len()), (&filtered, filtered.len()));
    assert_eq!(logits_sv.len(), filtered.len() * model.config.vocab_size);
    if !is_real() {
        // The same rows again, in another chunk.
        assert_eq!(drawn[..6], drawn[rows_most..]);
        let of = |row: usize| left.rows.iter().position(|left| *left == row).unwrap();
        let logits = |row: usize| &logits_sv[of(row) * model.config.vocab_size..][..model.config.vocab_size];
        assert_eq!(bits(logits(4)), bits(logits(rows_most + 4)));
        assert_eq!(left.lse[of(4)].to_bits(), left.lse[of(rows_most + 4)].to_bits());
    }
}

/// A step of decoding draws within what the head of a micro-batch with as many rows is reckoned with.
#[test]
fn a_draw_takes_no_more_than_the_head_of_a_micro_batch() {
    for model in models().iter().filter(|model| model.config.experts.is_none()) {
        let dtype = if model.weights().embed.rounds_inputs() { WeightDtype::Bf16 } else { WeightDtype::F32 };
        let footprint = model.config.gpu_footprint(&ComputeOptions { dtype, ..ComputeOptions::default() });
        // Of its own: other tests allocate on the shared one meanwhile.
        let gpu = open();
        let device = DeviceModel::new(&gpu, &model.config, model.weights()).unwrap();
        let adapter = adapter(model, 3, &ALL);
        let on_device = device.adapter((&adapter).into()).unwrap();
        let rows: Vec<_> = (0..48).map(|row| (row, Some(on_device.clone()))).collect();
        let hidden = gpu.upload(device.element, &vec![0.5; rows.len() * model.config.hidden_size]).unwrap();
        let decodings = [random(0.9), filtered(1.0, Some(4), None), Decoding::Greedy];
        let wanted: Vec<Wanted> =
            (0..rows.len()).map(|row| Wanted { decoding: decodings[row % 3], uniform: 0.4 }).collect();
        let [before, _] = gpu.held();
        super::draw_rows(&device, &hidden, &rows, &wanted, &mut Vec::new()).unwrap();
        let [after, most] = gpu.held();
        assert_eq!(after, before, "{}: nothing stays", model.name);
        let rank = u64::from(adapter.layout.config.rank);
        let said = (footprint.head + footprint.head_of_rank * rank) * rows.len() as u64;
        let logits = 4 * (rows.len() * model.config.vocab_size) as u64;
        let taken = most - before;
        assert!((logits..said).contains(&taken), "{}: {taken} taken, {said} said", model.name);
    }
}

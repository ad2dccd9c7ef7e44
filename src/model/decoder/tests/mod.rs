//! The decoder against candle's autograd in f64, and against itself, to the bit.

mod reference;

use std::sync::{Arc, OnceLock};

use crate::{
    kernels::{CoreBudget, Matrix, Priority, Team, WeightDtype, with_emulated_tiles},
    model::{
        Adapter, BaseModel, Batch, BatchSequence, ComputeOptions, ExpertsConfig, Family, HeadGradient,
        HeadRequest, KvCache, LayerWeights, LoraLayout, Mlp, MlpWeights, ModelConfig, RopeScaling, Tape,
        Workspace, backward, forward, head_logits, head_logprobs, tiny,
    },
    types::{LoraConfig, LoraTarget},
};
use reference::Reference;

/// Widths that fill no vector and no panel, three query heads to a key head.
pub(in crate::model) fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 40,
        intermediate_size: 72,
        num_layers: 3,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 12,
        ..tiny::config()
    }
}

/// A model of each kind.
pub(in crate::model) fn models() -> &'static [BaseModel] {
    static MODELS: OnceLock<Vec<BaseModel>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 32,
        };
        let kinds = [
            config(),
            ModelConfig { rope_scaling: llama3, rope_theta: 500.0, ..config() },
            ModelConfig { rope_scaling: RopeScaling::Linear { factor: 3.0 }, ..config() },
            ModelConfig { family: Family::Qwen2, tie_word_embeddings: false, ..config() },
            ModelConfig { family: Family::Qwen3, ..config() },
            mixture(true, vec![]),
            // A layer with one MLP between two with experts.
            mixture(false, vec![1]),
        ];
        let mut models: Vec<BaseModel> = kinds.map(|kind| load(kind, WeightDtype::F32)).into();
        models.extend([config(), mixture(true, vec![])].map(|kind| load(kind, WeightDtype::Bf16)));
        models
    })
}

fn mixture(normalises: bool, dense_layers: Vec<usize>) -> ModelConfig {
    let experts = ExpertsConfig { count: 5, per_row: 2, intermediate_size: 20, normalises, dense_layers };
    ModelConfig { family: Family::Qwen3Moe, experts: Some(experts), ..config() }
}

fn load(config: ModelConfig, dtype: WeightDtype) -> BaseModel {
    let directory = tempfile::tempdir().unwrap();
    tiny::write(directory.path(), &config, 7).unwrap();
    let model = BaseModel::load_as(dtype, config.family.model_type(), directory.path()).unwrap();
    assert_eq!(model.config, config);
    model
}

fn model() -> &'static BaseModel {
    &models()[0]
}

/// An adapter all of whose values are random; seeds differ, ranks too.
pub(in crate::model) fn adapter(model: &BaseModel, seed: u64, targets: &[LoraTarget]) -> Adapter {
    let lora =
        LoraConfig { rank: 3 + seed as u32 % 4, targets: targets.to_vec(), ..LoraConfig::new(4, seed) };
    let layout = Arc::new(LoraLayout::new(&model.config, &lora).unwrap());
    let values: Vec<f32> = (0..layout.len()).map(|i| 0.1 * noise(seed, i)).collect();
    Adapter { layout, values: values.into() }
}

pub(in crate::model) const ALL: [LoraTarget; 8] = [
    LoraTarget::QProj,
    LoraTarget::KProj,
    LoraTarget::VProj,
    LoraTarget::OProj,
    LoraTarget::GateProj,
    LoraTarget::UpProj,
    LoraTarget::DownProj,
    LoraTarget::LmHead,
];

/// A number in ±1 that looks random (the finaliser of splitmix64).
pub(in crate::model) fn noise(seed: u64, i: usize) -> f32 {
    let mut z = (seed << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

pub(in crate::model) fn tokens(seed: u64, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((noise(seed, i) + 1.0) * 129.0) as u32).collect()
}

/// Sequences longer than a block of attention, shorter, and a single token.
pub(in crate::model) fn sequences() -> Vec<Vec<u32>> {
    [45, 7, 1, 70].into_iter().enumerate().map(|(seed, len)| tokens(seed as u64, len)).collect()
}

fn hidden_of(model: &BaseModel, sequences: &[Vec<u32>], adapter: Option<&Adapter>, team: &Team) -> Vec<f32> {
    let mut batch = Batch { sequences: Vec::new() };
    for tokens in sequences {
        batch.sequences.push(BatchSequence { tokens, kv_cache: None, adapter: adapter.map(Into::into) });
    }
    forward(model, &mut batch, None, &mut Workspace::default(), team)
}

/// Weighted log-probabilities of some targets, their sum's gradient, and the log-probabilities.
pub(in crate::model) struct Trained {
    pub gradient: Vec<f32>,
    pub logprobs: Vec<f32>,
}

/// Every row has a target; every third row a second one, every fifth's factor is 0.
pub(in crate::model) fn targets(sequences: &[Vec<u32>]) -> (Vec<(usize, u32)>, Vec<f32>) {
    let rows: usize = sequences.iter().map(Vec::len).sum();
    let rows = (0..rows).flat_map(|row| std::iter::repeat_n(row, if row % 3 == 0 { 2 } else { 1 }));
    let targets: Vec<_> = rows.enumerate().map(|(i, row)| (row, tokens(99, 200)[i % 200])).collect();
    let factors =
        targets.iter().enumerate().map(|(i, (row, _))| if row % 5 == 0 { 0.0 } else { noise(5, i) });
    let factors = factors.collect();
    (targets, factors)
}

pub(in crate::model) fn train(
    model: &BaseModel,
    sequences: &[Vec<u32>],
    adapter: &Adapter,
    workspace: &mut Workspace,
    team: &Team,
) -> Trained {
    let mut batch = Batch { sequences: Vec::new() };
    for tokens in sequences {
        batch.sequences.push(BatchSequence { tokens, kv_cache: None, adapter: Some(adapter.into()) });
    }
    let mut tape = Tape::default();
    let hidden = forward(model, &mut batch, Some(&mut tape), workspace, team);
    let (targets, factors) = targets(sequences);
    let mut d_hidden = vec![0.0; hidden.len()];
    let request = HeadRequest { targets: &targets, top_k: 0, entropy: false };
    let mut gradient = vec![0.0; adapter.layout.len()];
    let onward =
        HeadGradient { adapter: &mut gradient, factor: &mut |i, _| factors[i], d_hidden: &mut d_hidden };
    let rows = Some(adapter.into());
    let logprobs = head_logprobs(model, rows, &hidden, request, Some(onward), workspace, team).logprobs;
    backward(model, adapter.into(), &mut tape, &d_hidden, &mut gradient, workspace, team);
    Trained { gradient, logprobs }
}

/// `‖a − b‖ / ‖b‖`; 0 if both are 0, as the gradients of an expert that no row chose.
pub(in crate::model) fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    match difference {
        0.0 => 0.0,
        _ => (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt(),
    }
}

/// Some ten roundings to 6e-8 stand between an input and a result, each amplified a little by
/// norms and softmax; a wrong formula is off by more than 1e-3.
const TOLERANCE: f64 = 5e-6;

/// Those whose products round nothing, as the reference. (The goldens of PyTorch round as bf16 does.)
fn exact_models() -> impl Iterator<Item = &'static BaseModel> {
    models().iter().filter(|model| model.weights().embed.dtype() == WeightDtype::F32)
}

fn assert_close(model: &BaseModel, adapter: &Adapter, sequences: &[Vec<u32>]) {
    let trained = train(model, sequences, adapter, &mut Workspace::default(), &Team::solo());
    let (gradient, logprobs) = Reference::new(model, adapter).train(sequences);
    let [logprobs, whole] = [(&trained.logprobs, &logprobs), (&trained.gradient, &gradient)]
        .map(|(ours, reference)| distance(ours, reference));
    assert!(logprobs < TOLERANCE, "log-probabilities are {logprobs:e} off");
    assert!(whole < TOLERANCE, "the gradient is {whole:e} off");
    for entry in &adapter.layout.entries {
        for matrix in [&entry.a, &entry.b] {
            let off = distance(&trained.gradient[matrix.clone()], &gradient[matrix.clone()]);
            assert!(off < TOLERANCE, "{:?} of layer {} is {off:e} off", entry.target, entry.layer);
        }
    }
}

#[test]
fn gradients_are_those_of_autograd() {
    for model in exact_models() {
        assert_close(model, &adapter(model, 1, &ALL), &sequences());
    }
}

#[test]
fn gradients_are_right_when_some_layers_have_no_adapter() {
    for model in exact_models() {
        // An expert's gate and up go together.
        let gate = if model.config.experts.is_some() { &ALL[4..6] } else { &ALL[4..5] };
        for targets in
            [&ALL[..1], &ALL[1..3], &ALL[3..4], gate, &ALL[6..7], &ALL[7..], &[ALL[2], ALL[6], ALL[7]]]
        {
            assert_close(model, &adapter(model, 2, targets), &sequences()[1..2]);
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn packed_sequences_are_those_alone() {
    for model in models() {
        let adapter = adapter(model, 3, &ALL);
        let packed = hidden_of(model, &sequences(), Some(&adapter), &Team::solo());
        let alone: Vec<f32> = sequences()
            .iter()
            .flat_map(|tokens| hidden_of(model, std::slice::from_ref(tokens), Some(&adapter), &Team::solo()))
            .collect();
        assert_eq!(bits(&packed), bits(&alone));
    }
}

#[test]
fn a_tape_and_a_used_workspace_change_nothing() {
    for model in models() {
        let adapter = adapter(model, 3, &ALL);
        let mut workspace = Workspace::default();
        let first = train(model, &sequences(), &adapter, &mut workspace, &Team::solo());
        // Other shapes in between, which leave their values in every buffer.
        train(model, &sequences()[..1], &adapter, &mut workspace, &Team::solo());
        hidden_of(model, &sequences()[1..], None, &Team::solo());
        let second = train(model, &sequences(), &adapter, &mut workspace, &Team::solo());
        assert_eq!(bits(&first.gradient), bits(&second.gradient));
        assert_eq!(bits(&first.logprobs), bits(&second.logprobs));
    }
}

#[test]
fn the_width_of_the_team_changes_nothing() {
    for model in models() {
        let adapter = adapter(model, 4, &ALL);
        let solo = train(model, &sequences(), &adapter, &mut Workspace::default(), &Team::solo());
        for cores in [2, 5] {
            let budget = CoreBudget::new(cores);
            let lease = budget.lease(cores, Priority::Training);
            let team = train(model, &sequences(), &adapter, &mut Workspace::default(), lease.team());
            assert_eq!(bits(&solo.gradient), bits(&team.gradient));
            assert_eq!(bits(&solo.logprobs), bits(&team.logprobs));
        }
    }
}

/// All of it on emulated tiles, as a CPU with AMX computes bf16: itself to the bit, and near the other paths. Sums in
/// another order differ by some 1e-7, which turns a few roundings to bf16; the tolerance is that of bf16's goldens.
#[test]
fn a_model_in_tiles_is_itself_and_near_the_others() {
    with_emulated_tiles(|| {
        packed_sequences_are_those_alone();
        decoding_in_any_steps_is_the_whole_forward();
        a_tape_and_a_used_workspace_change_nothing();
    });
    for model in models().iter().filter(|model| model.weights().embed.dtype() == WeightDtype::Bf16) {
        let adapter = adapter(model, 3, &ALL);
        let trained = || train(model, &sequences(), &adapter, &mut Workspace::default(), &Team::solo());
        let (tiled, other) = (with_emulated_tiles(trained), trained());
        let gap = |tiled: &[f32], other: &[f32]| {
            distance(tiled, &other.iter().map(|value| f64::from(*value)).collect::<Vec<_>>())
        };
        for gap in [gap(&tiled.gradient, &other.gradient), gap(&tiled.logprobs, &other.logprobs)] {
            assert!(gap < 1e-2, "{gap}");
            assert!(gap > 0.0 || crate::kernels::path() == "amx_bf16", "tiles have bits of their own");
        }
    }
}

/// Runs a sequence through a cache in steps of these lengths; returns all hidden states.
fn in_steps(
    model: &BaseModel,
    tokens: &[u32],
    steps: &[usize],
    cache: &mut KvCache,
    adapter: Option<&Adapter>,
) -> Vec<f32> {
    let mut workspace = Workspace::default();
    let (mut hidden, mut done) = (Vec::new(), 0);
    for step in steps {
        let tokens = &tokens[done..done + step];
        let sequence = BatchSequence { tokens, kv_cache: Some(cache), adapter: adapter.map(Into::into) };
        let mut batch = Batch { sequences: vec![sequence] };
        hidden.extend(forward(model, &mut batch, None, &mut workspace, &Team::solo()));
        done += step;
    }
    hidden
}

#[test]
fn decoding_in_any_steps_is_the_whole_forward() {
    let tokens = tokens(11, 75);
    for model in models() {
        let adapter = adapter(model, 5, &ALL);
        let whole = hidden_of(model, std::slice::from_ref(&tokens), Some(&adapter), &Team::solo());
        let ones = vec![1; tokens.len()];
        for steps in [&[75][..], &[40, 35], &[31, 1, 1, 2, 40], &[32, 32, 11], &ones] {
            let mut cache = KvCache::new(&model.config);
            let hidden = in_steps(model, &tokens, steps, &mut cache, Some(&adapter));
            assert_eq!(bits(&whole), bits(&hidden), "{} in steps {steps:?}", model.name);
            assert_eq!(cache.len(), tokens.len());
        }
    }
}

#[test]
fn forks_share_the_past_and_not_the_future() {
    let (past, futures) = (tokens(12, 45), [tokens(13, 30), tokens(14, 30)]);
    let mut trunk = KvCache::new(&config());
    in_steps(model(), &past, &[45], &mut trunk, None);
    let mut forks = [trunk.fork(), trunk];
    // In turns, so that a block shared by mistake would be overwritten.
    let mut hidden = [Vec::new(), Vec::new()];
    for step in 0..30 {
        for fork in 0..2 {
            let token = &futures[fork][step..step + 1];
            hidden[fork].extend(in_steps(model(), token, &[1], &mut forks[fork], None));
        }
    }
    for (future, hidden) in futures.iter().zip(hidden) {
        let sequence = [past.clone(), future.clone()].concat();
        let whole = hidden_of(model(), &[sequence], None, &Team::solo());
        assert_eq!(bits(&whole[45 * config().hidden_size..]), bits(&hidden));
    }
}

#[test]
fn mixed_adapters_in_one_batch_are_each_alone() {
    for model in models() {
        let adapters = [adapter(model, 6, &ALL), adapter(model, 7, &ALL[..2]), adapter(model, 9, &ALL)];
        let of_sequence = [Some(&adapters[0]), None, Some(&adapters[1]), Some(&adapters[2])];
        let sequences = sequences();
        let mut caches: Vec<KvCache> = sequences.iter().map(|_| KvCache::new(&config())).collect();
        let mut batch = Batch { sequences: Vec::new() };
        for ((tokens, adapter), (index, cache)) in
            sequences.iter().zip(of_sequence).zip(caches.iter_mut().enumerate())
        {
            let kv_cache = (index != 1).then_some(cache);
            batch.sequences.push(BatchSequence { tokens, kv_cache, adapter: adapter.map(Into::into) });
        }
        let budget = CoreBudget::new(2);
        let lease = budget.lease(2, Priority::Sampling);
        let mixed = forward(model, &mut batch, None, &mut Workspace::default(), lease.team());
        let alone: Vec<f32> = sequences
            .iter()
            .zip(of_sequence)
            .flat_map(|(tokens, adapter)| {
                hidden_of(model, std::slice::from_ref(tokens), adapter, &Team::solo())
            })
            .collect();
        assert_eq!(bits(&mixed), bits(&alone));
    }
}

/// With one adapter or the other, after a pass of another shape: recomputing is not approximating.
#[test]
fn activation_checkpointing_changes_no_bit() {
    let options = ComputeOptions { activation_checkpointing: true, ..ComputeOptions::default() };
    for model in models() {
        let mut workspace = Workspace::new(options);
        for (seed, targets) in [(3, &ALL[..]), (4, &ALL[4..]), (5, &ALL[..2]), (6, &ALL[7..])] {
            let adapter = adapter(model, seed, targets);
            let kept = train(model, &sequences(), &adapter, &mut Workspace::default(), &Team::solo());
            train(model, &sequences()[..2], &adapter, &mut workspace, &Team::solo());
            let budget = CoreBudget::new(2);
            let lease = budget.lease(2, Priority::Training);
            let again = train(model, &sequences(), &adapter, &mut workspace, lease.team());
            assert_eq!(bits(&kept.gradient), bits(&again.gradient), "{}", model.name);
            assert_eq!(bits(&kept.logprobs), bits(&again.logprobs), "{}", model.name);
        }
    }
}

/// The formula of model/memory.rs against what a pass over a micro-batch holds: never less, and
/// little more.
#[test]
fn memory_is_what_the_formula_says() {
    for (model, activation_checkpointing) in models().iter().flat_map(|model| [(model, false), (model, true)])
    {
        let dtype = model.weights().embed.dtype();
        let options = ComputeOptions { dtype, activation_checkpointing, ..ComputeOptions::default() };
        assert_memory(model, options);
    }
}

fn assert_memory(model: &BaseModel, options: ComputeOptions) {
    let sequence = vec![tokens(21, 256)];
    {
        let adapter = adapter(model, 3, &ALL);
        let mut workspace = Workspace::new(options);
        train(model, &sequence, &adapter, &mut workspace, &Team::solo());
        // Hidden states and their gradient are the caller's.
        let results = 2 * 4 * 256 * model.config.hidden_size;
        let held = (workspace.allocated() + results) as f64;
        let footprint = model.config.footprint(&options);
        let sums = footprint.run(&adapter.layout.config, 0).work - footprint.workspace;
        let said = (footprint.run(&adapter.layout.config, 256).work - sums) as f64;
        let ratio = said / held;
        assert!((1.0..1.1).contains(&ratio), "{}, {options:?}: {said} said, {held} held", model.name);

        let weights = model.weights().layers.iter().map(layer_bytes).sum::<usize>();
        let tables = [&model.weights().embed, &model.weights().head].map(Matrix::bytes);
        let tables = if model.config.tie_word_embeddings { tables[0] } else { tables[0] + tables[1] };
        let norm = 4 * model.weights().final_norm.len();
        assert_eq!(footprint.weights, (weights + tables + norm) as u64, "{}", model.name);
    }
}

fn layer_bytes(layer: &LayerWeights) -> usize {
    let LayerWeights { attn_norm, q, k, v, o, qkv_bias, qk_norm, mlp_norm, mlp } = layer;
    let mlp_bytes =
        |mlp: &MlpWeights| [&mlp.gate, &mlp.up, &mlp.down].map(Matrix::bytes).iter().sum::<usize>();
    let mlp = match mlp {
        Mlp::Dense(mlp) => mlp_bytes(mlp),
        Mlp::Experts(mixture) => {
            mixture.router.bytes() + mixture.experts.iter().map(mlp_bytes).sum::<usize>()
        }
    };
    let bias = qkv_bias.as_ref().map_or(0, |bias| bias.q.len() + bias.k.len() + bias.v.len());
    let heads = qk_norm.as_ref().map_or(0, |norm| norm.q.len() + norm.k.len());
    let vectors = 4 * (attn_norm.len() + mlp_norm.len() + bias + heads);
    vectors + mlp + [q, k, v, o].map(Matrix::bytes).iter().sum::<usize>()
}

#[test]
fn head_gives_the_same_numbers_by_row_and_by_target() {
    let sequences = sequences();
    let hidden = hidden_of(model(), &sequences, None, &Team::solo());
    let (targets, _) = targets(&sequences);
    let mut workspace = Workspace::default();
    let request = HeadRequest { targets: &targets, top_k: 4, entropy: false };
    let scores = head_logprobs(model(), None, &hidden, request, None, &mut workspace, &Team::solo());
    let scores = scores.logprobs.into_iter().zip(scores.alternatives);
    for (&(row, token), (logprob, alternatives)) in targets.iter().zip(scores) {
        let mut logits = Vec::new();
        head_logits(model(), &hidden, &[(row, None)], &mut logits, &mut workspace, &Team::solo());
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
        let lse = f64::from(max) + sum.ln();
        // f32 holds logits and sums of this size to 1e-6.
        assert!((f64::from(logits[token as usize]) - lse - f64::from(logprob)).abs() < 5e-6);
        let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
        ranked.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        assert_eq!(alternatives.iter().map(|(token, _)| *token).collect::<Vec<_>>(), ranked[..4]);
        for (token, alternative) in alternatives {
            assert!((f64::from(logits[token as usize]) - lse - f64::from(alternative)).abs() < 5e-6);
        }
    }
}

//! The decoder on a GPU against the one on the CPU, and against itself, to the bit. The GPU is the
//! emulated one, or with `LOCKSTEP_TEST_DEVICE=cuda` and the feature `cuda` a real one.

use std::sync::{Arc, OnceLock};

mod draw;

use super::{head::head_logits, *};
use crate::{
    gpu::{DeviceChoice, Element, Gpu},
    kernels::{Team, WeightDtype},
    model::{
        Adapter, AdapterRows, BaseModel, ComputeOptions, Family, HeadRequest, ModelConfig, Place, Workspace,
        decoder::tests::{ALL, Trained, adapter, distance, models, sequences, targets, tokens, train},
        head_logits as cpu_head_logits, prepare, run_micro_batch, tiny,
    },
    types::{Datum, LossFn, LossSpec, ModelInput},
};

/// f32 against f32: sums in another order, some hundred of them between input and result.
const F32_TOLERANCE: f64 = 2e-5;

/// Every activation between two products rounded to 8 bits (2⁻⁹ = 2e-3 each, some thirty in a row, of
/// random sign, under adapters that are as large as the weights): 3.3e-2 at worst as measured. The CPU
/// rounds weights alone. The same kernels, in f32, are held to the tolerance above.
const BF16_TOLERANCE: f64 = 5e-2;

/// Of one matrix's gradient: keys of the lowest layer get what is left of large terms that cancel.
const BF16_MATRIX_TOLERANCE: f64 = 8e-2;

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(open)
}

pub(super) fn open() -> Gpu {
    let choice = std::env::var("LOCKSTEP_TEST_DEVICE").map_or(DeviceChoice::Emulated, |c| c.parse().unwrap());
    match choice {
        DeviceChoice::Cuda(ordinal) => Gpu::cuda(ordinal).unwrap(),
        _ => Gpu::emulated().unwrap(),
    }
}

/// The models without experts, on the GPU beside those on the CPU.
fn device_models() -> &'static [(&'static BaseModel, DeviceModel)] {
    static MODELS: OnceLock<Vec<(&BaseModel, DeviceModel)>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let dense = models().iter().filter(|model| model.config.experts.is_none());
        dense.map(|m| (m, DeviceModel::new(gpu(), &m.config, m.weights()).unwrap())).collect()
    })
}

/// The model where passes find it on the GPU.
fn placed(model: &BaseModel, device: DeviceModel) -> BaseModel {
    BaseModel {
        name: model.name.clone(),
        config: model.config.clone(),
        place: Place::Gpu(Box::new(device)),
        text: model.text.clone(),
        digest: model.digest,
    }
}

/// On a GPU cuBLAS chooses by the number of rows, so products of others are as near as sums in another order.
pub(super) fn is_real() -> bool {
    !gpu().name().starts_with("emulated")
}

pub(super) fn tolerance(model: &BaseModel) -> f64 {
    if model.weights().embed.rounds_inputs() { BF16_TOLERANCE } else { F32_TOLERANCE }
}

fn train_on(model: &DeviceModel, sequences: &[Vec<u32>], adapter: &Adapter, recomputes: bool) -> Trained {
    let _turn = gpu().turn();
    let on_device = model.adapter(adapter.into()).unwrap();
    let mut batch: Vec<_> = sequences
        .iter()
        .map(|tokens| DeviceSequence { tokens, cache: None, adapter: Some(on_device.clone()) })
        .collect();
    let mut tape = DeviceTape::new(recomputes);
    let hidden = forward(model, &mut batch, Some(&mut tape)).unwrap();
    let (targets, factors) = targets(sequences);
    let d_hidden = gpu().zeros(hidden.element(), hidden.len()).unwrap();
    let gradient = model.gradient(&adapter.layout).unwrap();
    let request = HeadRequest { targets: &targets, top_k: 0, entropy: false };
    let onward =
        DeviceHeadGradient { adapter: &gradient, factor: &mut |i, _| factors[i], d_hidden: &d_hidden };
    let scores = head_logprobs(model, Some(&on_device), &hidden, request, Some(onward)).unwrap();
    backward(model, &on_device, &mut tape, &d_hidden, &gradient).unwrap();
    Trained { gradient: gpu().download(&gradient).unwrap(), logprobs: scores.logprobs }
}

pub(super) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn assert_close(model: &BaseModel, device: &DeviceModel, adapter: &Adapter, sequences: &[Vec<u32>]) {
    let cpu = train(model, sequences, adapter, &mut Workspace::default(), &Team::solo());
    let ours = train_on(device, sequences, adapter, false);
    let tolerance = tolerance(model);
    let logprobs = distance(&ours.logprobs, &wide(&cpu.logprobs));
    assert!(logprobs < tolerance, "{}: log-probabilities are {logprobs:e} off", model.name);
    let whole = distance(&ours.gradient, &wide(&cpu.gradient));
    assert!(whole < tolerance, "{}: the gradient is {whole:e} off", model.name);
    let tolerance = if tolerance == BF16_TOLERANCE { BF16_MATRIX_TOLERANCE } else { tolerance };
    for entry in &adapter.layout.entries {
        for matrix in [&entry.a, &entry.b] {
            let off = distance(&ours.gradient[matrix.clone()], &wide(&cpu.gradient[matrix.clone()]));
            let (target, layer) = (entry.target, entry.layer);
            assert!(off < tolerance, "{}: {target:?} of layer {layer} is {off:e} off", model.name);
        }
    }
}

#[test]
fn gradients_are_those_of_the_cpu() {
    for (model, device) in device_models() {
        assert_close(model, device, &adapter(model, 1, &ALL), &sequences());
    }
}

#[test]
fn gradients_are_right_when_some_layers_have_no_adapter() {
    for (model, device) in device_models() {
        for targets in
            [&ALL[..1], &ALL[1..3], &ALL[3..4], &ALL[4..5], &ALL[6..7], &ALL[7..], &[ALL[2], ALL[6]]]
        {
            assert_close(model, device, &adapter(model, 2, targets), &sequences()[1..2]);
        }
    }
}

#[test]
fn recomputed_activations_and_a_second_run_change_no_bit() {
    for (model, device) in device_models() {
        let adapter = adapter(model, 3, &ALL);
        let [kept, again, recomputed] =
            [false, false, true].map(|recomputes| train_on(device, &sequences(), &adapter, recomputes));
        for other in [again, recomputed] {
            assert_eq!(bits(&kept.gradient), bits(&other.gradient), "{}", model.name);
            assert_eq!(bits(&kept.logprobs), bits(&other.logprobs), "{}", model.name);
        }
    }
}

/// Runs sequences through caches, in steps of these lengths; returns all hidden states of each.
fn in_steps(
    model: &DeviceModel,
    sequences: &[Vec<u32>],
    steps: &[usize],
    caches: &mut [DeviceCache],
    adapters: &[Option<Arc<DeviceAdapter>>],
) -> Vec<Vec<f32>> {
    let width = model.config.hidden_size;
    let (mut hidden, mut done) = (vec![Vec::new(); sequences.len()], 0);
    for step in steps {
        let parts = sequences.iter().zip(&mut *caches).zip(adapters);
        let mut batch: Vec<_> = parts
            .map(|((tokens, cache), adapter)| DeviceSequence {
                tokens: &tokens[done..done + step],
                cache: Some(cache),
                adapter: adapter.clone(),
            })
            .collect();
        let rows = gpu().download(&forward(model, &mut batch, None).unwrap()).unwrap();
        for (hidden, rows) in hidden.iter_mut().zip(rows.chunks_exact(step * width)) {
            hidden.extend_from_slice(rows);
        }
        done += step;
    }
    hidden
}

fn alone(model: &DeviceModel, tokens: &[u32], adapter: &Option<Arc<DeviceAdapter>>) -> Vec<f32> {
    let mut batch = [DeviceSequence { tokens, cache: None, adapter: adapter.clone() }];
    gpu().download(&forward(model, &mut batch, None).unwrap()).unwrap()
}

/// Sequences of other adapters beside, in any steps: a row's bits are those of a training pass. cuBLAS
/// chooses by the number of rows, so on a GPU they are as near as sums in another order.
#[test]
fn decoding_in_any_steps_and_company_is_the_whole_forward() {
    let _turn = gpu().turn();
    let sequences = [tokens(11, 75), tokens(12, 75), tokens(13, 75)];
    for (model, device) in device_models() {
        let on_device =
            |seed, targets| Some(device.adapter((&adapter(model, seed, targets)).into()).unwrap());
        let adapters = [on_device(5, &ALL), None, on_device(7, &ALL[..2])];
        for steps in [&[75][..], &[31, 1, 1, 2, 40], &[32, 32, 11]] {
            let mut caches = [const { None }; 3].map(|_: Option<()>| DeviceCache::default());
            let hidden = in_steps(device, &sequences, steps, &mut caches, &adapters);
            for ((tokens, adapter), hidden) in sequences.iter().zip(&adapters).zip(hidden) {
                let whole = alone(device, tokens, adapter);
                match is_real() {
                    true => assert!(distance(&hidden, &wide(&whole)) < tolerance(model), "{}", model.name),
                    false => assert_eq!(bits(&whole), bits(&hidden), "{} in steps {steps:?}", model.name),
                }
            }
            assert!(caches.iter().all(|cache| cache.len() == 75));
        }
    }
}

#[test]
fn forks_share_the_past_and_not_the_future() {
    let _turn = gpu().turn();
    let (_, model) = &device_models()[0];
    let (past, futures) = (tokens(12, 45), [tokens(13, 30), tokens(14, 30)]);
    let mut trunk = [DeviceCache::default()];
    in_steps(model, std::slice::from_ref(&past), &[45], &mut trunk, &[None]);
    let [trunk] = trunk;
    let mut forks = [trunk.fork(), trunk];
    // In turns, so that a page shared by mistake would be overwritten.
    let mut hidden = [Vec::new(), Vec::new()];
    for step in 0..30 {
        for fork in 0..2 {
            let token = futures[fork][step..step + 1].to_vec();
            let cache = std::slice::from_mut(&mut forks[fork]);
            hidden[fork].extend(in_steps(model, &[token], &[1], cache, &[None]).remove(0));
        }
    }
    for (future, hidden) in futures.iter().zip(hidden) {
        let whole = alone(model, &[past.clone(), future.clone()].concat(), &None);
        let whole = &whole[45 * model.config.hidden_size..];
        assert!(distance(&hidden, &wide(whole)) < F32_TOLERANCE);
        if !is_real() {
            assert_eq!(bits(whole), bits(&hidden));
        }
    }
}

/// Logits, entropies and likeliest tokens against the CPU's, of rows under different adapters.
#[test]
fn the_head_answers_as_the_cpu_does() {
    let _turn = gpu().turn();
    for (model, device) in device_models() {
        let tolerance = tolerance(model);
        let adapters = [adapter(model, 3, &ALL), adapter(model, 4, &ALL[6..])];
        let on_device = adapters.each_ref().map(|a| device.adapter(a.into()).unwrap());
        let sequence = &sequences()[0];
        let hidden = alone(device, sequence, &Some(on_device[0].clone()));
        let on_gpu = gpu().upload(device.element, &hidden).unwrap();

        let rows = [(3, Some(0)), (7, Some(0)), (0, None), (44, Some(1))];
        let cpu_rows = rows.map(|(row, which)| (row, which.map(|i: usize| AdapterRows::from(&adapters[i]))));
        let device_rows = rows.map(|(row, which)| (row, which.map(|i: usize| on_device[i].clone())));
        let mut expected = Vec::new();
        let workspace = &mut Workspace::default();
        cpu_head_logits(model, &hidden, &cpu_rows, &mut expected, workspace, &Team::solo());
        let logits = gpu().download(&head_logits(device, &on_gpu, &device_rows).unwrap()).unwrap();
        let off = distance(&logits, &wide(&expected));
        assert!(off < tolerance, "{}: logits are {off:e} off", model.name);

        let (targets, _) = targets(std::slice::from_ref(sequence));
        let request = HeadRequest { targets: &targets, top_k: 3, entropy: true };
        let rows = Some(AdapterRows::from(&adapters[0]));
        let expected =
            crate::model::head_logprobs(model, rows, &hidden, request, None, workspace, &Team::solo());
        let scores = head_logprobs(device, Some(&on_device[0]), &on_gpu, request, None).unwrap();
        for (what, ours, cpu) in [
            ("log-probabilities", &scores.logprobs, &expected.logprobs),
            ("entropies", &scores.entropies, &expected.entropies),
        ] {
            let off = distance(ours, &wide(cpu));
            assert!(off < tolerance, "{}: {what} are {off:e} off", model.name);
        }
        assert_eq!(scores.alternatives.len(), targets.len());
        if !model.weights().embed.rounds_inputs() {
            let names = |of: &[Vec<(u32, f32)>]| -> Vec<Vec<u32>> {
                of.iter().map(|row| row.iter().map(|(token, _)| *token).collect()).collect()
            };
            assert_eq!(names(&scores.alternatives), names(&expected.alternatives), "{}", model.name);
        }
    }
}

/// A file's bf16 weights are held as they are under `--dtype f32`, and multiplied in f32 all the same: a GPU gives what the
/// CPU gives, to the tolerance of f32.
#[test]
fn bf16_weights_under_f32_are_multiplied_in_f32() {
    let directory = tempfile::tempdir().unwrap();
    tiny::write_bf16(directory.path(), &tiny::config(), 7).unwrap();
    for (dtype, element) in [(WeightDtype::F32, Element::F32), (WeightDtype::Bf16, Element::Bf16)] {
        let model = BaseModel::load_as(dtype, "tiny", directory.path()).unwrap();
        assert_eq!(model.weights().embed.dtype(), WeightDtype::Bf16, "held as the file has it");
        let device = {
            let _turn = gpu().turn();
            DeviceModel::new(gpu(), &model.config, model.weights()).unwrap()
        };
        assert_eq!(device.embed.element(), element);
        assert_close(&model, &device, &adapter(&model, 1, &ALL), &sequences());
    }
}

/// The formulas of memory.rs against what the emulation allocates: never less, and little more.
#[test]
fn memory_is_what_the_formula_says() {
    let dense = models().iter().filter(|model| model.config.experts.is_none());
    dense.for_each(assert_memory);
    // The logits of those are larger than a layer on its way back; of these they are not.
    let heads = ModelConfig { num_heads: 16, num_kv_heads: 8, head_dim: 32, ..tiny::config() };
    for config in [
        ModelConfig { intermediate_size: 768, ..tiny::config() },
        heads.clone(),
        ModelConfig { family: Family::Qwen3, ..heads },
    ] {
        let directory = tempfile::tempdir().unwrap();
        tiny::write(directory.path(), &config, 7).unwrap();
        for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
            assert_memory(&BaseModel::load_as(dtype, "wide", directory.path()).unwrap());
        }
    }
}

fn assert_memory(model: &BaseModel) {
    let dtype = if model.weights().embed.rounds_inputs() { WeightDtype::Bf16 } else { WeightDtype::F32 };
    for activation_checkpointing in [false, true] {
        let options = ComputeOptions { dtype, activation_checkpointing, ..ComputeOptions::default() };
        assert_memory_with(model, options);
    }
}

fn assert_memory_with(model: &BaseModel, options: ComputeOptions) {
    let what = format!("{}, {options:?}", model.name);
    // Of its own: other tests allocate on the shared one meanwhile.
    let gpu = open();
    let device = DeviceModel::new(&gpu, &model.config, model.weights()).unwrap();
    let footprint = model.config.gpu_footprint(&options);
    assert_eq!(gpu.held()[0], footprint.weights, "{what}");
    let mut cache = DeviceCache::default();
    cache.reserve(&device, 75).unwrap();
    let positions = 75usize.next_multiple_of(DeviceCache::PAGE);
    let cached = positions * DeviceCache::bytes_per_position(&model.config, options.dtype);
    assert_eq!(gpu.held()[0], footprint.weights + cached as u64, "{what}");
    drop(cache);

    let on_gpu = placed(model, device);
    let adapter = adapter(model, 3, &ALL);
    let (loss, rows) = (LossSpec::new(LossFn::CrossEntropy), 128);
    let datum =
        Datum { model_input: ModelInput::from_ints(tokens(21, rows)), loss_fn_inputs: Default::default() };
    let examples = prepare(&model.config, rows, &loss, &[datum]).unwrap();
    let mut gradient = vec![0.0; adapter.layout.len()];
    let (workspace, team) = (&mut Workspace::new(options), &Team::solo());
    run_micro_batch(&on_gpu, (&adapter).into(), &loss, &examples, Some(&mut gradient), workspace, team)
        .unwrap();

    let [now, most] = gpu.held();
    let values = adapter.layout.len() as u64;
    let version = footprint.element * values;
    // The version that was used, and the angles.
    assert_eq!(now, footprint.weights + version + footprint.workspace, "{what}");
    let said = footprint.weights
        + version
        + footprint.run(&adapter.layout.config, values, examples[0].tokens() as u64, 1).work;
    let ratio = said as f64 / most as f64;
    assert!((1.0..1.15).contains(&ratio), "{what}: {said} said, {most} allocated");
    // Without what both know exactly.
    let passes = (said - footprint.weights - version) as f64 / (most - footprint.weights - version) as f64;
    assert!((1.0..1.15).contains(&passes), "{what}: a pass takes {passes} times what was allocated");
}

#[test]
fn models_that_no_kernel_covers_are_refused_by_the_field() {
    let mixture = models().iter().find(|model| model.config.experts.is_some()).unwrap();
    let refused = |config| DeviceModel::check(&config).unwrap_err().to_string();
    assert!(refused(mixture.config.clone()).starts_with("`num_experts` is set"));
    let mut wide_heads = models()[0].config.clone();
    wide_heads.head_dim = 256;
    assert_eq!(refused(wide_heads), "`head_dim` is 256; the GPU's attention takes at most 128");
    let mut many = models()[0].config.clone();
    (many.num_heads, many.num_kv_heads) = (34, 2);
    assert!(refused(many).starts_with("`num_attention_heads` is 17 to a key head"));
}

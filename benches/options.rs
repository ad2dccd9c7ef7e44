//! What `--dtype bf16` and `--activation-checkpointing` cost and gain on a real model:
//! `cargo bench --bench options -- MODEL [--threads N] [--steps N]`, MODEL being a GGUF file or a Hugging Face
//! directory.
//!
//! The text is ARCHITECTURE.md's. Errors are of bf16 against f32, everything else being the same.

use std::{path::Path, sync::Arc, time::Instant};

use lockstep::{
    kernels::{CoreBudget, Priority, Team, WeightDtype, path},
    model::{
        Adapter, AdapterRows, BaseModel, Batch, BatchSequence, ComputeOptions, Example, GradientKind,
        LoraLayout, ModelConfig, TrainState, Workspace, forward, head_logits, prepare, run_micro_batch, tiny,
    },
    types::{AdamParams, Datum, LoraConfig, LossFn, LossSpec, ModelInput},
};

const TEXT: &str = include_str!("../ARCHITECTURE.md");

/// Sequences of the comparison, and tokens of each.
const SEQUENCES: (usize, usize) = (4, 128);

/// Optimiser steps of the loss curves, if `--steps` says no other number, and their learning rate.
const STEPS: usize = 100;
const LEARNING_RATE: f64 = 2e-4;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let mut threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut model, mut steps) = (None, STEPS);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--threads" => threads = arguments.next().and_then(|n| n.parse().ok()).expect("--threads N"),
            "--steps" => steps = arguments.next().and_then(|n| n.parse().ok()).expect("--steps N"),
            _ => model = Some(argument),
        }
    }
    let Some(model) = model else { return println!("skipped: name a model") };
    let budget = CoreBudget::new(threads);
    let lease = budget.lease(threads, Priority::Training);
    println!("kernel path {}, {} threads", path(), lease.team().width());
    compare(Path::new(&model), steps, lease.team());
    checkpoint(Path::new(&model), lease.team());
}

/// bf16 against f32: logits, gradients, and some steps of training.
fn compare(path: &Path, steps: usize, team: &Team) {
    let [whole, half] = [WeightDtype::F32, WeightDtype::Bf16].map(|dtype| {
        let begun = Instant::now();
        let model = BaseModel::load_as(dtype, "model", path).expect("a model");
        println!(
            "{dtype}: {:.1} MiB of weights, loaded in {:.1} s",
            mib(weight_bytes(&model)),
            begun.elapsed().as_secs_f64()
        );
        Pass::new(model, team)
    });
    let logits = [&whole, &half].map(Pass::logits);
    let logprobs = [&whole, &half].map(Pass::logprobs);
    let gaps: Vec<f32> = logprobs[0].iter().zip(&logprobs[1]).map(|(a, b)| (a - b).abs()).collect();
    println!("logits: {:.2e} relative (Frobenius)", distance(&logits[1], &logits[0]));
    println!(
        "log-probabilities of {} tokens: {:.4} nats apart in the mean, {:.3} at most",
        gaps.len(),
        gaps.iter().sum::<f32>() / gaps.len() as f32,
        gaps.iter().copied().fold(0.0, f32::max)
    );
    let gradients = [&whole, &half].map(|pass| pass.pass(&pass.dense_adapter(), pass.options()).1);
    println!("gradient of the adapter: {:.2e} relative (Frobenius)", distance(&gradients[1], &gradients[0]));
    let curves = [&whole, &half].map(|pass| pass.curve(steps));
    println!("loss of {steps} steps, f32: {}", curve(&curves[0]));
    println!("loss of {steps} steps, bf16: {}", curve(&curves[1]));
    let most = curves[0].iter().zip(&curves[1]).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max);
    println!("largest relative difference of the two: {most:.2e}");
}

fn curve(losses: &[f64]) -> String {
    losses.iter().map(|loss| format!("{loss:.4}")).collect::<Vec<_>>().join(" ")
}

/// Time and memory of one sequence, with activations kept and recomputed.
fn checkpoint(path: &Path, team: &Team) {
    let model = BaseModel::load("model", path).expect("a model");
    let longest = model.config.max_position_embeddings;
    let pass = Pass::new(model, team);
    for length in [1024, 4096, 8192].into_iter().filter(|length| *length <= longest) {
        pass.measure(length);
    }
    let directory = std::env::temp_dir().join(format!("lockstep-options-{}", std::process::id()));
    let config = ModelConfig { max_position_embeddings: 32_768, ..tiny::config() };
    tiny::write(&directory, &config, 7).expect("a tiny model");
    let tiny = BaseModel::load("tiny", &directory).expect("a tiny model");
    std::fs::remove_dir_all(&directory).expect("its directory");
    println!("a tiny model (two layers of width 32):");
    Pass::new(tiny, team).measure(32_768);
}

struct Pass<'a> {
    model: BaseModel,
    layout: Arc<LoraLayout>,
    team: &'a Team,
}

impl<'a> Pass<'a> {
    fn new(model: BaseModel, team: &'a Team) -> Self {
        let rank = 16.min(model.config.hidden_size as u32 / 4);
        let layout = Arc::new(LoraLayout::new(&model.config, &LoraConfig::new(rank, 1)).expect("a layout"));
        Self { model, layout, team }
    }

    fn options(&self) -> ComputeOptions {
        ComputeOptions::default()
    }

    fn tokens(&self, count: usize, length: usize) -> Vec<Vec<u32>> {
        let text = self.model.text.encode(TEXT).expect("tokens");
        let mut text = text.into_iter().cycle();
        (0..count).map(|_| text.by_ref().take(length).collect()).collect()
    }

    fn examples(&self, count: usize, length: usize) -> Vec<Example> {
        let datum =
            |tokens| Datum { model_input: ModelInput::from_ints(tokens), loss_fn_inputs: Default::default() };
        let data: Vec<Datum> = self.tokens(count, length).into_iter().map(datum).collect();
        prepare(&self.model.config, length, &LossSpec::new(LossFn::CrossEntropy), &data).expect("examples")
    }

    /// An adapter whose B is not zero.
    fn dense_adapter(&self) -> Adapter {
        let fresh = Adapter::init(self.layout.clone());
        let values = fresh.values.iter().enumerate().map(|(i, value)| value + 0.02 * noise(i));
        Adapter { layout: self.layout.clone(), values: values.collect::<Vec<_>>().into() }
    }

    fn logits(&self) -> Vec<f32> {
        let sequences = self.tokens(SEQUENCES.0, SEQUENCES.1);
        let mut batch = Batch { sequences: Vec::new() };
        for tokens in &sequences {
            batch.sequences.push(BatchSequence { tokens, kv_cache: None, adapter: None });
        }
        let (mut workspace, mut logits) = (Workspace::default(), Vec::new());
        let hidden = forward(&self.model, &mut batch, None, &mut workspace, self.team);
        let rows: Vec<_> = (0..SEQUENCES.0 * SEQUENCES.1).step_by(8).map(|row| (row, None)).collect();
        head_logits(&self.model, &hidden, &rows, &mut logits, &mut workspace, self.team);
        logits
    }

    fn logprobs(&self) -> Vec<f32> {
        let fresh = Adapter::init(self.layout.clone());
        let examples = self.examples(SEQUENCES.0, SEQUENCES.1);
        let loss = LossSpec::new(LossFn::CrossEntropy);
        let adapter = AdapterRows::from(&fresh);
        let output = run_micro_batch(
            &self.model,
            adapter,
            &loss,
            &examples,
            None,
            &mut Workspace::default(),
            self.team,
        )
        .expect("a pass");
        let of = |output: &lockstep::types::DatumOutput| match output["logprobs"].values() {
            // The last position has no target.
            lockstep::types::TensorValues::F32(values) => values[..values.len() - 1].to_vec(),
            other => panic!("log-probabilities are float32, not {other:?}"),
        };
        output.outputs.iter().flat_map(of).collect()
    }

    /// The mean loss, and the gradient of the sum.
    fn pass(&self, adapter: &Adapter, options: ComputeOptions) -> (f64, Vec<f32>, u64) {
        let examples = self.examples(SEQUENCES.0, SEQUENCES.1);
        self.run(adapter, &examples, options)
    }

    fn run(&self, adapter: &Adapter, examples: &[Example], options: ComputeOptions) -> (f64, Vec<f32>, u64) {
        let mut gradient = vec![0.0; self.layout.len()];
        let mut workspace = Workspace::new(options);
        let loss = LossSpec::new(LossFn::CrossEntropy);
        let output = run_micro_batch(
            &self.model,
            adapter.into(),
            &loss,
            examples,
            Some(&mut gradient),
            &mut workspace,
            self.team,
        )
        .expect("a pass");
        (output.loss_sum / output.active as f64, gradient, output.active)
    }

    fn curve(&self, steps: usize) -> Vec<f64> {
        let mut state = TrainState::fresh(self.layout.clone());
        let adam = AdamParams { learning_rate: LEARNING_RATE, ..AdamParams::default() };
        let mut losses = Vec::new();
        for _ in 0..steps {
            let (loss, gradient, active) = self.pass(&state.adapter(), self.options());
            losses.push(loss);
            state = state.accumulate(&gradient, active, GradientKind::TokenMean).expect("a gradient");
            state = state.optim_step(&adam).expect("a step").0;
        }
        losses
    }

    /// Time and peak memory of forward and backward over one sequence.
    fn measure(&self, length: usize) {
        let (adapter, examples) = (self.dense_adapter(), self.examples(1, length));
        let mut gradients = Vec::new();
        for activation_checkpointing in [false, true] {
            let options = ComputeOptions { activation_checkpointing, ..self.options() };
            let before = peak_restarted();
            let begun = Instant::now();
            gradients.push(self.run(&adapter, &examples, options).1);
            let seconds = begun.elapsed().as_secs_f64();
            let work = mib(peak().saturating_sub(before));
            let what = if activation_checkpointing { "recomputed" } else { "kept" };
            println!("{length:>6} tokens, activations {what:<10}: {seconds:>7.1} s, {work:>7.0} MiB at work");
        }
        assert!(gradients[0] == gradients[1], "recomputation changes no bit");
    }
}

fn weight_bytes(model: &BaseModel) -> usize {
    let options = ComputeOptions { dtype: model.weights().embed.dtype(), ..ComputeOptions::default() };
    model.config.footprint(&options).weights as usize
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (difference / square(&mut b.iter().map(|b| f64::from(*b)))).sqrt()
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Forgets the peak so far; the bytes in memory now.
fn peak_restarted() -> usize {
    std::fs::write("/proc/self/clear_refs", "5").expect("this process's own");
    peak()
}

/// Most bytes that this process had in memory since then.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("this process's own");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

/// A number in ±1 that looks random.
fn noise(i: usize) -> f32 {
    let bits = (i as u32 ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
    let bits = (bits ^ (bits >> 13)).wrapping_mul(0xc2b2_ae35);
    (bits >> 8) as f32 / (1 << 23) as f32 - 1.0
}

//! How far the log-probability that a sample reports is from what the trainer's forward gives for it.

use std::collections::BTreeMap;

use futures::{executor::block_on, future::try_join_all};
use serde::Serialize;

use super::{
    BenchError, Machine,
    local::{Local, Subject},
};
use crate::{
    client::LoraOptions,
    types::{AdamParams, Datum, LossFn, LossSpec, ModelInput, SampleFlags, SamplingParams, TensorData},
};

/// What is compared: samples of a policy that has been trained for some steps.
#[derive(Debug, Clone)]
pub struct ParityConfig {
    pub subject: Subject,
    pub batch: usize,
    pub prompt: usize,
    pub new: u32,
    pub rank: u32,
}

/// Over all sampled tokens; `gap` is sampler's less trainer's, in nats.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParityReport {
    pub bench: &'static str,
    pub dtype: String,
    pub rank: u32,
    pub tokens: usize,
    pub gap_mean: f64,
    pub gap_mean_abs: f64,
    pub gap_max_abs: f64,
    /// Tokens of which both say the same bits.
    pub equal_bits: usize,
    pub policy_version: u64,
    pub machine: Machine,
}

/// Steps before the samples: a fresh adapter is zero, and would show nothing.
const STEPS: usize = 3;

/// Large enough that the adapter matters.
const LEARNING_RATE: f64 = 1e-3;

/// Measures it.
pub fn parity(config: &ParityConfig) -> Result<ParityReport, BenchError> {
    let local = Local::start(&config.subject, 1, 1)?;
    parity_on(&local, config)
}

/// The same on a cluster that is there, and has a rank and a replica.
pub(super) fn parity_on(local: &Local, config: &ParityConfig) -> Result<ParityReport, BenchError> {
    let training = local.service.create_lora_training_client_blocking(
        &local.model,
        config.rank,
        LoraOptions::default(),
    )?;
    for step in 0..STEPS {
        let data = (0..2).map(|i| Datum {
            model_input: local.tokens((step * 2 + i) as u64, config.prompt + config.new as usize),
            loss_fn_inputs: BTreeMap::new(),
        });
        block_on(training.forward_backward(data.collect(), LossSpec::new(LossFn::CrossEntropy)))?;
        let adam = AdamParams { learning_rate: LEARNING_RATE, ..AdamParams::default() };
        block_on(training.optim_step(adam))?;
    }
    let sampling = block_on(training.save_weights_and_get_sampling_client("parity"))?;
    let prompts: Vec<Vec<u32>> =
        (0..config.batch).map(|i| local.token_ids(1000 + i as u64, config.prompt)).collect();
    let draws = prompts.iter().enumerate().map(|(i, prompt)| {
        let params = SamplingParams {
            max_tokens: Some(config.new),
            seed: Some(i as u64),
            ..SamplingParams::default()
        };
        sampling.sample(ModelInput::from_ints(prompt.clone()), 1, params, SampleFlags::default())
    });
    let samples = block_on(try_join_all(draws))?;

    let mut sampled = Vec::new();
    let mut data = Vec::new();
    for (prompt, sample) in prompts.iter().zip(&samples) {
        let sequence = &sample.sequences[0];
        sampled.extend(sequence.logprobs.clone().unwrap_or_default());
        data.push(datum(prompt, &sequence.tokens));
    }
    let computed = block_on(training.forward(data, LossSpec::new(LossFn::CrossEntropy)))?;
    let mut trained = Vec::new();
    for (output, sample) in computed.loss_fn_outputs.iter().zip(&samples) {
        let values = output.get("logprobs").map(TensorData::to_f32_vec).unwrap_or_default();
        let sequence = sample.sequences[0].tokens.len();
        trained.extend_from_slice(&values[values.len().saturating_sub(sequence)..]);
    }
    report(config, local.machine.clone(), &sampled, &trained, samples[0].policy_version)
}

/// Position i predicts token i + 1, so the sequence is cut by one at either end.
fn datum(prompt: &[u32], new: &[u32]) -> Datum {
    let sequence = [prompt, new].concat();
    let targets = sequence[1..].iter().map(|token| i64::from(*token)).collect();
    Datum {
        model_input: ModelInput::from_ints(sequence[..sequence.len() - 1].to_vec()),
        loss_fn_inputs: BTreeMap::from([("target_tokens".to_owned(), TensorData::from_i64(targets))]),
    }
}

fn report(
    config: &ParityConfig,
    machine: Machine,
    sampled: &[f32],
    trained: &[f32],
    policy_version: u64,
) -> Result<ParityReport, BenchError> {
    if sampled.is_empty() || sampled.len() != trained.len() {
        let problem = format!(
            "{} log-probabilities of samples, {} of them computed again",
            sampled.len(),
            trained.len()
        );
        return Err(BenchError::worker("the trainer", problem));
    }
    let gaps: Vec<f64> = sampled.iter().zip(trained).map(|(s, t)| f64::from(*s) - f64::from(*t)).collect();
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / gaps.len() as f64;
    Ok(ParityReport {
        bench: "parity",
        dtype: config.subject.compute.dtype.to_string(),
        rank: config.rank,
        tokens: gaps.len(),
        gap_mean: mean(&mut gaps.iter().copied()),
        gap_mean_abs: mean(&mut gaps.iter().map(|gap| gap.abs())),
        gap_max_abs: gaps.iter().fold(0.0, |most, gap| gap.abs().max(most)),
        equal_bits: sampled.iter().zip(trained).filter(|(s, t)| s.to_bits() == t.to_bits()).count(),
        policy_version,
        machine,
    })
}

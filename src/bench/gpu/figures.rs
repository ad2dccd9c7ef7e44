//! Lockstep's own figures of one model, through one cluster inside this process: one rank and one replica around one copy
//! of the weights on one GPU.

use std::{path::PathBuf, time::Instant};

use futures::executor::block_on;
use serde::{Deserialize, Serialize};

use super::percent;
use crate::{
    bench::{
        BenchError, GenerateConfig, ParityConfig, Subject, TrainConfig,
        figures::median,
        generate::generate_on,
        local::{Local, checked},
        machine::round,
        parity::parity_on,
        train::train_on,
    },
    client::LoraOptions,
    gpu::DeviceChoice,
    kernels::WeightDtype,
    model::{ComputeOptions, ModelConfig, StepCounts},
    types::{AdamParams, Datum, LossFn, LossSpec},
};

/// How much is done of each work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    pub threads: usize,
    pub repeats: u32,
    /// Of the LoRA.
    pub rank: u32,
    /// Sequences of a training batch, and their tokens.
    pub train: (u32, u32),
    /// Prompts of a prefill, and their tokens.
    pub prefill: (u32, u32),
    /// Numbers of streams that are decoded together.
    pub decode: Vec<u32>,
    /// Prompt tokens of each stream, and new ones.
    pub prompt: u32,
    pub new: u32,
}

/// What is measured of a model. It goes to a process of its own as a line of JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FiguresConfig {
    pub model: PathBuf,
    /// As `--device` and `--dtype` say them.
    pub device: String,
    pub dtype: String,
    pub plain_decoding: bool,
    pub workload: Workload,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// What computed: `cuda` and the GPU's name.
    pub engine: String,
    pub step_tokens_per_s: f64,
    pub fwdbwd_tokens_per_s: f64,
    pub prefill_tokens_per_s: f64,
    /// One for each number of streams; none where the load of the machine left it no time.
    pub decode_tokens_per_s: Vec<Option<f64>>,
    /// Percent of the steps of each that were replayed from a recording; none where there was no step.
    pub replayed_percent: Vec<Option<f64>>,
    /// From `optim_step` done to its version served.
    pub publish_s: f64,
    /// Largest difference between a sample's log-probability and the trainer's, in nats.
    pub parity_max: f64,
}

impl FiguresConfig {
    fn subject(&self) -> Result<Subject, BenchError> {
        let refused = |flag| move |problem: String| BenchError::Refused { flag, problem };
        let device: DeviceChoice = self.device.parse().map_err(refused("--device"))?;
        let dtype: WeightDtype = self.dtype.parse().map_err(refused("--dtype"))?;
        let plain_decoding = self.plain_decoding;
        let compute = ComputeOptions { device, dtype, plain_decoding, ..ComputeOptions::default() };
        Ok(Subject {
            model: self.model.clone(),
            threads: self.workload.threads,
            compute,
            repeats: self.workload.repeats,
        })
    }

    /// The model's configuration, once its files are seen to be whole.
    pub(super) fn model_config(&self) -> Result<ModelConfig, BenchError> {
        checked(&self.model).map(|(_, config)| config)
    }
}

/// Measures it.
pub fn gpu_figures(config: &FiguresConfig) -> Result<Figures, BenchError> {
    let (subject, workload) = (config.subject()?, &config.workload);
    let local = Local::start(&subject, 1, 1)?;
    let (batch, seq) = workload.train;
    let (batch, seq) = (batch as usize, seq as usize);
    let train = TrainConfig { subject: subject.clone(), batch, seq, rank: workload.rank, trainers: 1 };
    let trained = train_on(&local, &train)?;
    let drawn = |streams: u32, prompt: u32, new: u32| {
        let (batch, prompt) = (streams as usize, prompt as usize);
        generate_on(&local, &GenerateConfig { subject: subject.clone(), batch, prompt, new })
    };
    let prefill = drawn(workload.prefill.0, workload.prefill.1, 1)?.prefill_tokens_per_s;
    let (mut decode, mut replayed) = (Vec::new(), Vec::new());
    for streams in &workload.decode {
        let before = StepCounts::of_process().now();
        decode.push(drawn(*streams, workload.prompt, workload.new)?.decode_tokens_per_s);
        replayed.push(share_replayed(before, StepCounts::of_process().now()));
    }
    let publish_s = publish(&local, workload)?;
    let parity = parity_on(
        &local,
        &ParityConfig {
            subject: subject.clone(),
            batch: PARITY_STREAMS,
            prompt: workload.prompt as usize,
            new: workload.new,
            rank: workload.rank,
        },
    )?;
    Ok(Figures {
        engine: local.engine.clone(),
        step_tokens_per_s: trained.step_tokens_per_s,
        fwdbwd_tokens_per_s: trained.fwdbwd_tokens_per_s,
        prefill_tokens_per_s: prefill,
        decode_tokens_per_s: decode,
        replayed_percent: replayed,
        publish_s: round(publish_s, 4),
        parity_max: parity.gap_max_abs,
    })
}

/// Percent of the steps between that were replayed.
fn share_replayed([plain, replayed, _]: [u64; 3], [plain_then, replayed_then, _]: [u64; 3]) -> Option<f64> {
    let [plain, replayed] = [plain_then - plain, replayed_then - replayed].map(|steps| steps as f64);
    (plain + replayed > 0.0).then(|| percent(replayed, plain + replayed))
}

/// Streams whose log-probabilities are compared.
const PARITY_STREAMS: usize = 8;

/// Seconds from a step done to its version served by the replica, after one publish that is not counted.
fn publish(local: &Local, workload: &Workload) -> Result<f64, BenchError> {
    let training = local.service.create_lora_training_client_blocking(
        &local.model,
        workload.rank,
        LoraOptions::default(),
    )?;
    let mut seconds = Vec::new();
    for repeat in 0..=workload.repeats {
        let datum = Datum {
            model_input: local.tokens(u64::from(repeat), workload.prompt as usize),
            loss_fn_inputs: Default::default(),
        };
        block_on(training.forward_backward(vec![datum], LossSpec::new(LossFn::CrossEntropy)))?;
        block_on(training.optim_step(AdamParams::default()))?;
        let begun = Instant::now();
        block_on(training.save_weights_and_get_sampling_client(&format!("publish-{repeat}")))?;
        if repeat > 0 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    Ok(median(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_replayed_steps_is_of_those_in_between() {
        assert_eq!(share_replayed([7, 100, 3], [9, 106, 4]), Some(75.0));
        assert_eq!(share_replayed([7, 100, 3], [7, 100, 3]), None);
    }
}

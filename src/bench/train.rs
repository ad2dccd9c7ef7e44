//! Training speed, as `benches/peers/train.py` measures the peer's.

use futures::executor::block_on;
use serde::Serialize;

use super::{
    BenchError, Machine,
    figures::{Span, median},
    local::{Local, Subject, peak_rss_mib},
    machine::round,
};
use crate::{
    client::LoraOptions,
    types::{AdamParams, Datum, LossFn, LossSpec, OperationError},
};

/// What is trained: `batch` sequences of `seq` random tokens, every position, one rank.
#[derive(Debug, Clone)]
pub struct TrainConfig {
    pub subject: Subject,
    pub batch: usize,
    pub seq: usize,
    /// Of the LoRA, on all seven linear layers.
    pub rank: u32,
    /// Trainer ranks that share it.
    pub trainers: u32,
}

/// The line of JSON; keys as the peer's script has them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainReport {
    pub bench: &'static str,
    pub batch: usize,
    pub seq: usize,
    pub rank: u32,
    pub dtype: String,
    pub threads: usize,
    pub trainers: u32,
    /// The first step: loading and packing the model, and buffers.
    pub warmup_s: f64,
    pub fwd_s: f64,
    pub fwdbwd_s: f64,
    pub step_s: f64,
    /// Forward and loss only.
    pub fwd_tokens_per_s: f64,
    pub fwdbwd_tokens_per_s: f64,
    /// Forward, backward, clipping and Adam.
    pub step_tokens_per_s: f64,
    /// Of this process: client, coordinator, node and weights.
    pub peak_rss_mib: u64,
    pub machine: Machine,
}

/// Measures it.
pub fn train(config: &TrainConfig) -> Result<TrainReport, BenchError> {
    let local = Local::start(&config.subject, config.trainers, 0)?;
    train_on(&local, config)
}

/// The same on a cluster that is there, and has the ranks.
pub(super) fn train_on(local: &Local, config: &TrainConfig) -> Result<TrainReport, BenchError> {
    let options = LoraOptions { replicas: Some(config.trainers), ..LoraOptions::default() };
    let training = local.service.create_lora_training_client_blocking(&local.model, config.rank, options)?;
    let datum =
        |i| Datum { model_input: local.tokens(i as u64, config.seq), loss_fn_inputs: Default::default() };
    let data: Vec<Datum> = (0..config.batch).map(datum).collect();
    let loss = || LossSpec::new(LossFn::CrossEntropy);
    let forward = || block_on(training.forward(data.clone(), loss())).map(drop);
    let forward_backward = || block_on(training.forward_backward(data.clone(), loss())).map(drop);
    let step = || {
        forward_backward()?;
        block_on(training.optim_step(AdamParams { grad_clip_norm: 1.0, ..AdamParams::default() })).map(drop)
    };

    let (warmup, first) = Span::of(step);
    first?;
    let middle = |run: &dyn Fn() -> Result<(), OperationError>| -> Result<f64, BenchError> {
        let mut seconds = Vec::new();
        for _ in 0..config.subject.repeats {
            let (span, done) = Span::of(run);
            done?;
            seconds.push(span.seconds());
        }
        Ok(median(seconds))
    };
    let (fwd, fwdbwd, whole) = (middle(&forward)?, middle(&forward_backward)?, middle(&step)?);
    let per_second = |seconds| round((config.batch * config.seq) as f64 / seconds, 1);
    Ok(TrainReport {
        bench: "train",
        batch: config.batch,
        seq: config.seq,
        rank: config.rank,
        dtype: config.subject.compute.dtype.to_string(),
        threads: config.subject.threads,
        trainers: config.trainers,
        warmup_s: round(warmup.seconds(), 3),
        fwd_s: round(fwd, 4),
        fwdbwd_s: round(fwdbwd, 4),
        step_s: round(whole, 4),
        fwd_tokens_per_s: per_second(fwd),
        fwdbwd_tokens_per_s: per_second(fwdbwd),
        step_tokens_per_s: per_second(whole),
        peak_rss_mib: peak_rss_mib(),
        machine: local.machine.clone(),
    })
}

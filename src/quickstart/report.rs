use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Batch of prompts, from 1.
    pub step: u32,
    /// Version of the weights that generated the replies, read from the samples.
    pub policy_version: u64,
    /// Mean reward of the batch, of a maximum of 1.
    pub reward: f64,
    /// Sum of the loss over the batch; absent if no group gave a signal, so that no step was
    /// taken.
    pub loss: Option<f64>,
    /// Mean of `logprob_sampler − logprob_trainer` over the trained tokens (the k1 estimate of
    /// the divergence between the two, which serve the same weights); absent without a step.
    pub kl: Option<f64>,
    /// Sampled and trained tokens over the time of the whole step.
    pub tokens_per_s: f64,
    /// Tokens that were generated, and that went through the trainer, prompts included.
    pub sampled_tokens: u64,
    pub trained_tokens: u64,
    /// Groups of replies to one prompt that were not all alike.
    pub groups_with_signal: u32,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Wall time of the step.
    pub seconds: f64,
}

/// Appends one JSON object a line, flushed at once: the file can be followed.
pub struct MetricsFile(File);

impl MetricsFile {
    /// Makes `metrics.jsonl` anew.
    pub fn create(directory: &Path) -> io::Result<Self> {
        File::create(directory.join("metrics.jsonl")).map(Self)
    }

    /// Appends one step.
    pub fn write(&mut self, metrics: &StepMetrics) -> io::Result<()> {
        writeln!(self.0, "{}", serde_json::to_string(metrics)?)?;
        self.0.flush()
    }
}

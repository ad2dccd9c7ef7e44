//! The loop that a user would write.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Instant,
};

use tokenizers::Tokenizer;

use crate::{
    client::{ClientError, LoraOptions, SamplingClient, ServiceClient, TrainingClient},
    types::{
        AdamParams, CheckpointTarget, Datum, LossFn, LossSpec, ModelInput, OperationError, OperationFuture,
        SampleFlags, SampleResult, SamplingParams, StopReason, TensorData,
    },
};

use super::{
    chart::{self, ChartError},
    report::{MetricsFile, StepMetrics},
    task::{Dealer, Pair, held_out, prompt, reward},
};

/// Replies are cut here; a right one takes about ten tokens.
const MAX_TOKENS: u32 = 16;

/// Tokens of a micro-batch. A step trains some 800 tokens: at 256, two ranks both have work.
const MICRO_BATCH_TOKENS: u32 = 256;

/// Replies to each held-out prompt at temperature 1, before and after.
const HELD_OUT_SAMPLES: u32 = 2;

/// Name under which the final adapter is saved.
const FINAL: &str = "quickstart-final";

/// What the run is made of. The defaults are a recipe that was tried over several seeds:
/// learning rates from 4e-3 collapse to one fixed wrong reply.
#[derive(Debug, Clone)]
pub struct QuickstartConfig {
    pub base_model: String,
    /// Seeds adapter, order of prompts and sampling.
    pub seed: u64,
    /// Batches of prompts.
    pub steps: u32,
    pub prompts_per_step: usize,
    pub samples_per_prompt: u32,
    pub lora_rank: u32,
    /// At the first step; falls linearly to 0 over the run.
    pub learning_rate: f64,
    /// Where the results go.
    pub out: PathBuf,
}

impl QuickstartConfig {
    /// The recipe, with results in `out`.
    pub fn new(base_model: impl Into<String>, out: PathBuf) -> Self {
        Self {
            base_model: base_model.into(),
            seed: 0,
            steps: 20,
            prompts_per_step: 8,
            samples_per_prompt: 4,
            lora_rank: 16,
            learning_rate: 1e-3,
            out,
        }
    }
}

/// What happens, as it happens.
pub enum Progress<'a> {
    /// Replies of the untrained model to held-out prompts, and their mean reward.
    Before { reward: f64, replies: &'a [(Pair, String)] },
    /// One step is done.
    Step(&'a StepMetrics),
    /// Replies of the trained model to the same prompts.
    After { reward: f64, replies: &'a [(Pair, String)] },
}

/// How it ended.
#[derive(Debug, Clone)]
pub struct Summary {
    pub steps: Vec<StepMetrics>,
    /// Mean reward on held-out prompts.
    pub held_out_before: f64,
    pub held_out_after: f64,
    pub seconds: f64,
}

/// Why it could not end well.
#[derive(Debug, thiserror::Error)]
pub enum QuickstartError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Operation(#[from] OperationError),
    #[error("tokenizer: {0}")]
    Tokenizer(tokenizers::Error),
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Chart(#[from] ChartError),
    #[error("{0}")]
    Broken(String),
}

/// Trains, reports through `progress`, and leaves `metrics.jsonl`, `adapter/`, `curve.svg` and
/// `curve.png` in `config.out`.
pub async fn run(
    service: &ServiceClient,
    config: &QuickstartConfig,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Summary, QuickstartError> {
    let started = Instant::now();
    let out = &config.out;
    let file = |source| QuickstartError::File { path: out.clone(), source };
    fs::create_dir_all(out).map_err(file)?;
    let mut metrics_file = MetricsFile::create(out).map_err(file)?;

    let options = LoraOptions {
        seed: config.seed,
        micro_batch_tokens: Some(MICRO_BATCH_TOKENS),
        name: Some("quickstart".into()),
        ..LoraOptions::default()
    };
    let training = service.create_lora_training_client(&config.base_model, config.lora_rank, options).await?;
    let tokenizer = training.get_tokenizer().await?;
    let mut student =
        Student { training: &training, tokenizer: &tokenizer, config, next_seed: config.seed << 32 };

    let mut sampling = training.save_weights_and_get_sampling_client("step-0").await?;
    let (held_out_before, replies) = student.examine(&sampling).await?;
    progress(Progress::Before { reward: held_out_before, replies: &replies });

    let mut dealer = Dealer::new(config.seed);
    let mut steps: Vec<StepMetrics> = Vec::new();
    for step in 1..=config.steps {
        let (metrics, published) =
            student.step(step, &sampling, dealer.deal(config.prompts_per_step)).await?;
        sampling = published.unwrap_or(sampling);
        metrics_file.write(&metrics).map_err(file)?;
        progress(Progress::Step(&metrics));
        steps.push(metrics);
    }

    let (held_out_after, replies) = student.examine(&sampling).await?;
    progress(Progress::After { reward: held_out_after, replies: &replies });
    save_adapter(service, &training, &out.join("adapter")).await?;
    let title =
        format!("{} learns to answer a sum (LoRA rank {})", short_name(&config.base_model), config.lora_rank);
    chart::draw(&steps, &title, out)?;
    Ok(Summary { steps, held_out_before, held_out_after, seconds: started.elapsed().as_secs_f64() })
}

/// What the steps of one run share.
struct Student<'a> {
    training: &'a TrainingClient,
    tokenizer: &'a Tokenizer,
    config: &'a QuickstartConfig,
    next_seed: u64,
}

/// One reply and what it earned.
struct Reply {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    reward: f64,
}

impl Student<'_> {
    /// Samples a batch, rewards it, trains on it, publishes. No step is taken, and nothing
    /// published, when every group's rewards are all alike.
    async fn step(
        &mut self,
        step: u32,
        sampling: &SamplingClient,
        pairs: Vec<Pair>,
    ) -> Result<(StepMetrics, Option<SamplingClient>), QuickstartError> {
        let started = Instant::now();
        let mut pending = Vec::with_capacity(pairs.len());
        for pair in pairs {
            pending.push(self.ask(sampling, pair, self.config.samples_per_prompt, 1.0)?);
        }
        let mut policy_version = 0;
        let mut groups = Vec::with_capacity(pending.len());
        for question in pending {
            let (version, group) = self.collect(question).await?;
            policy_version = version;
            groups.push(group);
        }
        let replies = groups.iter().flatten();
        let sampled_tokens: u64 = replies.clone().map(|reply| reply.tokens.len() as u64).sum();
        let reward = mean(replies.map(|reply| reply.reward));
        let learning_rate =
            self.config.learning_rate * (1.0 - f64::from(step - 1) / f64::from(self.config.steps));

        let groups: Vec<_> = groups.into_iter().filter(|group| has_signal(group)).collect();
        let data: Vec<Datum> = groups.iter().flat_map(|group| datums(group)).collect();
        let trained_tokens: u64 = data.iter().map(|datum| datum.model_input.length() as u64).sum();
        let mut metrics = StepMetrics {
            step,
            policy_version,
            reward,
            loss: None,
            kl: None,
            tokens_per_s: 0.0,
            sampled_tokens,
            trained_tokens,
            groups_with_signal: groups.len() as u32,
            learning_rate,
            seconds: 0.0,
        };
        let published = match data.is_empty() {
            true => None,
            false => Some(self.learn(data, &mut metrics).await?),
        };
        metrics.seconds = started.elapsed().as_secs_f64();
        metrics.tokens_per_s = (sampled_tokens + trained_tokens) as f64 / metrics.seconds;
        Ok((metrics, published))
    }

    /// One strictly on-policy step; the three operations are submitted ahead.
    async fn learn(
        &mut self,
        data: Vec<Datum>,
        metrics: &mut StepMetrics,
    ) -> Result<SamplingClient, QuickstartError> {
        let loss = LossSpec { skip_token_normalization: true, ..LossSpec::new(LossFn::ImportanceSampling) };
        let adam =
            AdamParams { learning_rate: metrics.learning_rate, grad_clip_norm: 0.0, ..AdamParams::default() };
        let forward_backward = self.training.forward_backward(data, loss);
        let optim_step = self.training.optim_step(adam);
        let published = self.training.save_weights_and_get_sampling_client(&format!("step-{}", metrics.step));
        let output = forward_backward.await?;
        metrics.loss = Some(output.loss);
        metrics.kl = output.metrics.get("kl_k1").copied();
        optim_step.await?;
        Ok(published.await?)
    }

    /// Mean reward on the held-out prompts at temperature 1, and a greedy reply to each.
    async fn examine(
        &mut self,
        sampling: &SamplingClient,
    ) -> Result<(f64, Vec<(Pair, String)>), QuickstartError> {
        let mut questions = Vec::new();
        for pair in held_out() {
            let drawn = self.ask(sampling, pair, HELD_OUT_SAMPLES, 1.0)?;
            questions.push((drawn, self.ask(sampling, pair, 1, 0.0)?));
        }
        let (mut rewards, mut replies) = (Vec::new(), Vec::new());
        for (drawn, greedy) in questions {
            let pair = greedy.pair;
            rewards.extend(self.collect(drawn).await?.1.iter().map(|reply| reply.reward));
            for reply in self.collect(greedy).await?.1 {
                replies.push((pair, self.text(&reply.tokens)?));
            }
        }
        Ok((mean(rewards.into_iter()), replies))
    }

    fn ask(
        &mut self,
        sampling: &SamplingClient,
        pair: Pair,
        samples: u32,
        temperature: f64,
    ) -> Result<Question, QuickstartError> {
        let encoding = self.tokenizer.encode(prompt(pair), false).map_err(QuickstartError::Tokenizer)?;
        let prompt = encoding.get_ids().to_vec();
        self.next_seed += 1;
        let params = SamplingParams {
            temperature,
            max_tokens: Some(MAX_TOKENS),
            seed: Some(self.next_seed),
            ..SamplingParams::default()
        };
        let input = ModelInput::from_ints(prompt.clone());
        let result = sampling.sample(input, samples, params, SampleFlags::default());
        Ok(Question { pair, prompt, result })
    }

    /// The replies to a question, and the version of the weights that gave them.
    async fn collect(&self, question: Question) -> Result<(u64, Vec<Reply>), QuickstartError> {
        let result = question.result.await?;
        let mut replies = Vec::with_capacity(result.sequences.len());
        for sequence in result.sequences {
            let ended = sequence.stop_reason == StopReason::Stop;
            let text = self.text(&sequence.tokens)?;
            let logprobs = sequence
                .logprobs
                .ok_or_else(|| QuickstartError::Broken("a sample came without log-probabilities".into()))?;
            let reward = reward(question.pair, &text, ended);
            replies.push(Reply {
                prompt: question.prompt.clone(),
                tokens: sequence.tokens,
                logprobs,
                reward,
            });
        }
        Ok((result.policy_version, replies))
    }

    fn text(&self, tokens: &[u32]) -> Result<String, QuickstartError> {
        self.tokenizer.decode(tokens, true).map_err(QuickstartError::Tokenizer)
    }
}

/// A question that is being answered.
struct Question {
    pair: Pair,
    prompt: Vec<u32>,
    result: OperationFuture<SampleResult>,
}

/// Whether the rewards of a group differ; if not, its advantages are all 0.
fn has_signal(group: &[Reply]) -> bool {
    group.iter().any(|reply| reply.reward != group[0].reward)
}

/// One datum a reply: advantage = reward − group mean on every token of the reply, the
/// stopping one included, and 0 on the prompt.
fn datums(group: &[Reply]) -> Vec<Datum> {
    let baseline = mean(group.iter().map(|reply| reply.reward));
    group.iter().map(|reply| datum(reply, (reply.reward - baseline) as f32)).collect()
}

/// Position i predicts token i + 1, so the sequence is cut by one at either end.
fn datum(reply: &Reply, advantage: f32) -> Datum {
    let sequence: Vec<u32> = reply.prompt.iter().chain(&reply.tokens).copied().collect();
    let on_prompt = vec![0.0; reply.prompt.len() - 1];
    let over = |values: &mut dyn Iterator<Item = f32>| {
        TensorData::from_f32(on_prompt.iter().copied().chain(values).collect())
    };
    let inputs = BTreeMap::from([
        (
            "target_tokens".to_owned(),
            TensorData::from_i64(sequence[1..].iter().map(|&token| i64::from(token)).collect()),
        ),
        ("logprobs".to_owned(), over(&mut reply.logprobs.iter().copied())),
        ("advantages".to_owned(), over(&mut reply.tokens.iter().map(|_| advantage))),
    ]);
    Datum {
        model_input: ModelInput::from_ints(sequence[..sequence.len() - 1].to_vec()),
        loss_fn_inputs: inputs,
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    sum / count.max(1) as f64
}

/// Saves the adapter once more and downloads it as a PEFT directory.
async fn save_adapter(
    service: &ServiceClient,
    training: &TrainingClient,
    directory: &Path,
) -> Result<(), QuickstartError> {
    let path = training.save_weights_for_sampler(FINAL).await?.path;
    let saved = service.list_checkpoints(Some(training.run())).await?;
    let checkpoint = saved
        .into_iter()
        .find(|checkpoint| checkpoint.path == path && checkpoint.target == CheckpointTarget::Sampler)
        .ok_or_else(|| QuickstartError::Broken(format!("{path} was saved but is not listed")))?;
    Ok(service.download_checkpoint(checkpoint.id, directory).await?)
}

fn short_name(model: &str) -> &str {
    model.rsplit('/').next().unwrap_or(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advantages_stand_on_the_reply_alone_and_include_its_stop_token() {
        let reply = |reward| Reply {
            prompt: vec![10, 11, 12],
            tokens: vec![20, 2],
            logprobs: vec![-0.5, -0.25],
            reward,
        };
        let group = [reply(1.0), reply(0.0)];
        assert!(has_signal(&group) && !has_signal(&group[..1]));
        let data = datums(&group);
        assert_eq!(data[0].model_input, ModelInput::from_ints(vec![10, 11, 12, 20]));
        let input = |name: &str| data[0].loss_fn_inputs[name].clone();
        assert_eq!(input("target_tokens"), TensorData::from_i64(vec![11, 12, 20, 2]));
        assert_eq!(input("logprobs"), TensorData::from_f32(vec![0.0, 0.0, -0.5, -0.25]));
        assert_eq!(input("advantages"), TensorData::from_f32(vec![0.0, 0.0, 0.5, 0.5]));
        assert_eq!(data[1].loss_fn_inputs["advantages"], TensorData::from_f32(vec![0.0, 0.0, -0.5, -0.5]));
    }
}

//! One request on the compute thread: its prompt's cache, its sequences, and what they drew.
//!
//! The prompt is computed once, all but its last token; each sequence begins as a fork of that
//! cache whose first input is the last prompt token. So rows of the prompt are needed for nothing
//! but its own log-probabilities (row `i` predicts prompt token `i + 1`), and every sequence, of
//! the first wave or of a later one, draws its first token like any other.

use std::sync::Arc;

use crate::{
    model::{
        Adapter, AdapterRows, BaseModel, Decoding, DrawKey, Drawn, MIN_LOGPROB, SequenceCache, SequenceRows,
    },
    types::{PolicyId, SampleFlags, SampleResult, SampledSequence, StopReason},
};

use super::{
    error::SamplerError,
    state::Admission,
    stop::{StopRules, StopScan},
};

/// The weights that a request was admitted with; they stay in memory for it.
#[derive(Clone)]
pub struct Serving {
    pub model: Arc<BaseModel>,
    /// Absent: the base model.
    pub adapter: Option<Held>,
}

/// A verified adapter, under the identity that it was verified against.
#[derive(Clone)]
pub struct Held {
    pub policy: PolicyId,
    pub adapter: Arc<Adapter>,
}

/// A request that has been admitted.
pub struct Job {
    pub serving: Serving,
    pub flags: SampleFlags,
    pub decoding: Decoding,
    prompt: Vec<u32>,
    /// Of the prompt without its last token; gone once the last sequence has begun.
    prompt_cache: Option<SequenceCache>,
    prompt_scores: PromptScores,
    /// Prompt rows computed.
    computed: usize,
    seed: u64,
    new_tokens: usize,
    rules: StopRules,
    samples: Vec<Sample>,
}

/// Of each computed prompt row, about the token after it.
#[derive(Default)]
struct PromptScores {
    logprobs: Vec<f32>,
    alternatives: Vec<Vec<(u32, f32)>>,
}

enum Sample {
    Waiting,
    Running(Running),
    Ended(SampledSequence),
}

struct Running {
    cache: SequenceCache,
    /// Input of the next step.
    next: u32,
    scan: StopScan,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
}

impl Job {
    /// Nothing computed yet.
    pub fn new(admission: Admission, serving: Serving) -> Self {
        let Admission { generate, new_tokens, .. } = admission;
        let config = &serving.model.config;
        Self {
            flags: generate.flags,
            decoding: Decoding::new(&generate.params),
            rules: StopRules::new(&config.eos_token_ids, generate.params.stop.as_ref()),
            prompt_cache: Some(SequenceCache::new(&serving.model)),
            prompt_scores: PromptScores::default(),
            computed: 0,
            seed: generate.seed,
            new_tokens,
            samples: (0..generate.num_samples).map(|_| Sample::Waiting).collect(),
            prompt: generate.prompt,
            serving,
        }
    }

    /// Adds the next `rows` of the prompt and one row of each of `sequences` to a batch, in this
    /// order. `sequences` ascend.
    pub fn push_rows<'a>(&'a mut self, rows: usize, sequences: &[u32], batch: &mut Vec<SequenceRows<'a>>) {
        self.begin(sequences);
        let adapter = self.serving.adapter.as_ref().map(|held| AdapterRows::from(&*held.adapter));
        if rows > 0 {
            let tokens = &self.prompt[self.computed..][..rows];
            // The last sequence takes it only when the whole prompt is computed.
            let cache = self.prompt_cache.as_mut().expect("a prompt that is computed has its cache");
            batch.push(SequenceRows { tokens, cache, adapter });
        }
        for (index, sample) in self.samples.iter_mut().enumerate() {
            if let Sample::Running(running) = sample
                && sequences.binary_search(&(index as u32)).is_ok()
            {
                let tokens = std::slice::from_ref(&running.next);
                batch.push(SequenceRows { tokens, cache: &mut running.cache, adapter });
            }
        }
    }

    fn begin(&mut self, sequences: &[u32]) {
        for &sequence in sequences {
            if !matches!(self.samples[sequence as usize], Sample::Waiting) {
                continue;
            }
            // Sequences begin in order, so the last one may take what the others forked.
            let last = sequence as usize + 1 == self.samples.len();
            let cache = if last {
                self.prompt_cache.take()
            } else {
                self.prompt_cache.as_ref().map(SequenceCache::fork)
            };
            self.samples[sequence as usize] = Sample::Running(Running {
                // The prompt's cache is there until the last sequence takes it.
                cache: cache.unwrap_or_else(|| SequenceCache::new(&self.serving.model)),
                next: self.prompt[self.prompt.len() - 1],
                scan: StopScan::default(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
            });
        }
    }

    /// The adapter that computes its rows; absent: the base model.
    pub fn adapter_rows(&self) -> Option<AdapterRows<'_>> {
        self.serving.adapter.as_ref().map(|held| AdapterRows::from(&*held.adapter))
    }

    /// Whether the prompt's rows are wanted for their log-probabilities.
    pub fn scores_prompt(&self) -> bool {
        self.flags.prompt_logprobs || self.flags.topk_prompt_logprobs > 0
    }

    /// The tokens that the next `rows` prompt rows predict.
    pub fn predicted(&self, rows: usize) -> &[u32] {
        &self.prompt[self.computed + 1..][..rows]
    }

    /// Takes the scores of the next prompt rows.
    pub fn push_scores(
        &mut self,
        logprobs: &[f32],
        alternatives: Vec<Vec<(u32, f32)>>,
    ) -> Result<(), SamplerError> {
        if let Some(at) = logprobs.iter().position(|logprob| logprob.is_nan()) {
            return Err(SamplerError::PromptNotFinite { position: self.computed + at });
        }
        let scores = &mut self.prompt_scores;
        scores.logprobs.extend(logprobs.iter().map(|&logprob| logprob.max(MIN_LOGPROB)));
        let finite = |(token, logprob): (u32, f32)| (token, logprob.max(MIN_LOGPROB));
        scores.alternatives.extend(alternatives.into_iter().map(|row| row.into_iter().map(finite).collect()));
        Ok(())
    }

    /// These rows of the prompt have been computed.
    pub fn prompt_computed(&mut self, rows: usize) {
        self.computed += rows;
    }

    /// What decides the next draw of a running sequence.
    pub fn draw_key(&self, sequence: u32) -> DrawKey {
        let position = match &self.samples[sequence as usize] {
            Sample::Running(running) => running.tokens.len() as u64,
            Sample::Waiting | Sample::Ended(_) => 0,
        };
        DrawKey { seed: self.seed, sequence, position }
    }

    /// Appends a token to a running sequence; says whether it has ended with it.
    pub fn push(&mut self, sequence: u32, drawn: Drawn) -> bool {
        let sample = &mut self.samples[sequence as usize];
        let Sample::Running(running) = sample else { return false };
        let Drawn { token, logprob } = drawn;
        running.next = token;
        running.tokens.push(token);
        running.logprobs.push(logprob);
        let text = &self.serving.model.text;
        let stops = self.rules.ends_with(&mut running.scan, token, || text.token_bytes(token));
        let stop_reason = match (stops, running.tokens.len() >= self.new_tokens) {
            (true, _) => StopReason::Stop,
            (false, true) => StopReason::Length,
            (false, false) => return false,
        };
        let (tokens, logprobs) = (std::mem::take(&mut running.tokens), std::mem::take(&mut running.logprobs));
        *sample = Sample::Ended(SampledSequence { tokens, logprobs: Some(logprobs), stop_reason });
        true
    }

    /// Whether its last sequence has ended.
    pub fn is_over(&self) -> bool {
        self.samples.iter().all(|sample| matches!(sample, Sample::Ended(_)))
    }

    /// The answer, once it [is over](Self::is_over).
    pub fn into_result(self) -> SampleResult {
        let ended = |sample| match sample {
            Sample::Ended(sequence) => Some(sequence),
            Sample::Waiting | Sample::Running(_) => None,
        };
        let PromptScores { logprobs, alternatives } = self.prompt_scores;
        let SampleFlags { prompt_logprobs, topk_prompt_logprobs } = self.flags;
        SampleResult {
            sequences: self.samples.into_iter().filter_map(ended).collect(),
            policy_version: self.serving.adapter.map_or(0, |held| held.policy.step),
            prompt_logprobs: prompt_logprobs.then(|| after_first(logprobs)),
            topk_prompt_logprobs: (topk_prompt_logprobs > 0).then(|| after_first(alternatives)),
        }
    }
}

/// The first token of a prompt has no score: nothing is before it.
fn after_first<T>(scores: Vec<T>) -> Vec<Option<T>> {
    std::iter::once(None).chain(scores.into_iter().map(Some)).collect()
}

use serde::{Deserialize, Serialize};

/// Where generation stops, beside the model's own end-of-sequence token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// Stops after the token that completes this text.
    Text(String),
    /// Stops after the first of these texts.
    Texts(Vec<String>),
    /// Stops after the first of these token ids, which is kept.
    Tokens(Vec<u32>),
}

/// How tokens are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token (the lowest id on a tie).
    pub temperature: f64,
    /// Smallest set of tokens whose probabilities reach this sum; in (0, 1].
    pub top_p: f64,
    /// Only the k most likely tokens; -1 (or absent) is off.
    pub top_k: i64,
    /// Most tokens to generate; absent: to the end of the context.
    pub max_tokens: Option<u32>,
    /// Same seed, request and weights give the same tokens; absent: a fresh one is drawn.
    pub seed: Option<u64>,
    /// Extra stop conditions.
    pub stop: Option<Stop>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: -1, max_tokens: None, seed: None, stop: None }
    }
}

/// What a sample request wants reported beside the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SampleFlags {
    /// Report each prompt token's log-probability.
    pub prompt_logprobs: bool,
    /// Report this many most likely tokens at each prompt position; 0 to 20.
    pub topk_prompt_logprobs: u32,
}

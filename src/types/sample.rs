use serde::{Deserialize, Serialize};

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// An end-of-sequence or stop token, or a stop text.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

/// One generated sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampledSequence {
    /// Generated token ids, the stopping token included.
    pub tokens: Vec<u32>,
    /// Natural-log probability of each token under the unmodified distribution (before
    /// temperature, top-k and top-p): what the trainer's forward gives for it.
    pub logprobs: Option<Vec<f32>>,
    /// Why it ended.
    pub stop_reason: StopReason,
}

/// The most likely tokens of one position, descending: (token, log-probability).
pub type TopkLogprobs = Vec<(u32, f32)>;

/// What one `sample` call returns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleResult {
    /// `num_samples` sequences.
    pub sequences: Vec<SampledSequence>,
    /// The version whose weights generated them, read from the slot that served; 0 is the
    /// base model or a fresh adapter.
    pub policy_version: u64,
    /// Per prompt token; the first has none. Present when asked for.
    pub prompt_logprobs: Option<Vec<Option<f32>>>,
    /// Per prompt position the k most likely tokens; the first has none. Present when asked for.
    pub topk_prompt_logprobs: Option<Vec<Option<TopkLogprobs>>>,
}

/// The name the HTTP clients know [`SampleResult`] by.
pub type SampleResponse = SampleResult;

use std::sync::Arc;

use tokenizers::Tokenizer;

use crate::{
    protocol::{ClientRequest, ClientResponse, SampleRequest, SampleTarget},
    types::{ModelInput, OperationFuture, PolicyId, SampleFlags, SampleResult, SamplingParams},
};

use super::{
    ClientError,
    service::{Shared, tokenizer, unexpected},
};

/// Samples from one set of weights: a base model, a checkpoint or a published policy.
#[derive(Clone)]
pub struct SamplingClient {
    shared: Arc<Shared>,
    base_model: String,
    target: SampleTarget,
    policy: Option<PolicyId>,
}

impl SamplingClient {
    pub(super) fn new(
        shared: Arc<Shared>,
        base_model: String,
        target: SampleTarget,
        policy: Option<PolicyId>,
    ) -> Self {
        Self { shared, base_model, target, policy }
    }

    /// The base model.
    pub fn base_model(&self) -> &str {
        &self.base_model
    }

    /// The published weights it is pinned to; none for a base model or a checkpoint's path.
    pub fn policy(&self) -> Option<PolicyId> {
        self.policy
    }

    /// The policy version it is pinned to.
    pub fn policy_version(&self) -> Option<u64> {
        self.policy.map(|policy| policy.step)
    }

    /// Draws `num_samples` sequences that continue `prompt`.
    ///
    /// Many calls may be in flight at once; replicas decode them together. Refused: an empty
    /// prompt, token ids outside the vocabulary, a prompt that fills the context,
    /// `num_samples` 0, parameters out of range.
    pub fn sample(
        &self,
        prompt: ModelInput,
        num_samples: u32,
        params: SamplingParams,
        flags: SampleFlags,
    ) -> OperationFuture<SampleResult> {
        let (completer, future) = OperationFuture::pair();
        let link = self.shared.link.clone();
        let request = SampleRequest { target: self.target.clone(), prompt, num_samples, params, flags };
        self.shared.runtime.spawn(async move {
            let outcome = match link.request(ClientRequest::Sample(request)).await {
                Ok(ClientResponse::Sample { result, .. }) => Ok(result),
                Ok(other) => Err(unexpected(&other).into()),
                Err(error) => Err(error.into()),
            };
            completer.complete(outcome);
        });
        future
    }

    /// The log-probability of each token of `prompt` given those before it; the first has none.
    pub fn compute_logprobs(&self, prompt: ModelInput) -> OperationFuture<Vec<Option<f32>>> {
        let params = SamplingParams { max_tokens: Some(1), temperature: 0.0, ..SamplingParams::default() };
        let flags = SampleFlags { prompt_logprobs: true, topk_prompt_logprobs: 0 };
        let sampled = self.sample(prompt, 1, params, flags);
        let (completer, future) = OperationFuture::pair();
        self.shared.runtime.spawn(async move {
            completer.complete(sampled.await.map(|result| result.prompt_logprobs.unwrap_or_default()));
        });
        future
    }

    /// The base model's tokenizer.
    pub async fn get_tokenizer(&self) -> Result<Tokenizer, ClientError> {
        tokenizer(&self.shared, &self.base_model).await
    }
}

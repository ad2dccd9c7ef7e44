//! `POST {sampler}/sample`: which weights answer a request, and how it is drawn.
//!
//! | headers | served |
//! | --- | --- |
//! | none, a base model's sampler | the base model |
//! | `X-Checkpoint-Path`, or a checkpoint's sampler | that checkpoint |
//! | `X-Min-Policy-Version` | the run's live policy, once its version is that high |
//! | both | the live policy if it is that high, else the checkpoint |
//! | none, a run's sampler | what was published at version 0, else the base model |

use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    protocol::{SampleRequest, SampleTarget},
    types::{Digest, InvalidInput, ModelInput, ModelInputChunk, SampleFlags, SamplingParams, Stop},
};

use super::{
    super::{body, caller::Caller, refusal::Refused},
    completion::Completion,
    ids::SamplerId,
    local,
    mount::{self, IDEMPOTENCY_KEY, Sampler, header},
};

type Answer = Result<HttpResponse, Refused>;

const CHECKPOINT_PATH: &str = "X-Checkpoint-Path";
const MIN_POLICY_VERSION: &str = "X-Min-Policy-Version";

/// The version of the weights that answered.
const POLICY_VERSION: &str = "x-trainers-policy-version";

/// Absent fields have the defaults of OpenAI-like completion servers.
#[derive(Deserialize)]
struct Body {
    prompt: Option<Vec<u32>>,
    model_input_chunks: Option<Vec<ModelInputChunk>>,
    n: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    max_tokens: Option<u32>,
    seed: Option<u64>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<u32>,
    structured_outputs: Option<Value>,
    /// Of a bare sampler alone: which base model.
    model: Option<String>,
}

/// What of a request decides its answer, apart from the weights.
struct Draw {
    prompt: ModelInput,
    num_samples: u32,
    params: SamplingParams,
    flags: SampleFlags,
}

/// `POST {sampler}/sample`
pub async fn sample(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let sampler = mount::sampler(&caller, &request).await?;
    let body = caller.read(&request, payload, body::DATA).await?;
    let (digest, wanted) = (Digest::of(&body.bytes), body.json::<Body>()?);
    drop(body);
    let sampler = match sampler {
        Sampler::Of(id) => id,
        Sampler::Bare => SamplerId::Base(local::base_model(&caller, wanted.model.as_deref()).await?),
    };
    let target = target(&sampler, &request)?;
    let draw = wanted.read()?;
    let waits_for_version = matches!(target, SampleTarget::Live { min_version: 1.., .. });
    let upstream = caller.upstream.clone();
    let generate = async move {
        let Draw { prompt, num_samples, params, flags } = draw;
        let tokens = prompt.to_ints()?;
        let sample = SampleRequest { target, prompt, num_samples, params, flags };
        let (result, _) = upstream.sample(sample).await?;
        body::off_thread(move || Completion::of(&tokens, result)).await
    };
    let answered = match header(&request, IDEMPOTENCY_KEY)? {
        Some(key) => caller.replays.join(replay_key(&caller, &sampler, key), digest, generate).await,
        None => generate.await.map(Into::into),
    };
    let completion = answered.map_err(|refused| as_this_route_says(refused, waits_for_version))?;
    Ok(HttpResponse::Ok()
        .insert_header((POLICY_VERSION, completion.policy_version.to_string()))
        .content_type("application/json")
        .body(completion.json.clone()))
}

/// Keys of one caller and one sampler are of no other.
fn replay_key(caller: &Caller, sampler: &SamplerId, key: &str) -> String {
    format!("{} {sampler} {key}", caller.name.as_deref().unwrap_or_default())
}

/// What the client retries here, and what it may not.
fn as_this_route_says(refused: Refused, waits_for_version: bool) -> Refused {
    match refused.status() {
        StatusCode::GATEWAY_TIMEOUT if waits_for_version => refused.with_status(StatusCode::REQUEST_TIMEOUT),
        _ => refused.of_a_body().busy_as_not_yet(),
    }
}

/// The weights that a request asks for; see the table above.
fn target(sampler: &SamplerId, request: &HttpRequest) -> Result<SampleTarget, Refused> {
    let path = header(request, CHECKPOINT_PATH)?.map(str::to_owned);
    let floor = header(request, MIN_POLICY_VERSION)?.map(|floor| {
        let problem = || format!("must be a whole number of at least 0, got {floor:?}");
        floor.parse::<u64>().map_err(|_| InvalidInput::new(MIN_POLICY_VERSION, problem()))
    });
    let floor = floor.transpose()?;
    Ok(match (sampler, path, floor) {
        (SamplerId::Paired(run), None, None) => SampleTarget::Initial { run: *run },
        (SamplerId::Paired(run), None, Some(min_version)) => SampleTarget::Live { run: *run, min_version },
        (SamplerId::Paired(run), Some(path), Some(min_version)) => {
            SampleTarget::LiveOrCheckpoint { run: *run, min_version, path }
        }
        (_, Some(path), None) => SampleTarget::Checkpoint { path },
        (SamplerId::Base(model), None, None) => SampleTarget::Base { base_model: model.clone() },
        (SamplerId::Checkpoint(path), None, None) => SampleTarget::Checkpoint { path: path.clone() },
        (SamplerId::Base(_) | SamplerId::Checkpoint(_), _, Some(_)) => {
            let problem = "is for the sampler of a run; this one follows none";
            return Err(InvalidInput::new(MIN_POLICY_VERSION, problem).into());
        }
    })
}

impl Body {
    fn read(self) -> Result<Draw, Refused> {
        if self.structured_outputs.is_some_and(|wanted| !wanted.is_null()) {
            return Err(InvalidInput::new("structured_outputs", "is not supported").into());
        }
        let prompt = match self.model_input_chunks {
            Some(chunks) if !chunks.is_empty() => ModelInput { chunks },
            _ => ModelInput::from_ints(self.prompt.unwrap_or_default()),
        };
        let stop = match (self.stop, self.stop_token_ids) {
            (stop, None) => stop,
            (None, Some(tokens)) => Some(Stop::Tokens(tokens)),
            (Some(Stop::Texts(texts)), Some(tokens)) if texts.is_empty() => Some(Stop::Tokens(tokens)),
            (stop, Some(tokens)) if tokens.is_empty() => stop,
            (Some(_), Some(_)) => {
                let problem = "and `stop` can't be used together; give one of them";
                return Err(InvalidInput::new("stop_token_ids", problem).into());
            }
        };
        let defaults = SamplingParams::default();
        let params = SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            max_tokens: self.max_tokens,
            seed: self.seed,
            stop,
        };
        let flags = SampleFlags {
            prompt_logprobs: self.prompt_logprobs.is_some(),
            topk_prompt_logprobs: self.prompt_logprobs.unwrap_or(0),
        };
        Ok(Draw { prompt, num_samples: self.n.unwrap_or(1), params, flags })
    }
}

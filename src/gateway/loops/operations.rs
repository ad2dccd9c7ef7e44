//! A run's operations: submitted with an idempotency key, polled for their outcome.
//!
//! ```text
//!   POST {trainer}/<op>             202 {"operation_id": …}   once it is durable
//!   GET  {trainer}/operations/{id}  200 done or error │ 408 not yet, after 30 s │ 404 unknown
//! ```
//!
//! Operations execute in the order in which they are accepted; the client's own numbering
//! (`seq_id`) has gaps and starts again, so it is not read.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use actix_web::{HttpRequest, HttpResponse, http::header, web};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    protocol::{
        MAX_INLINE_PAYLOAD, Operation, OperationStatus, Payload, RunInfo, SubmitOperation, encode_compressed,
    },
    types::{
        AdamParams, DataLimits, Datum, InvalidInput, LoraConfig, LossFn, LossSpec, ModelInput, NoDropout,
        TensorData,
    },
};

use super::{
    super::{body, caller::Caller, refusal::Refused},
    ids::OperationId,
    local,
    mount::{self, Trainer},
    results,
};

type Answer = Result<HttpResponse, Refused>;

/// How long a poll is held; the client's read timeout is 35 s.
const POLL_HOLD: Duration = Duration::from_secs(30);

/// How long a submit is held while the coordinator is away or the run's queue is full. The
/// client then sends it again, with the same key.
const SUBMIT_HOLD: Duration = Duration::from_secs(120);

/// Pause before a submit that met a full queue is tried again.
const QUEUE_PAUSE: Duration = Duration::from_millis(250);

/// Setting of every loss that decides how gradients are counted, beside the loss's own.
const SKIP_TOKEN_NORMALIZATION: &str = "skip_token_normalization";

#[derive(Deserialize)]
struct Init {
    run_id: Option<String>,
    lora_rank: u32,
    base_model: Option<String>,
    /// As where a run is made.
    #[serde(default, rename = "lora_dropout", alias = "dropout")]
    _lora_dropout: NoDropout,
}

/// `POST {trainer}/init_trainer_server`: a fresh adapter.
pub async fn init_trainer_server(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let init: Init = caller.read(&request, payload, body::SMALL).await?.json()?;
    let base_model = init.base_model.as_deref();
    let run = match mount::trainer(&request, init.run_id.as_deref())? {
        Trainer::Of(run) => caller.upstream.run(run, SUBMIT_HOLD).await?,
        Trainer::Bare(name) => {
            local::find_or_create(&caller, &name, base_model, init.lora_rank, SUBMIT_HOLD).await?
        }
    };
    if let Some(asked) = base_model.filter(|asked| *asked != run.base_model) {
        let problem = format!("{} trains {:?}, not {asked:?}; create a run for it", run.run, run.base_model);
        return Err(InvalidInput::new("base_model", problem).into());
    }
    let lora = LoraConfig { rank: init.lora_rank, ..run.lora.clone() };
    submit(&caller, &request, &run, Operation::Init { lora }).await
}

#[derive(Deserialize)]
struct Pass {
    run_id: Option<String>,
    data: Vec<WireDatum>,
    loss_fn: Option<String>,
    loss_fn_config: Option<Map<String, Value>>,
    top_k_logprobs: Option<u32>,
}

#[derive(Deserialize)]
struct WireDatum {
    model_input: ModelInput,
    loss_fn_inputs: Option<BTreeMap<String, TensorData>>,
    routed_experts_ref: Option<Value>,
}

/// `POST {trainer}/forward`
pub async fn forward(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    pass(caller, request, payload, |loss, data| Operation::Forward { loss, data }).await
}

/// `POST {trainer}/forward_backward`
pub async fn forward_backward(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    pass(caller, request, payload, |loss, data| Operation::ForwardBackward { loss, data }).await
}

async fn pass(
    caller: Caller,
    request: HttpRequest,
    payload: web::Payload,
    operation: fn(LossSpec, Payload) -> Operation,
) -> Answer {
    let body = caller.read(&request, payload, body::DATA).await?;
    let (body, run_id, loss, data) = body::off_thread(move || {
        let Pass { run_id, data, loss_fn, loss_fn_config, top_k_logprobs } = body.json()?;
        let loss = loss_spec(loss_fn.as_deref(), loss_fn_config, top_k_logprobs)?;
        let data = data.into_iter().enumerate().map(|(i, datum)| datum.read(i));
        let data: Vec<Datum> = data.collect::<Result<_, _>>()?;
        Ok((body, run_id, loss, data))
    })
    .await?;
    let run = addressed(&caller, &request, run_id.as_deref()).await?;
    let limits = limits(&run);
    let (loss, packed) = body::off_thread(move || {
        if let Some(limits) = limits {
            loss.check_data(limits, &data)?;
        }
        // The body's room is for what was made of it as well.
        drop(body);
        Ok((loss, encode_compressed(&data)))
    })
    .await?;
    let data = match packed.len() {
        0..=MAX_INLINE_PAYLOAD => Payload::Inline(packed),
        // A full disk, say: it will pass, and the client sends it again.
        _ => Payload::Blob(caller.upstream.put_blob(packed).await.map_err(Refused::busy_as_not_yet)?),
    };
    submit(&caller, &request, &run, operation(loss, data)).await
}

/// What a run's data are held to; the ranks hold them to it as well, but only when the operation's
/// turn has come.
fn limits(run: &RunInfo) -> Option<DataLimits> {
    let vocab_size = run.vocab_size? as usize;
    Some(DataLimits { vocab_size, max_seq_len: run.max_seq_len as usize })
}

impl WireDatum {
    fn read(self, index: usize) -> Result<Datum, InvalidInput> {
        if self.routed_experts_ref.is_some_and(|routed| !routed.is_null()) {
            let field = format!("data[{index}].routed_experts_ref");
            return Err(InvalidInput::new(field, "is not supported: no model here routes to experts"));
        }
        Ok(Datum { model_input: self.model_input, loss_fn_inputs: self.loss_fn_inputs.unwrap_or_default() })
    }
}

/// A loss and its settings, each of them known and in range.
fn loss_spec(
    loss_fn: Option<&str>,
    config: Option<Map<String, Value>>,
    top_k_logprobs: Option<u32>,
) -> Result<LossSpec, InvalidInput> {
    let mut loss = LossSpec::new(loss_fn.map_or(Ok(LossFn::CrossEntropy), str::parse)?);
    loss.top_k_logprobs = top_k_logprobs.unwrap_or(0);
    for (name, value) in config.unwrap_or_default() {
        let field = || format!("loss_fn_config.{name}");
        if name == SKIP_TOKEN_NORMALIZATION {
            loss.skip_token_normalization = match (value.as_bool(), value.as_f64()) {
                (Some(skip), _) => skip,
                (_, Some(skip)) if skip == 0.0 || skip == 1.0 => skip == 1.0,
                _ => return Err(InvalidInput::new(field(), format!("must be true or false, got {value}"))),
            };
            continue;
        }
        let number = value.as_f64();
        let number =
            number.ok_or_else(|| InvalidInput::new(field(), format!("must be a number, got {value}")))?;
        loss.config.insert(name, number);
    }
    loss.validate()?;
    Ok(loss)
}

#[derive(Deserialize)]
struct Step {
    run_id: Option<String>,
    #[serde(default)]
    adam_params: AdamParams,
}

/// `POST {trainer}/optim_step`
pub async fn optim_step(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let step: Step = caller.read(&request, payload, body::SMALL).await?.json()?;
    let run = addressed(&caller, &request, step.run_id.as_deref()).await?;
    submit(&caller, &request, &run, Operation::OptimStep { adam: step.adam_params }).await
}

#[derive(Deserialize)]
struct Save {
    run_id: Option<String>,
    name: String,
    ttl_seconds: Option<u64>,
    #[serde(default = "yes")]
    bump_version: bool,
}

fn yes() -> bool {
    true
}

/// `POST {trainer}/save_state`
pub async fn save_state(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let save: Save = caller.read(&request, payload, body::SMALL).await?.json()?;
    let run = addressed(&caller, &request, save.run_id.as_deref()).await?;
    submit(&caller, &request, &run, Operation::SaveState { name: save.name, ttl_seconds: save.ttl_seconds })
        .await
}

/// `POST {trainer}/save_weights_for_sampler`
pub async fn save_weights_for_sampler(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let save: Save = caller.read(&request, payload, body::SMALL).await?.json()?;
    let run = addressed(&caller, &request, save.run_id.as_deref()).await?;
    let operation = Operation::SaveWeightsForSampler {
        name: save.name,
        publish: save.bump_version,
        ttl_seconds: save.ttl_seconds,
    };
    submit(&caller, &request, &run, operation).await
}

#[derive(Deserialize)]
struct Load {
    run_id: Option<String>,
    path: String,
}

/// `POST {trainer}/load_state`
pub async fn load_state(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    load(caller, request, payload, false).await
}

/// `POST {trainer}/load_state_with_optimizer`
pub async fn load_state_with_optimizer(
    caller: Caller,
    request: HttpRequest,
    payload: web::Payload,
) -> Answer {
    load(caller, request, payload, true).await
}

async fn load(caller: Caller, request: HttpRequest, payload: web::Payload, with_optimizer: bool) -> Answer {
    let Load { run_id, path } = caller.read(&request, payload, body::SMALL).await?.json()?;
    let run = addressed(&caller, &request, run_id.as_deref()).await?;
    submit(&caller, &request, &run, Operation::LoadState { path, with_optimizer, source: None }).await
}

/// The run that a submit is for.
async fn addressed(caller: &Caller, request: &HttpRequest, run_id: Option<&str>) -> Result<RunInfo, Refused> {
    mount::run(caller, request, run_id, SUBMIT_HOLD).await
}

/// Submits under the request's key; a full queue holds it.
async fn submit(caller: &Caller, request: &HttpRequest, run: &RunInfo, operation: Operation) -> Answer {
    let key = mount::idempotency_key(request)?;
    let submit = SubmitOperation { run: run.run, key, operation };
    let held_until = Instant::now() + SUBMIT_HOLD;
    let seq = loop {
        let left = held_until.saturating_duration_since(Instant::now());
        match caller.upstream.submit(submit.clone(), left).await {
            Err(refused) if refused.is_passing() && left > QUEUE_PAUSE => {
                tokio::time::sleep(QUEUE_PAUSE).await;
            }
            // With its reason: a full queue, or a full disk.
            answer => break answer.map_err(Refused::busy_as_not_yet)?,
        }
    };
    let id = OperationId { run: run.run, seq }.to_string();
    Ok(HttpResponse::Accepted()
        .insert_header((header::LOCATION, format!("/operations/{id}")))
        .json(json!({ "operation_id": id, "schema_version": 1 })))
}

/// `GET {trainer}/operations/{id}`; ids are global, so the mount is not looked at.
pub async fn poll(caller: Caller, path: web::Path<PolledOperation>) -> Answer {
    let unknown = || Refused::not_found(format!("there is no operation {:?}", path.id));
    let id: OperationId = path.id.parse().map_err(|_| unknown())?;
    match caller.upstream.outcome(id.run, id.seq, POLL_HOLD).await? {
        OperationStatus::Done(result) => {
            let text = results::done(&caller, id, result).await?;
            Ok(HttpResponse::Ok().content_type("application/json").body(text))
        }
        OperationStatus::Failed(error) => Ok(HttpResponse::Ok().json(results::failed(id, &error))),
        OperationStatus::Pending => Err(Refused::not_yet(format!("{} is not finished", path.id))),
    }
}

#[derive(Deserialize)]
pub struct PolledOperation {
    id: String,
}

//! The control plane: sessions, runs, what is offered.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    protocol::{CreateRun, RunInfo},
    types::{InvalidInput, LoraConfig, NoDropout, SessionId},
};

use super::{
    super::{body, caller::Caller, refusal::Refused},
    local, mount,
};

type Answer = Result<HttpResponse, Refused>;

/// The one team.
const TEAM: &str = "lockstep";

/// `GET /v1/teams`
pub async fn teams(_: Caller) -> HttpResponse {
    HttpResponse::Ok().json(json!({ "teams": [{ "id": TEAM, "name": TEAM, "default": true }] }))
}

/// `GET /v1/loops/capabilities`
pub async fn capabilities(caller: Caller) -> Answer {
    let capabilities = caller.upstream.capabilities().await?;
    let models: Vec<Value> = capabilities
        .supported_models
        .iter()
        .map(|m| json!({ "model_name": m.model_name, "max_context_length": m.max_context_length }))
        .collect();
    Ok(HttpResponse::Ok().json(json!({ "supported_models": models })))
}

/// `POST {root}/sessions`; has no body.
pub async fn create_session(caller: Caller) -> Answer {
    let session = caller.upstream.create_session().await?;
    Ok(HttpResponse::Ok().json(json!({ "session": { "id": session } })))
}

/// What a run is to be. Fields that other services read and this one needs not (`availability_model`,
/// `scope`, …) are passed over.
#[derive(Deserialize)]
struct CreateTrainer {
    session_id: String,
    base_model: String,
    #[serde(default = "default_rank")]
    lora_rank: u32,
    #[serde(default = "one")]
    replicas: u32,
    seed: Option<u64>,
    max_seq_len: Option<u32>,
    name: Option<String>,
    path: Option<String>,
    base_checkpoint: Option<Value>,
    /// Not in the dialect; whoever sends one must not believe that it is used.
    #[serde(default, rename = "lora_dropout", alias = "dropout")]
    _lora_dropout: NoDropout,
}

fn default_rank() -> u32 {
    32
}

fn one() -> u32 {
    1
}

/// `POST {root}/trainers`: a run of its own, without a sampler.
pub async fn create_trainer(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let create: CreateTrainer = caller.read(&request, payload, body::SMALL).await?.json()?;
    if create.base_checkpoint.is_some_and(|checkpoint| !checkpoint.is_null()) {
        let problem = "is not supported: create the run from its base model, then load a bt:// path";
        return Err(InvalidInput::new("base_checkpoint", problem).into());
    }
    if let Some(name) = create.name.as_deref().filter(|name| name.starts_with(local::PREFIX)) {
        let problem = format!("may not begin with {:?}, got {name:?}", local::PREFIX);
        return Err(InvalidInput::new("name", problem).into());
    }
    let session = session(&create.session_id)?;
    let key = mount::idempotency_key(&request)?;
    if let Some(path) = create.path.as_deref() {
        caller.upstream.checkpoint_at(path, "path").await?;
    }
    let run = caller
        .upstream
        .create_run(
            key,
            CreateRun {
                session,
                base_model: create.base_model,
                lora: LoraConfig::new(create.lora_rank, create.seed.unwrap_or(0)),
                replicas: Some(create.replicas),
                max_seq_len: create.max_seq_len,
                micro_batch_tokens: None,
                name: create.name,
            },
        )
        .await
        .map_err(Refused::of_a_body)?;
    let url = mount::trainer_url(&caller, &request, run.run)?;
    Ok(HttpResponse::Ok().json(json!({ "run": described(&run, &url) })))
}

/// `GET /v1/loops/runs`: the caller's, oldest first.
pub async fn runs(caller: Caller, request: HttpRequest) -> Answer {
    let described = |run: &RunInfo| Ok(described(run, &mount::trainer_url(&caller, &request, run.run)?));
    let runs = caller.upstream.runs().await?;
    let runs: Vec<Value> = runs.iter().map(described).collect::<Result<_, Refused>>()?;
    Ok(HttpResponse::Ok().json(json!({ "runs": runs })))
}

/// `DELETE /v1/loops/runs/{run}`: with all that it saved.
pub async fn delete_run(caller: Caller, path: web::Path<String>) -> Answer {
    let unknown = || Refused::not_found(format!("there is no run {:?}", path.as_str()));
    caller.upstream.delete_run(path.parse().map_err(|_| unknown())?).await?;
    Ok(HttpResponse::Ok().json(json!({})))
}

/// A session that the caller names.
pub fn session(text: &str) -> Result<SessionId, Refused> {
    text.parse().map_err(|_| {
        let problem = format!("{text:?} is no session; make one with POST /v1/loops/sessions");
        InvalidInput::new("session_id", problem).into()
    })
}

/// A run as this dialect shows it. `deployment_id` makes it a dedicated one.
pub fn described(run: &RunInfo, base_url: &str) -> Value {
    json!({
        "id": run.run,
        "session_id": run.session,
        "name": run.name,
        "base_model": run.base_model,
        "base_url": base_url,
        "deployment_id": run.run,
        "base_checkpoint": null,
        "status": { "name": "ACTIVE" },
        "user": null,
        "sampler": null,
    })
}

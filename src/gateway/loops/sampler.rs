//! Samplers: made from a run, a base model or a checkpoint, and what they say of themselves.
//!
//! Making one makes nothing: every replica serves every source, so a sampler is its id.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::types::{CheckpointTarget, InvalidInput};

use super::{
    super::{body, caller::Caller, refusal::Refused},
    control::session,
    ids::SamplerId,
    local,
    mount::{self, Sampler},
};

type Answer = Result<HttpResponse, Refused>;

/// The client gives a status 30 s.
const STATUS_HOLD: Duration = Duration::from_secs(25);

#[derive(Deserialize)]
struct CreateSampler {
    session_id: String,
    run_id: Option<String>,
    base_model: Option<String>,
    model_path: Option<String>,
    max_seq_length: Option<u32>,
}

/// `POST {root}/samplers`: paired with a run, always the same one; or of a model or path alone.
pub async fn create_sampler(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let create: CreateSampler = caller.read(&request, payload, body::SMALL).await?.json()?;
    session(&create.session_id)?;
    let id = match (create.run_id, create.base_model, create.model_path) {
        (Some(run), None | Some(_), None) => SamplerId::Paired(mount::named_run(&caller, &run).await?.run),
        (None, Some(model), None) => SamplerId::Base(model),
        (None, None | Some(_), Some(path)) => SamplerId::Checkpoint(path.trim_end_matches('/').to_owned()),
        _ => {
            let problem = "or `base_model` or `model_path` must be given, and only one of them";
            return Err(InvalidInput::new("run_id", problem).into());
        }
    };
    let model = base_model(&caller, &id).await.map_err(Refused::of_a_body)?;
    caller.upstream.find_model(&model).await.map_err(Refused::of_a_body)?;
    if let (Some(asked), Some(context)) = (create.max_seq_length, context(&caller, &model).await?)
        && !(1..=context).contains(&asked)
    {
        let problem = format!("must be 1 to {context}, the context of {model}, got {asked}");
        return Err(InvalidInput::new("max_seq_length", problem).into());
    }
    let url = format!("{}/v1/loops/samplers/{id}/serve", mount::public_url(&caller, &request)?);
    Ok(HttpResponse::Ok().json(json!({ "sampler": {
        "id": id.to_string(),
        "model_id": id.to_string(),
        "deployment_id": id.to_string(),
        "base_url": url,
        "base_model": model,
        "base_checkpoint": null,
        "status": { "name": "ACTIVE" },
        "user": null,
    }})))
}

/// `GET /v1/models/{id}/deployments/{id}`: whether a sampler can be used yet.
pub async fn deployment(caller: Caller, path: web::Path<(String, String)>) -> Answer {
    let id: SamplerId = path.0.parse().map_err(|e: InvalidInput| Refused::not_found(e.to_string()))?;
    let model = base_model(&caller, &id).await?;
    let status = match tokio::time::timeout(STATUS_HOLD, caller.upstream.find_model(&model)).await {
        Err(_) => "LOADING_MODEL",
        Ok(Ok(())) => "ACTIVE",
        Ok(Err(refused)) if refused.status() == StatusCode::NOT_FOUND => "FAILED",
        Ok(Err(refused)) => return Err(refused),
    };
    Ok(HttpResponse::Ok().json(json!({ "status": status })))
}

/// `GET {sampler}/v1/models`: the base model, and the adapter while one is live.
pub async fn models(caller: Caller, request: HttpRequest) -> Answer {
    let (base, adapter) = match mount::sampler(&caller, &request).await? {
        Sampler::Of(id) => {
            let adapter = match &id {
                SamplerId::Paired(run) => caller.upstream.run(*run, STATUS_HOLD).await?.live,
                SamplerId::Checkpoint(_) | SamplerId::Base(_) => None,
            };
            (base_model(&caller, &id).await?, adapter)
        }
        Sampler::Bare => match local::published_last(&caller, STATUS_HOLD).await? {
            Some(run) => (run.base_model, run.live),
            None => (local::base_model(&caller, None).await?, None),
        },
    };
    let model = |id: &str, parent: Option<&str>| json!({ "id": id, "object": "model", "parent": parent });
    let mut data = vec![model(&base, None)];
    data.extend(adapter.map(|adapter| model(&adapter.to_string(), Some(&base))));
    Ok(HttpResponse::Ok().json(json!({ "object": "list", "data": data })))
}

/// `GET {sampler}/trainers_policy_version`: the version of the live adapter.
pub async fn policy_version(caller: Caller, request: HttpRequest) -> Answer {
    let live = match mount::sampler(&caller, &request).await? {
        Sampler::Of(SamplerId::Paired(run)) => caller.upstream.run(run, STATUS_HOLD).await?.live,
        Sampler::Of(SamplerId::Base(_) | SamplerId::Checkpoint(_)) => None,
        Sampler::Bare => local::published_last(&caller, STATUS_HOLD).await?.and_then(|run| run.live),
    };
    Ok(HttpResponse::Ok().json(json!({ "policy_version": live.map(|live| live.step) })))
}

/// `GET {sampler}/health`, `POST {sampler}/wake`: it is never asleep.
pub async fn awake(caller: Caller, request: HttpRequest) -> Answer {
    mount::sampler(&caller, &request).await?;
    Ok(HttpResponse::Ok().json(Value::Object(Default::default())))
}

/// The base model of what a sampler serves.
async fn base_model(caller: &Caller, id: &SamplerId) -> Result<String, Refused> {
    match id {
        SamplerId::Base(model) => Ok(model.clone()),
        SamplerId::Paired(run) => Ok(caller.upstream.run(*run, STATUS_HOLD).await?.base_model),
        SamplerId::Checkpoint(path) => {
            let checkpoint = caller.upstream.checkpoint_at(path, "model_path").await?;
            if checkpoint.target != CheckpointTarget::Sampler {
                let problem = format!("{path} is no sampler checkpoint; save_weights_for_sampler makes one");
                return Err(InvalidInput::new("model_path", problem).into());
            }
            Ok(checkpoint.base_model)
        }
    }
}

/// The context of a model that is offered under this name.
async fn context(caller: &Caller, model: &str) -> Result<Option<u32>, Refused> {
    let models = caller.upstream.capabilities().await?.supported_models;
    Ok(models.into_iter().find(|m| m.model_name == model).and_then(|m| m.max_context_length))
}

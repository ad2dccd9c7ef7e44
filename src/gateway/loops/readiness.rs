//! Whether a run can be used, and where it stands.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};
use serde::Deserialize;
use serde_json::json;

use crate::{protocol::RunInfo, types::InvalidInput};

use super::{
    super::{caller::Caller, refusal::Refused},
    control, mount,
};

type Answer = Result<HttpResponse, Refused>;

/// The client gives a health check 10 s, then sleeps for as long.
const HEALTH_HOLD: Duration = Duration::from_secs(8);

/// And a deployment's status 30 s.
const STATUS_HOLD: Duration = Duration::from_secs(25);

/// A policy version is asked for once and raised if it fails.
const VERSION_HOLD: Duration = Duration::from_secs(120);

#[derive(Deserialize)]
pub struct Health {
    base_model: Option<String>,
}

/// `GET {trainer}/health`: 200 once the run's operations are accepted. Also its heartbeat.
pub async fn trainer_health(caller: Caller, request: HttpRequest, query: web::Query<Health>) -> Answer {
    // "Not yet" is 503 on this route alone.
    let starting = |refused: Refused| match refused.status() {
        StatusCode::BAD_GATEWAY => refused.with_status(StatusCode::SERVICE_UNAVAILABLE),
        _ => refused,
    };
    let run = mount::run(&caller, &request, None, HEALTH_HOLD).await.map_err(starting)?;
    let id = run.run;
    if let Some(asked) = query.base_model.as_deref().filter(|asked| *asked != run.base_model) {
        let problem = format!("{id} trains {:?}, not {asked:?}", run.base_model);
        return Err(InvalidInput::new("base_model", problem).into());
    }
    if is_broken(&run) {
        return Err(Refused::fault(format!("{id} takes no more operations: {}", run.phase)));
    }
    Ok(HttpResponse::Ok().json(json!({ "status": "ok", "run_id": id, "phase": run.phase })))
}

/// `GET {trainer}/policy_version`: optimiser steps applied; not ordered behind the queue.
pub async fn policy_version(caller: Caller, request: HttpRequest) -> Answer {
    let run = mount::run(&caller, &request, None, VERSION_HOLD).await?;
    Ok(HttpResponse::Ok().json(json!({ "policy_version": run.step })))
}

/// `GET /v1/loops/deployments/{id}`: a run's deployment has the run's id.
pub async fn deployment(caller: Caller, request: HttpRequest) -> Answer {
    let run = mount::run(&caller, &request, None, STATUS_HOLD).await?;
    let mut deployment = control::described(&run, &mount::trainer_url(&caller, &request, run.run)?);
    deployment["status"] = json!({ "name": if is_broken(&run) { "FAILED" } else { "RUNNING" } });
    Ok(HttpResponse::Ok().json(json!({ "deployment": deployment })))
}

fn is_broken(run: &RunInfo) -> bool {
    run.phase.starts_with("broken")
}

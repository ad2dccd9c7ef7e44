//! What a request addresses, and where base URLs begin.
//!
//! A base URL names its run or sampler in its path. A bare one (`local`) names none: there the
//! header `X-Run-Id` does, or nothing.

use std::time::Duration;

use actix_web::{HttpRequest, http::header::HOST};

use crate::{
    protocol::{OperationKey, RunInfo},
    types::{InvalidInput, RunId},
};

use super::{
    super::{caller::Caller, refusal::Refused},
    ids::{SamplerId, fresh_key, operation_key},
    local,
};

/// Header by which a client names its run; says the same as the base URL.
const RUN_ID: &str = "X-Run-Id";

/// Repeated with a request by a client that got no answer.
pub const IDEMPOTENCY_KEY: &str = "Idempotency-Key";

/// How long a request waits to learn about its run.
const RUN_HOLD: Duration = Duration::from_secs(25);

/// Which trainer a base URL is of.
pub enum Trainer {
    /// `/v1/loops/runs/{run}/trainer`
    Of(RunId),
    /// A bare one: of the run that is called so.
    Bare(String),
}

/// Which sampler a base URL is of.
pub enum Sampler {
    /// `/v1/loops/samplers/{id}/serve`
    Of(SamplerId),
    /// A bare one, and no run named.
    Bare,
}

/// The trainer of a request. `body_run_id`: the body's field, if it has one.
pub fn trainer(request: &HttpRequest, body_run_id: Option<&str>) -> Result<Trainer, Refused> {
    let named = header(request, RUN_ID)?;
    let Some(path) = request.match_info().get("run") else {
        return Ok(Trainer::Bare(named.or(body_run_id).unwrap_or_default().to_owned()));
    };
    for (field, named) in [(RUN_ID, named), ("run_id", body_run_id)] {
        if let Some(named) = named.filter(|named| *named != path) {
            let problem = format!("says {named:?}, and the URL is of {path}");
            return Err(InvalidInput::new(field, problem).into());
        }
    }
    // No other run can exist, so it is the same as one that doesn't.
    let run = path.parse().map_err(|_| Refused::not_found(format!("there is no run {path:?}")))?;
    Ok(Trainer::Of(run))
}

/// The run of a request to a trainer, waited for up to `hold`.
pub async fn run(
    caller: &Caller,
    request: &HttpRequest,
    body_run_id: Option<&str>,
    hold: Duration,
) -> Result<RunInfo, Refused> {
    match trainer(request, body_run_id)? {
        Trainer::Of(run) => caller.upstream.run(run, hold).await,
        Trainer::Bare(name) => local::find(caller, &name, hold).await,
    }
}

/// The sampler of a request. A run that is named beside its id is its own.
pub async fn sampler(caller: &Caller, request: &HttpRequest) -> Result<Sampler, Refused> {
    let named = header(request, RUN_ID)?;
    let Some(path) = request.match_info().get("sampler") else {
        return Ok(match named {
            Some(name) => Sampler::Of(SamplerId::Paired(local::find(caller, name, RUN_HOLD).await?.run)),
            None => Sampler::Bare,
        });
    };
    let id: SamplerId =
        path.parse().map_err(|_| Refused::not_found(format!("there is no sampler {path:?}")))?;
    if let (SamplerId::Paired(run), Some(named)) = (&id, named)
        && named != run.to_string()
    {
        let problem = format!("says {named:?}, and the URL is of the sampler of {run}");
        return Err(InvalidInput::new(RUN_ID, problem).into());
    }
    Ok(Sampler::Of(id))
}

/// A run that a body names.
pub async fn named_run(caller: &Caller, name: &str) -> Result<RunInfo, Refused> {
    let unknown = || InvalidInput::new("run_id", format!("there is no run {name:?}")).into();
    let Ok(run) = name.parse::<RunId>() else { return Err(unknown()) };
    caller.upstream.run(run, RUN_HOLD).await.map_err(|refused| match refused.is_not_found() {
        true => unknown(),
        false => refused,
    })
}

/// A header's text, if it is there.
pub fn header<'a>(request: &'a HttpRequest, name: &str) -> Result<Option<&'a str>, Refused> {
    let Some(value) = request.headers().get(name) else { return Ok(None) };
    value.to_str().map(Some).map_err(|_| InvalidInput::new(name, "must be plain ASCII").into())
}

/// The key under which a request takes effect once.
pub fn idempotency_key(request: &HttpRequest) -> Result<OperationKey, Refused> {
    header(request, IDEMPOTENCY_KEY)?.map_or_else(fresh_key, |key| Ok(operation_key(key)))
}

/// Where the caller reaches this gateway, without a trailing slash: as configured, or as it was
/// called.
pub fn public_url(caller: &Caller, request: &HttpRequest) -> Result<String, Refused> {
    if let Some(url) = &caller.public_url {
        return Ok(url.clone());
    }
    let host = header(request, HOST.as_str())?;
    let host = host.ok_or_else(|| InvalidInput::new("Host", "is missing, and URLs are made of it"))?;
    Ok(format!("{}://{host}", caller.scheme))
}

/// Base URL of a run's trainer.
pub fn trainer_url(caller: &Caller, request: &HttpRequest, run: RunId) -> Result<String, Refused> {
    Ok(format!("{}/v1/loops/runs/{run}/trainer", public_url(caller, request)?))
}

//! Clients without a control plane: a bare trainer URL and a bare sampler URL.
//!
//! Such a client names its run in `X-Run-Id`, or not at all; the first `init_trainer_server`
//! makes it. These runs are found again by their display name, `local:NAME`.

use std::time::Duration;

use crate::{
    protocol::{CreateRun, RunInfo},
    types::{InvalidInput, LoraConfig, RunId},
};

use super::{
    super::{caller::Caller, refusal::Refused},
    ids::fresh_key,
};

/// Begins the display names of local runs, and of no others.
pub const PREFIX: &str = "local:";

/// Longest name that a client may give its run, in bytes.
const NAME_MAX: usize = 200;

/// The run that a client calls `name`; `""` if it calls it nothing. The id of a run is a name
/// of it as well.
pub async fn find(caller: &Caller, name: &str, hold: Duration) -> Result<RunInfo, Refused> {
    check(name)?;
    if let Ok(run) = name.parse::<RunId>() {
        match caller.upstream.run(run, hold).await {
            Err(refused) if refused.is_not_found() => {}
            answer => return answer,
        }
    }
    let found = caller.upstream.find_run(format!("{PREFIX}{name}"), hold).await;
    found.map_err(|refused| match refused.is_not_found() {
        true => {
            Refused::not_found(format!("there is no run {name:?} here yet; init_trainer_server makes it"))
        }
        false => refused,
    })
}

/// The same, made if there is none, and made anew for another base model.
pub async fn find_or_create(
    caller: &Caller,
    name: &str,
    base_model: Option<&str>,
    lora_rank: u32,
    hold: Duration,
) -> Result<RunInfo, Refused> {
    // Two at once would make two.
    let _one = caller.creating.lock().await;
    match find(caller, name, hold).await {
        Ok(run) if base_model.is_none_or(|asked| asked == run.base_model) => return Ok(run),
        Ok(_) => {}
        Err(refused) if refused.is_not_found() => {}
        Err(refused) => return Err(refused),
    }
    let Some(base_model) = base_model else {
        return Err(InvalidInput::new("base_model", "is missing, and there is no run yet").into());
    };
    let create = CreateRun {
        session: caller.upstream.own_session().await?,
        base_model: base_model.to_owned(),
        lora: LoraConfig::new(lora_rank, 0),
        replicas: None,
        max_seq_len: None,
        micro_batch_tokens: None,
        name: Some(format!("{PREFIX}{name}")),
    };
    caller.upstream.create_run(fresh_key()?, create).await.map_err(Refused::of_a_body)
}

/// The run that was published last: what a bare sampler says of itself, as nobody names a run
/// there.
pub async fn published_last(caller: &Caller, hold: Duration) -> Result<Option<RunInfo>, Refused> {
    let runs = caller.upstream.cluster(hold).await?.runs.into_iter();
    Ok(runs.filter(|run| run.live.is_some()).max_by_key(|run| run.live_since_ms))
}

/// The base model of a bare sampler: the one that is asked for, or the only one.
pub async fn base_model(caller: &Caller, asked: Option<&str>) -> Result<String, Refused> {
    if let Some(asked) = asked.filter(|asked| !asked.is_empty()) {
        return Ok(asked.to_owned());
    }
    let offered = caller.upstream.capabilities().await?.supported_models;
    match offered.as_slice() {
        [only] => Ok(only.model_name.clone()),
        several => {
            let names: Vec<_> = several.iter().map(|model| model.model_name.as_str()).collect();
            let problem = format!("is missing, and there is not just one; offered: {}", names.join(", "));
            Err(InvalidInput::new("model", problem).into())
        }
    }
}

fn check(name: &str) -> Result<(), Refused> {
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':');
    if name.len() <= NAME_MAX && name.chars().all(legal) {
        return Ok(());
    }
    let problem = format!("must be at most {NAME_MAX} ASCII characters without spaces, / and :");
    Err(InvalidInput::new("X-Run-Id", problem).into())
}

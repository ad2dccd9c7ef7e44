//! Saved checkpoints: lists of them, their files, and the files' bytes.
//!
//! ```text
//!   GET  /v1/loops/checkpoints?run_id= │ checkpoint_path= │ base_model=
//!   POST /v1/loops/checkpoints/validate            may a sampler serve this path
//!   GET  /v1/loops/checkpoints/{id}/source         always: over signed URLs
//!   GET  /v1/loops/checkpoints/{id}/files          a page of signed URLs
//!   GET  /v1/loops/checkpoints/{id}/files/{name}?expires=…&key=…&signature=…
//!   DELETE /v1/loops/checkpoints/{id}
//! ```

use std::time::{Duration, UNIX_EPOCH};

use actix_web::{
    HttpRequest, HttpResponse,
    http::{StatusCode, header},
    web,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    protocol::BlobRef,
    types::{Checkpoint, CheckpointFile, CheckpointId, CheckpointPath, CheckpointTarget, InvalidInput},
};

use super::{
    super::{
        Gateway, body,
        caller::Caller,
        download,
        presign::Signature,
        range::{self, Asked},
        refusal::Refused,
    },
    mount,
};

type Answer = Result<HttpResponse, Refused>;

/// Files on a page, if the caller doesn't say.
const PAGE_SIZE: u32 = 1000;

#[derive(Deserialize)]
pub struct Filter {
    run_id: Option<String>,
    checkpoint_path: Option<String>,
    base_model: Option<String>,
}

/// `GET /v1/loops/checkpoints`: newest first. What names nothing matches nothing.
pub async fn list(caller: Caller, filter: web::Query<Filter>) -> Answer {
    let Filter { run_id, checkpoint_path, base_model } = filter.into_inner();
    let found = match (run_id, checkpoint_path, base_model) {
        (Some(run), None, None) => match run.parse() {
            Ok(run) => caller.upstream.checkpoints(Some(run)).await?,
            Err(_) => Vec::new(),
        },
        (None, Some(path), None) => match path.parse::<CheckpointPath>() {
            Ok(path) => {
                let mut found = caller.upstream.checkpoints(Some(path.run)).await?;
                found.retain(|c| c.target == path.target && c.checkpoint_id == path.name);
                found
            }
            Err(_) => Vec::new(),
        },
        (None, None, Some(model)) => {
            let mut found = caller.upstream.checkpoints(None).await?;
            found.retain(|c| c.base_model == model);
            found
        }
        _ => {
            let problem = "or `checkpoint_path` or `base_model` must be given, and only one of them";
            return Err(InvalidInput::new("run_id", problem).into());
        }
    };
    let found: Vec<Value> = found.iter().map(described).collect();
    Ok(HttpResponse::Ok().json(json!({ "checkpoints": found })))
}

#[derive(Deserialize)]
struct Validate {
    checkpoint_path: String,
    run_id: Option<String>,
}

/// `POST /v1/loops/checkpoints/validate`: whether a sampler of the run may serve the path.
pub async fn validate(caller: Caller, request: HttpRequest, payload: web::Payload) -> Answer {
    let asked: Validate = caller.read(&request, payload, body::SMALL).await?.json()?;
    // On this route, a bad path is 400.
    let bad = |refused: Refused| match refused.status() {
        StatusCode::UNPROCESSABLE_ENTITY => refused.with_status(StatusCode::BAD_REQUEST),
        _ => refused,
    };
    let checkpoint = caller.upstream.checkpoint_at(&asked.checkpoint_path, "checkpoint_path").await;
    let checkpoint = checkpoint.map_err(bad)?;
    let refuse = |problem: String| Err(bad(InvalidInput::new("checkpoint_path", problem).into()));
    if checkpoint.target != CheckpointTarget::Sampler {
        let path = &checkpoint.path;
        return refuse(format!("{path} is no sampler checkpoint; save_weights_for_sampler makes one"));
    }
    if let Some(run) = asked.run_id {
        let run = mount::named_run(&caller, &run).await.map_err(bad)?;
        if run.base_model != checkpoint.base_model {
            let (path, other) = (&checkpoint.path, &checkpoint.base_model);
            return refuse(format!(
                "{path} was made of {other:?}, and {} trains {:?}",
                run.run, run.base_model
            ));
        }
    }
    Ok(HttpResponse::Ok().json(json!({})))
}

/// `GET /v1/loops/checkpoints/{id}/source`: "s3" says that the files route gives URLs.
pub async fn source(caller: Caller, path: web::Path<String>) -> Answer {
    caller.upstream.files(checkpoint_id(&path)?, 1, 0, false).await?;
    Ok(HttpResponse::Ok().json(json!({ "source": { "kind": "s3" } })))
}

/// `DELETE /v1/loops/checkpoints/{id}`
pub async fn delete(caller: Caller, path: web::Path<String>) -> Answer {
    caller.upstream.delete_checkpoint(checkpoint_id(&path)?).await?;
    Ok(HttpResponse::Ok().json(json!({})))
}

#[derive(Deserialize)]
pub struct Page {
    page_size: Option<u32>,
    page_token: Option<u64>,
}

/// `GET /v1/loops/checkpoints/{id}/files`: over the bucket's URLs, or else this gateway's.
pub async fn files(
    caller: Caller,
    request: HttpRequest,
    path: web::Path<String>,
    page: web::Query<Page>,
) -> Answer {
    let id = checkpoint_id(&path)?;
    let (size, token) = (page.page_size.unwrap_or(PAGE_SIZE), page.page_token.unwrap_or(0));
    let page = caller.upstream.files(id, size, token, true).await?;
    let base = format!("{}/v1/loops/checkpoints/{id}/files", mount::public_url(&caller, &request)?);
    let signed = page.presigned_urls.iter().map(|file| {
        let name = &file.relative_file_name;
        // A bucket's own URL leads past this gateway.
        let url = match file.digest() {
            Some(_) => format!("{base}/{name}?{}", caller.presign.sign(id, name)),
            None => file.url.clone(),
        };
        json!({
            "url": url,
            "relative_file_name": name,
            "node_rank": file.node_rank,
            "size_bytes": file.size_bytes,
            "last_modified": rfc3339(file.last_modified_ms),
        })
    });
    Ok(HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-store")).json(json!({
        "presigned_urls": signed.collect::<Vec<Value>>(),
        "next_page_token": page.next_page_token,
        "total_count": page.total_count,
    })))
}

/// The bytes of one file, to whoever has a URL that was signed for it.
pub async fn file(
    gateway: web::Data<Gateway>,
    request: HttpRequest,
    path: web::Path<(String, String)>,
    query: Option<web::Query<Signature>>,
) -> Answer {
    let (id, name) = path.into_inner();
    let id = checkpoint_id(&id)?;
    let unsigned =
        || Refused::forbidden("UNSIGNED_URL", "this URL is not signed; the files route gives those");
    gateway.presign.verify(id, &name, &query.ok_or_else(unsigned)?.into_inner())?;
    let file = listed(&gateway, id, &name).await?;
    let digest = file.digest().ok_or_else(|| Refused::fault(format!("{name} of {id} has no blob")))?;
    let blob = BlobRef { digest, size: file.size_bytes };
    match range::asked(&request, &digest.to_string(), blob.size) {
        Err(unsatisfiable) => Ok(unsatisfiable.response(blob.size)),
        Ok(Asked { mut response, range }) => {
            let turn = gateway.downloads.turn().await?;
            let upstream = gateway.everything.clone();
            let read = move |part| {
                let upstream = upstream.clone();
                async move { upstream.part(blob, part).await }
            };
            Ok(response.body(download::body(blob, range, turn, read)))
        }
    }
}

/// A file by its name in the checkpoint's manifest: nothing else is served.
async fn listed(gateway: &Gateway, id: CheckpointId, name: &str) -> Result<CheckpointFile, Refused> {
    let mut token = Some(0);
    while let Some(from) = token {
        let page = gateway.everything.files(id, PAGE_SIZE, from, false).await?;
        if let Some(file) = page.presigned_urls.into_iter().find(|file| file.relative_file_name == name) {
            return Ok(file);
        }
        token = page.next_page_token;
    }
    Err(Refused::not_found(format!("{id} has no file {name:?}")))
}

fn checkpoint_id(text: &str) -> Result<CheckpointId, Refused> {
    text.parse().map_err(|_| {
        let shown: String = text.chars().take(64).collect();
        Refused::not_found(format!("there is no checkpoint {shown:?}"))
    })
}

fn described(checkpoint: &Checkpoint) -> Value {
    json!({
        "id": checkpoint.id,
        "run_id": checkpoint.run_id,
        "checkpoint_id": checkpoint.checkpoint_id,
        "checkpoint_type": checkpoint.checkpoint_type,
        "target": checkpoint.target,
        "created_at": rfc3339(checkpoint.created_at_ms),
        "base_model": checkpoint.base_model,
        "lora_adapter_config": { "r": checkpoint.lora_rank, "lora_alpha": checkpoint.lora_alpha },
        "size_bytes": checkpoint.size_bytes,
        "sync_status": "COMPLETE",
        "step": checkpoint.step,
        "expires_at": checkpoint.expires_at_ms.map(rfc3339),
        "path": checkpoint.path,
    })
}

/// Milliseconds since the Unix epoch as people and clients read them, in UTC.
fn rfc3339(ms: u64) -> String {
    /// The last one that has four digits for its year.
    const LAST_MS: u64 = 253_402_300_799_999;
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms.min(LAST_MS))).to_string()
}

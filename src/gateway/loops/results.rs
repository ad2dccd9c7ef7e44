//! Outcomes of operations as JSON.

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    protocol::{OperationResult, Payload, decode_compressed},
    types::{ForwardBackwardOutput, OperationError},
};

use super::{
    super::{
        body,
        caller::Caller,
        refusal::{Refused, error_class},
    },
    ids::OperationId,
};

/// The text of `{"status": "done", "result": …}`. A forward pass may be megabytes, so nothing of
/// it goes through a [`Value`].
pub async fn done(caller: &Caller, id: OperationId, result: OperationResult) -> Result<Vec<u8>, Refused> {
    match result {
        OperationResult::ForwardBackward(payload) => {
            let bytes = match payload {
                Payload::Inline(bytes) => bytes,
                Payload::Blob(blob) => caller.upstream.blob(blob).await?,
            };
            body::off_thread(move || {
                let output: ForwardBackwardOutput = decode_compressed("forward_backward output", &bytes)
                    .map_err(|e| Refused::fault(e.to_string()))?;
                written(id, output)
            })
            .await
        }
        OperationResult::Init(init) => written(id, init),
        OperationResult::OptimStep(step) => written(id, with_lr(json!(step))),
        OperationResult::SaveState(saved) => written(id, json!({ "mode": "lora", "path": saved.path })),
        OperationResult::SaveWeightsForSampler(saved) => written(id, saved),
        OperationResult::LoadState(loaded) => written(id, loaded),
    }
}

/// `{"status": "error", …}`; with HTTP status 200.
pub fn failed(id: OperationId, error: &OperationError) -> Value {
    json!({
        "status": "error",
        "operation_id": id.to_string(),
        "error": error.message,
        "error_class": error_class(error.kind),
    })
}

fn written(id: OperationId, result: impl Serialize) -> Result<Vec<u8>, Refused> {
    #[derive(Serialize)]
    struct Done<T> {
        status: &'static str,
        operation_id: String,
        result: T,
    }
    serde_json::to_vec(&Done { status: "done", operation_id: id.to_string(), result })
        .map_err(|e| Refused::fault(format!("a result can't be written as JSON: {e}")))
}

/// The learning rate under both of its names.
fn with_lr(mut step: Value) -> Value {
    if let Some(rate) = step["metrics"].get("learning_rate").cloned() {
        step["metrics"]["lr"] = rate;
    }
    step
}

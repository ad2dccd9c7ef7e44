//! Request bodies: read under a limit and a budget, then parsed once.

use std::{sync::Arc, time::Duration};

use actix_web::{HttpRequest, http::header::CONTENT_LENGTH, web};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use super::refusal::Refused;

/// Largest body of a small request: a control-plane call.
pub const SMALL: usize = 1 << 20;

/// Largest body with data. The Python client splits what is over 24 MiB.
pub const DATA: usize = 48 << 20;

/// Bytes of bodies in memory at once: parsed data takes a small multiple of it.
pub const BUDGET_BYTES: u64 = 256 << 20;

/// How long a body may take to arrive, from the moment that there is room for it.
const ARRIVAL_DEADLINE: Duration = Duration::from_secs(300);

/// How long a request waits for room.
const ROOM_DEADLINE: Duration = Duration::from_secs(60);

/// Room for bodies: of all requests, or of one key's.
#[derive(Debug, Clone)]
pub struct Bodies {
    bytes: u64,
    room: Arc<Semaphore>,
}

/// A whole body; its room is free again when it is dropped.
pub struct Body {
    pub bytes: Bytes,
    _room: (Option<OwnedSemaphorePermit>, OwnedSemaphorePermit),
}

impl Bodies {
    /// Room for `bytes`.
    pub fn new(bytes: u64) -> Self {
        Self { bytes, room: Arc::new(Semaphore::new(usize::try_from(bytes >> 10).unwrap_or(usize::MAX))) }
    }

    /// Bytes of bodies that hold room now.
    pub fn held(&self) -> u64 {
        self.bytes.saturating_sub((self.room.available_permits() as u64) << 10)
    }

    /// Reads a body of at most `limit` bytes. Its room is taken before the first byte is read, by
    /// its `Content-Length`; a body that names none takes room for `limit`. It is taken among the bodies
    /// of `own` first, so that whoever waits for their own keeps nobody else waiting.
    pub async fn read(
        &self,
        own: Option<&Self>,
        request: &HttpRequest,
        mut payload: web::Payload,
        limit: usize,
    ) -> Result<Body, Refused> {
        let too_large =
            |size: usize| Refused::too_large(format!("a body here has at most {limit} bytes, got {size}"));
        let length =
            request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let length: usize = length.unwrap_or(limit);
        if length > limit {
            return Err(too_large(length));
        }
        let room = async {
            let own = match own {
                Some(own) => Some(own.room.clone().acquire_many_owned(kib(length)).await?),
                None => None,
            };
            Ok((own, self.room.clone().acquire_many_owned(kib(length)).await?))
        };
        let room = tokio::time::timeout(ROOM_DEADLINE, room)
            .await
            .map_err(|_| Refused::not_yet("too many large requests are being read; try again"))?
            // The semaphores are never closed.
            .map_err(|e: AcquireError| Refused::fault(e.to_string()))?;
        let arrive = async {
            let mut bytes = BytesMut::with_capacity(length.min(SMALL));
            while let Some(piece) = payload.next().await {
                let piece = piece.map_err(|e| Refused::invalid(format!("the body did not arrive: {e}")))?;
                if bytes.len() + piece.len() > limit {
                    return Err(too_large(bytes.len() + piece.len()));
                }
                bytes.extend_from_slice(&piece);
            }
            Ok(bytes.freeze())
        };
        let bytes = tokio::time::timeout(ARRIVAL_DEADLINE, arrive)
            .await
            .map_err(|_| Refused::not_yet("the body did not arrive in time"))??;
        Ok(Body { bytes, _room: room })
    }
}

impl Body {
    /// The body as JSON of a known shape. A refusal names the place: `data[3].model_input`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Refused> {
        let mut json = serde_json::Deserializer::from_slice(&self.bytes);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
            let (path, problem) = (e.path().to_string(), e.into_inner());
            match path.as_str() {
                "." => Refused::invalid(format!("the body is not what this route takes: {problem}")),
                path => Refused::invalid(format!("`{path}`: {problem}")),
            }
        })?;
        json.end().map_err(|e| Refused::invalid(format!("something follows the body's JSON: {e}")))?;
        Ok(value)
    }
}

fn kib(bytes: usize) -> u32 {
    // At most `DATA`, which fits.
    bytes.div_ceil(1 << 10) as u32
}

/// Runs what takes milliseconds away from the threads that answer.
pub async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refused> + Send + 'static,
) -> Result<T, Refused> {
    web::block(work).await.unwrap_or_else(|_| Err(Refused::fault("a task of the gateway died")))
}

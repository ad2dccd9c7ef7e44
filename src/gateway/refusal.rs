//! Why a request is not carried out, as the Loops dialect says it.
//!
//! ```text
//!   {"error": SENTENCE, "detail": SENTENCE, "details": {"reason": UPPER_SNAKE}, "error_class": CLASS}
//! ```
//!
//! Its client retries 400, 404, 408 and 502 for up to an hour, so bad input is 422, and each
//! final refusal has the header that stops it (`X-Baseten-Error-Source: 06`). 503 means to it
//! that the service is going away for good.

use actix_web::{
    HttpResponse, ResponseError,
    http::{StatusCode, header},
};
use serde_json::json;

use crate::{
    client::ClientError,
    types::{ErrorKind, InvalidInput, OperationError},
};

/// Says to the client that a retry is of no use.
const ERROR_SOURCE: &str = "X-Baseten-Error-Source";
const FINAL: &str = "06";

/// The reason, for programs that read headers.
const ERROR_CODE: &str = "X-Baseten-Error-Code";

/// A request that is refused, or that failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    status: StatusCode,
    reason: &'static str,
    message: String,
}

impl Refused {
    /// A refusal of the caller's input.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "INVALID_INPUT", message)
    }

    /// What was named does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NOT_FOUND", message)
    }

    /// The caller may not do it.
    pub fn forbidden(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, reason, message)
    }

    /// Nobody that this service knows.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message)
    }

    /// Not yet; the client asks again at once.
    pub fn not_yet(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "NOT_YET", message)
    }

    /// More than this service takes of one request.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "TOO_LARGE", message)
    }

    /// The coordinator did not answer in time; it is on its way back, or lost.
    pub fn away(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "COORDINATOR_AWAY", message)
    }

    /// A fault of Lockstep.
    pub fn fault(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", message)
    }

    fn new(status: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { status, reason, message: message.into() }
    }

    /// The same with another status, where a route's client takes the usual one for something
    /// else.
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// The same for what a body named: a model or run that is not there is wrong input.
    pub fn of_a_body(self) -> Self {
        match self.status {
            StatusCode::NOT_FOUND => Self::invalid(self.to_string()),
            _ => self,
        }
    }

    /// On routes whose client takes 429 for the end: too much at once is "not yet".
    pub fn busy_as_not_yet(self) -> Self {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => self.with_status(StatusCode::REQUEST_TIMEOUT),
            _ => self,
        }
    }

    /// Whether it is refused only because there is too much at once.
    pub fn is_passing(&self) -> bool {
        self.status == StatusCode::TOO_MANY_REQUESTS
    }

    /// Whether what was named does not exist.
    pub fn is_not_found(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    /// The status that will be answered.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body and headers. 408 and 429 ask for a retry, so they are not marked final.
    pub fn response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        let passing = matches!(self.status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
        if self.status.is_client_error() && !passing {
            response.insert_header((ERROR_SOURCE, FINAL));
        }
        response
            .insert_header((ERROR_CODE, self.reason.to_ascii_lowercase()))
            .insert_header((header::CACHE_CONTROL, "no-store"))
            .json(json!({
                "error": self.message,
                "detail": self.message,
                "details": { "reason": self.reason },
                "error_class": class_of_status(self.status),
            }))
    }
}

impl ResponseError for Refused {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        self.response()
    }
}

impl From<InvalidInput> for Refused {
    fn from(error: InvalidInput) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<OperationError> for Refused {
    fn from(error: OperationError) -> Self {
        let (status, reason) = match error.kind {
            ErrorKind::InvalidInput => (StatusCode::UNPROCESSABLE_ENTITY, "INVALID_INPUT"),
            ErrorKind::NotFound => (StatusCode::NOT_FOUND, "NOT_FOUND"),
            ErrorKind::NotFinite => (StatusCode::UNPROCESSABLE_ENTITY, "NOT_FINITE"),
            ErrorKind::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "BUSY"),
            ErrorKind::Unavailable => (StatusCode::BAD_GATEWAY, "UNAVAILABLE"),
            ErrorKind::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"),
            ErrorKind::PermissionDenied => (StatusCode::FORBIDDEN, "PERMISSION_DENIED"),
            ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL"),
        };
        Self::new(status, reason, error.message)
    }
}

impl From<ClientError> for Refused {
    fn from(error: ClientError) -> Self {
        OperationError::from(error).into()
    }
}

/// The Python exception that a failed operation is raised as.
pub fn error_class(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidInput => "ValueError",
        ErrorKind::NotFound => "KeyError",
        ErrorKind::NotFinite => "FloatingPointError",
        ErrorKind::ResourceExhausted => "MemoryError",
        ErrorKind::Unavailable
        | ErrorKind::DeadlineExceeded
        | ErrorKind::PermissionDenied
        | ErrorKind::Internal => "RuntimeError",
    }
}

fn class_of_status(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNPROCESSABLE_ENTITY | StatusCode::PAYLOAD_TOO_LARGE => "ValueError",
        StatusCode::NOT_FOUND => "KeyError",
        StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => "PermissionError",
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "TimeoutError",
        _ => "RuntimeError",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_final(refused: &Refused) -> bool {
        refused.response().headers().get(ERROR_SOURCE).is_some_and(|source| source == FINAL)
    }

    #[test]
    fn bad_input_is_final_and_what_will_pass_is_not() {
        let of = |kind| Refused::from(OperationError::new(kind, "because"));
        for (kind, status, last) in [
            (ErrorKind::InvalidInput, 422, true),
            (ErrorKind::NotFound, 404, true),
            (ErrorKind::PermissionDenied, 403, true),
            (ErrorKind::ResourceExhausted, 429, false),
            (ErrorKind::Unavailable, 502, false),
            (ErrorKind::DeadlineExceeded, 504, false),
            (ErrorKind::Internal, 500, false),
        ] {
            assert_eq!((of(kind).status().as_u16(), is_final(&of(kind))), (status, last), "{kind:?}");
        }
        assert_eq!(of(ErrorKind::ResourceExhausted).busy_as_not_yet().status().as_u16(), 408);
        assert!(!is_final(&Refused::not_yet("wait")));
    }

    #[test]
    fn no_refusal_says_that_the_service_is_going_away() {
        use ErrorKind::*;
        for kind in [
            InvalidInput,
            NotFound,
            NotFinite,
            ResourceExhausted,
            Unavailable,
            DeadlineExceeded,
            PermissionDenied,
            Internal,
        ] {
            assert_ne!(Refused::from(OperationError::new(kind, "because")).status().as_u16(), 503);
        }
    }
}

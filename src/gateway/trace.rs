//! Around every request: its place in a W3C trace context, its line in the log, and its figures.
//!
//! A caller's `traceparent` is taken over (<https://www.w3.org/TR/trace-context/>, version 00); without one a
//! trace begins here. The request's own id is the `parent-id` of what it leads to, and is answered as
//! `X-Request-Id`.

use std::time::Instant;

use actix_web::{
    Error, HttpMessage,
    body::MessageBody,
    dev::{ServiceRequest, ServiceResponse},
    http::header::{HeaderMap, HeaderName, HeaderValue},
    middleware::Next,
    web,
};
use tracing::Instrument;

use crate::protocol::Trace;

use super::metrics::Metrics;

const TRACEPARENT: &str = "traceparent";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Gives a request its trace, measures it, and says what became of it.
pub async fn follow(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let begun = Instant::now();
    let trace = of(request.headers());
    request.extensions_mut().insert(trace);
    let method = request.method().clone();
    // The pattern and not the path: signatures stay out of the log, and labels are few.
    let route = request.match_pattern().unwrap_or_else(|| "none".to_owned());
    let metrics = request.app_data::<web::Data<Metrics>>().cloned();
    let request_id = hex::encode(trace.request_id);
    let span = tracing::info_span!(
        "request", trace_id = %hex::encode(trace.trace_id), %request_id, %method, %route
    );
    let answered = next.call(request).instrument(span.clone()).await;
    let status = match &answered {
        Ok(response) => response.status(),
        Err(error) => error.as_response_error().status_code(),
    };
    let took = begun.elapsed();
    if let Some(metrics) = metrics {
        metrics.answered(&route, method.as_str(), status.as_u16(), took);
    }
    span.in_scope(|| {
        let ms = took.as_secs_f64() * 1e3;
        tracing::debug!(target: "lockstep::request", status = status.as_u16(), ms, "answered");
    });
    let mut response = answered?;
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    Ok(response)
}

/// The trace that a request belongs to, with an id of its own.
fn of(headers: &HeaderMap) -> Trace {
    let given = headers.get(TRACEPARENT).and_then(|value| parse(value.to_str().ok()?));
    Trace { trace_id: given.unwrap_or_else(random), request_id: random() }
}

/// The trace id of `00-TRACE-PARENT-FLAGS`; later versions may say more behind it.
fn parse(traceparent: &str) -> Option<[u8; 16]> {
    let mut parts = traceparent.trim().split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let lower = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let well_formed = [version, trace, parent, flags].into_iter().all(lower)
        && (version.len(), parent.len(), flags.len()) == (2, 16, 2)
        && version != "ff"
        && (version != "00" || parts.next().is_none());
    let mut id = [0; 16];
    hex::decode_to_slice(trace, &mut id).ok()?;
    (well_formed && id != [0; 16] && parent.bytes().any(|b| b != b'0')).then_some(id)
}

/// A number that is nobody else's; zeros, which name nothing, if the system has none to give.
fn random<const N: usize>() -> [u8; N] {
    let mut id = [0; N];
    if let Err(error) = getrandom::fill(&mut id) {
        tracing::warn!("no randomness for a request's id: {error}");
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_context_is_taken_over() {
        let id = parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!(hex::encode(id), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(parse("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-later"), Some(id));
    }

    #[test]
    fn what_is_no_trace_context_is_passed_over() {
        for text in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47-00f067aa0ba902b7-01",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}

//! Around every request: which are let in when there are no keys, and what a panic becomes.

use std::{net::IpAddr, panic::AssertUnwindSafe};

use actix_web::{
    Error,
    body::{BoxBody, MessageBody},
    dev::{ServiceRequest, ServiceResponse},
    http::header::{HOST, HeaderMap, ORIGIN},
    middleware::Next,
    web,
};
use futures::FutureExt;

use super::refusal::Refused;

/// How requests are checked.
pub struct Guard {
    /// Only loopback names in `Host` and `Origin`.
    pub loopback_only: bool,
}

/// Refuses a request that a foreign page may have made.
pub async fn check(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let guarded = request.app_data::<web::Data<Guard>>().is_none_or(|guard| guard.loopback_only);
    if guarded && let Err(problem) = loopback(request.headers()) {
        return Ok(request.into_response(Refused::forbidden("FOREIGN_REQUEST", problem).response()));
    }
    Ok(next.call(request).await?.map_into_boxed_body())
}

/// A handler that panics costs its own request. The other parts of the service end with a
/// panic, because they hold state; a request holds none.
pub async fn catch_panics(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let (method, path) = (request.method().clone(), request.path().to_owned());
    match AssertUnwindSafe(next.call(request)).catch_unwind().await {
        Ok(response) => Ok(response?.map_into_boxed_body()),
        Err(_) => {
            tracing::error!("a handler panicked at {method} {path}");
            Err(Refused::fault("a fault of the gateway; its log says more").into())
        }
    }
}

fn loopback(headers: &HeaderMap) -> Result<(), String> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("(not text)"));
    match text(HOST) {
        Some(host) if is_loopback(host) => {}
        host => return Err(format!("`Host: {}` is no loopback name", host.unwrap_or_default())),
    }
    match text(ORIGIN) {
        None => Ok(()),
        Some(origin) => match origin.split_once("://") {
            Some((_, authority)) if is_loopback(authority) => Ok(()),
            _ => Err(format!("`Origin: {origin}` is not this machine")),
        },
    }
}

/// Whether `host[:port]` names this machine.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_are_let_in() {
        for host in ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.1.2.3"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil", "[2001:db8::1]:80", ""] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}

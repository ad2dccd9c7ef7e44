//! HTTP: the only room that knows it. Parses once into `types/`, asks the coordinator, and
//! decides nothing about a run.
//!
//! ```text
//!   GET /health                  200 while the coordinator answers
//!   GET /v1/loops/capabilities   models, as the Loops dialect lists them
//! ```
//!
//! Without keys it serves loopback only, and only requests that name a loopback host and come
//! from no foreign page: a web page that the user visits must not reach the service through a
//! name that it has pointed at this machine (DNS rebinding).

mod guard;
mod loops;

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use actix_web::{App, HttpResponse, HttpServer, dev::Server, middleware::from_fn, web};
use serde_json::json;

use crate::client::ServiceClient;

/// Connections that wait to be accepted, and that are open at a time.
const BACKLOG: u32 = 1024;
const MAX_CONNECTIONS: usize = 4096;

/// Why HTTP can't be served.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Another process has the port, or the address is not ours.
    #[error("can't serve HTTP on {address}: {source}; choose another with --http HOST:PORT (port 0 is any)")]
    Bind { address: SocketAddr, source: io::Error },
    /// Everyone who reaches the address could use the service.
    #[error(
        "HTTP on {address} would be open to the network without keys; serve on 127.0.0.1, or say --insecure if \
         the network itself is trusted"
    )]
    Open { address: SocketAddr },
    /// The server ended.
    #[error("the HTTP server ended: {0}")]
    Serve(io::Error),
}

/// A bound socket that doesn't serve yet.
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    /// Requests are held to the loopback rules.
    loopback_only: bool,
}

impl Listener {
    /// Binds `address` (port 0: any). Refuses one that others reach, unless `insecure`.
    pub fn bind(address: SocketAddr, insecure: bool) -> Result<Self, GatewayError> {
        if !address.ip().is_loopback() && !insecure {
            return Err(GatewayError::Open { address });
        }
        let bind = |source| GatewayError::Bind { address, source };
        let socket = TcpListener::bind(address).map_err(bind)?;
        let bound = socket.local_addr().map_err(bind)?;
        Ok(Self { socket, address: bound, loopback_only: !insecure })
    }

    /// Where it is bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A server, to be awaited in a tokio runtime; it ends when it is dropped.
    pub fn serve(self, client: ServiceClient) -> Result<Server, GatewayError> {
        let client = web::Data::new(client);
        let guard = web::Data::new(guard::Guard { loopback_only: self.loopback_only });
        let server = HttpServer::new(move || {
            App::new()
                .app_data(client.clone())
                .app_data(guard.clone())
                .wrap(from_fn(guard::check))
                .route("/health", web::get().to(health))
                .configure(loops::routes)
                .default_service(web::to(not_found))
        })
        .workers(1)
        .backlog(BACKLOG)
        .max_connections(MAX_CONNECTIONS)
        // The supervisor has the signals: it drains the cluster behind this first.
        .disable_signals()
        .listen(self.socket)
        .map_err(|source| GatewayError::Bind { address: self.address, source })?;
        Ok(server.run())
    }
}

async fn health(client: web::Data<ServiceClient>) -> HttpResponse {
    match client.cluster_status().await {
        Ok(status) => HttpResponse::Ok().json(json!({
            "status": "ok",
            "nodes": status.nodes.len(),
            "runs": status.runs.len(),
        })),
        Err(error) => failure(502, "COORDINATOR_UNREACHABLE", &error.to_string()),
    }
}

async fn not_found(request: actix_web::HttpRequest) -> HttpResponse {
    failure(404, "UNKNOWN_ROUTE", &format!("nothing is served at {} {}", request.method(), request.path()))
}

/// The error body of the Loops dialect. On a final refusal (4xx) the header keeps its client
/// from retrying for an hour.
fn failure(status: u16, reason: &str, message: &str) -> HttpResponse {
    let status = actix_web::http::StatusCode::from_u16(status).expect("only constants are passed");
    let mut response = HttpResponse::build(status);
    if status.is_client_error() {
        response
            .insert_header(("X-Baseten-Error-Source", "06"))
            .insert_header(("X-Baseten-Error-Code", reason.to_ascii_lowercase()));
    }
    response.json(json!({ "error": message, "detail": message, "details": { "reason": reason } }))
}

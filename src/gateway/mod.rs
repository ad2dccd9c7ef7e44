//! HTTP: the only room that knows it. Parses once into `types/`, asks the coordinator, and
//! decides nothing about a run.
//!
//! ```text
//!   GET /health     200 while the coordinator answers
//!   GET /metrics    figures for Prometheus (`metrics`)
//!   /v1/loops/…     the Loops dialect (`loops`)
//! ```
//!
//! It keeps no state that anybody would miss: whatever it is asked, it asks the coordinator, and
//! while that is away it holds the request.
//!
//! With keys (`keys`), each of them has runs and checkpoints of its own. Without, it serves loopback only, and only requests that name a loopback host and come
//! from no foreign page: a web page that the user visits must not reach the service through a
//! name that it has pointed at this machine (DNS rebinding).

mod guard;
mod metrics;
mod refusal;
mod trace;

mod body;
mod caller;
mod download;
mod keys;
mod limits;
mod presign;
mod range;
mod replays;
mod upstream;

mod loops;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    time::Duration,
};

use actix_web::{App, HttpResponse, HttpServer, dev::Server, middleware::from_fn, web};
use serde_json::json;

use crate::{
    client::ServiceClient,
    transport::{HttpsIdentity, TransportError},
};

pub use keys::ApiKeys;
pub use limits::Limits;

use self::{
    body::Bodies, download::Downloads, metrics::Metrics, presign::PresignKey, refusal::Refused,
    replays::Replays, upstream::Upstream,
};

/// Connections that wait to be accepted, and that are open at a time: the Python client holds
/// up to 200 to a trainer and 2,048 to a sampler.
const BACKLOG: u32 = 1024;
const MAX_CONNECTIONS: usize = 8192;

/// TLS handshakes at a time, and how long one may take on a machine that computes.
const MAX_HANDSHAKES: usize = 1024;
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(30);

/// How long an idle connection stays open. The Python client keeps one for up to 120 s and
/// takes a closed one for an error.
const KEEP_ALIVE: Duration = Duration::from_secs(150);

/// How long the first request of a connection may take to come: a Python client that opens hundreds at once
/// needs many seconds to send on all of them, and takes a closed one for an error.
const HEAD_DEADLINE: Duration = Duration::from_secs(60);

/// How long the coordinator may take to answer a health check.
const HEALTH_DEADLINE: Duration = Duration::from_secs(8);

/// Why HTTP can't be served.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Another process has the port, or the address is not ours.
    #[error("can't serve HTTP on {address}: {source}; choose another with --http HOST:PORT (port 0 is any)")]
    Bind { address: SocketAddr, source: io::Error },
    /// Everyone who reaches the address could use the service.
    #[error(
        "HTTP on {address} would be open to the network without keys; give it --api-keys FILE, serve on 127.0.0.1, \
         or say --insecure if the network itself is trusted"
    )]
    Open { address: SocketAddr },
    /// It can't be read, or made.
    #[error("the key that file URLs are signed with ({file}): {source}")]
    PresignKey { file: String, source: io::Error },
    /// It says what every line should be.
    #[error("the key file {}: {problem}", .file.display())]
    Keys { file: PathBuf, problem: String },
    /// A file of the certificate that HTTPS is served with.
    #[error("HTTPS: {0}")]
    Https(#[from] TransportError),
    /// It can't be counted.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The server ended.
    #[error("the HTTP server ended: {0}")]
    Serve(io::Error),
}

/// How a gateway serves.
#[derive(Debug, Clone, Default)]
pub struct GatewayConfig {
    /// Serve without keys on an address that others reach.
    pub insecure: bool,
    /// Who may use it, each with runs of their own; absent: whoever reaches it.
    pub api_keys: Option<ApiKeys>,
    /// What all callers together may use where there are no keys; absent: what there is.
    pub limits: Option<Limits>,
    /// What HTTPS is served with; absent: plain HTTP.
    pub https: Option<HttpsIdentity>,
    /// Where clients reach it, `http://HOST[:PORT]`; absent: the host that each request names.
    pub public_url: Option<String>,
    /// File of the key that URLs of checkpoint files are signed with, made if it is missing;
    /// absent: a key that is gone with this process.
    pub presign_key: Option<PathBuf>,
}

/// A bound socket that doesn't serve yet.
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    config: GatewayConfig,
}

/// What all handlers share.
struct Gateway {
    /// Whatever it belongs to; handlers have their [`Caller`](caller::Caller)'s part of it.
    everything: Upstream,
    keys: Option<ApiKeys>,
    /// Of everybody, without keys.
    limits: Limits,
    bodies: Bodies,
    downloads: Downloads,
    replays: Replays,
    presign: PresignKey,
    public_url: Option<String>,
    /// Of the URLs under which it is called.
    scheme: &'static str,
    /// Held while a local run is looked for and made.
    creating: tokio::sync::Mutex<()>,
}

impl Listener {
    /// Binds `address` (port 0: any). Refuses one that others reach, unless `insecure`.
    pub fn bind(address: SocketAddr, config: GatewayConfig) -> Result<Self, GatewayError> {
        if !address.ip().is_loopback() && !config.insecure && config.api_keys.is_none() {
            return Err(GatewayError::Open { address });
        }
        let bind = |source| GatewayError::Bind { address, source };
        let socket = TcpListener::bind(address).map_err(bind)?;
        let bound = socket.local_addr().map_err(bind)?;
        Ok(Self { socket, address: bound, config })
    }

    /// Where it is bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Of the URLs under which it is called.
    pub fn scheme(&self) -> &'static str {
        if self.config.https.is_some() { "https" } else { "http" }
    }

    /// A server, to be awaited in a tokio runtime; it ends when it is dropped.
    pub fn serve(self, client: ServiceClient) -> Result<Server, GatewayError> {
        let loopback_only = !self.config.insecure && self.config.api_keys.is_none();
        let scheme = self.scheme();
        // Keys have their own.
        let limits = self.config.limits.filter(|_| self.config.api_keys.is_none()).unwrap_or(Limits::NONE);
        let gateway = web::Data::new(Gateway {
            scheme,
            everything: Upstream::new(client),
            keys: self.config.api_keys,
            bodies: Bodies::new(limits.body_bytes),
            limits,
            downloads: Downloads::default(),
            replays: Replays::default(),
            presign: presign_key(self.config.presign_key)?,
            public_url: self.config.public_url.map(|url| url.trim_end_matches('/').to_owned()),
            creating: tokio::sync::Mutex::new(()),
        });
        let guard = web::Data::new(guard::Guard { loopback_only });
        let metrics = web::Data::new(Metrics::new()?);
        let server = HttpServer::new(move || {
            App::new()
                .app_data(gateway.clone())
                .app_data(guard.clone())
                .app_data(metrics.clone())
                .app_data(web::QueryConfig::default().error_handler(|error, _| {
                    Refused::invalid(format!("the query of this URL: {error}")).into()
                }))
                .wrap(from_fn(guard::check))
                .wrap(from_fn(guard::catch_panics))
                // The last one is the outermost.
                .wrap(from_fn(trace::follow))
                .route("/health", web::get().to(health))
                .route("/metrics", web::get().to(metrics::metrics))
                .configure(loops::routes)
                .configure(|app| {
                    if loopback_only {
                        loops::local_routes(app);
                    }
                })
                .default_service(web::to(not_found))
        })
        .workers(1)
        .backlog(BACKLOG)
        .max_connections(MAX_CONNECTIONS)
        .keep_alive(KEEP_ALIVE)
        .client_request_timeout(HEAD_DEADLINE)
        .max_connection_rate(MAX_HANDSHAKES)
        .tls_handshake_timeout(HANDSHAKE_DEADLINE)
        // The supervisor has the signals: it drains the cluster behind this first.
        .disable_signals();
        let server = match self.config.https {
            None => server.listen(self.socket),
            Some(https) => server.listen_rustls_0_23(self.socket, https.into_config()),
        };
        let server = server.map_err(|source| GatewayError::Bind { address: self.address, source })?;
        Ok(server.run())
    }
}

fn presign_key(file: Option<PathBuf>) -> Result<PresignKey, GatewayError> {
    let key = file.as_deref().map_or_else(PresignKey::random, PresignKey::open_or_create);
    let file = || file.as_deref().map_or("in memory".to_owned(), |file| file.display().to_string());
    key.map_err(|source| GatewayError::PresignKey { file: file(), source })
}

async fn health(gateway: web::Data<Gateway>) -> Result<HttpResponse, Refused> {
    let status = gateway.everything.cluster(HEALTH_DEADLINE).await?;
    Ok(HttpResponse::Ok().json(json!({
        "status": "ok",
        "nodes": status.nodes.len(),
        "runs": status.runs.len(),
    })))
}

async fn not_found(request: actix_web::HttpRequest) -> HttpResponse {
    let message = format!("nothing is served at {} {}", request.method(), request.path());
    Refused::not_found(message).response()
}

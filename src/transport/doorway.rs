//! The one place that a process without a certificate reaches: QUIC on which only the server proves
//! who it is. A stranger gets one stream of a few kilobytes, for a few seconds.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use quinn::{IdleTimeout, TransportConfig};
use tokio::{
    sync::{Mutex, Semaphore, mpsc},
    task::AbortHandle,
    time::timeout,
};

use super::{Identity, Role, Stream, TransportError, ca, name, quic, tls};

/// From the first packet to the stream that a stranger opens.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Silence after which a stranger is gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Strangers at once; more are told to come again. A cluster that starts brings a few hundred, each
/// for two round trips.
const MAX_STRANGERS: usize = 256;

/// Handshakes at once from which an address must prove that it receives.
const UNVALIDATED: usize = 32;

/// Unread bytes of a stranger.
const WINDOW: u32 = 16 << 10;

/// Where strangers come in.
pub struct Doorway {
    endpoint: quinn::Endpoint,
    alpn: Vec<u8>,
    opened: Mutex<mpsc::Receiver<(Stream, SocketAddr)>>,
    acceptor: AbortHandle,
    local: SocketAddr,
}

impl Doorway {
    /// Binds a UDP socket (port 0: any), proving `identity` to whoever comes. Must be called inside
    /// a tokio runtime.
    pub fn bind(bind: SocketAddr, identity: &Identity, alpn: &[u8]) -> Result<Self, TransportError> {
        let server = server_config(identity, alpn)?;
        let failed = |source| quic::bind_error(bind, source);
        let endpoint = quinn::Endpoint::server(server, bind).map_err(failed)?;
        let local = endpoint.local_addr().map_err(failed)?;
        let (ready, opened) = mpsc::channel(MAX_STRANGERS);
        let acceptor = tokio::spawn(accept_all(endpoint.clone(), ready)).abort_handle();
        Ok(Self { endpoint, alpn: alpn.to_vec(), opened: Mutex::new(opened), acceptor, local })
    }

    /// Proves another identity to whoever comes from now on.
    pub fn present(&self, identity: &Identity) -> Result<(), TransportError> {
        self.endpoint.set_server_config(Some(server_config(identity, &self.alpn)?));
        Ok(())
    }

    /// Where strangers knock: `IP:PORT`.
    pub fn local_address(&self) -> String {
        self.local.to_string()
    }

    /// The next stream that a stranger opened, and where it came from; `None` once closed.
    pub async fn accept(&self) -> Option<(Stream, SocketAddr)> {
        self.opened.lock().await.recv().await
    }
}

impl Drop for Doorway {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.endpoint.close(0u8.into(), b"shutting down");
    }
}

/// Opens a stream to the coordinator of the cluster whose CA has this fingerprint (SHA-256,
/// hexadecimal), without a certificate of one's own.
pub async fn knock(
    address: &str,
    ca_fingerprint: &str,
    alpn: &[u8],
    deadline: Duration,
) -> Result<Stream, TransportError> {
    let knocking = async {
        let mut client = quinn::ClientConfig::new(Arc::new(tls::stranger_config(ca_fingerprint, alpn)?));
        client.transport_config(Arc::new(transport_config()));
        let to = quic::resolve(address, (Ipv6Addr::UNSPECIFIED, 0).into()).await?;
        let any: SocketAddr = match to.is_ipv4() {
            true => (Ipv4Addr::UNSPECIFIED, 0).into(),
            false => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let bind = |source| quic::bind_error(any, source);
        let socket = UdpSocket::bind(any).map_err(bind)?;
        let config = quinn::EndpointConfig::default();
        let endpoint = quinn::Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime));
        let endpoint = endpoint.map_err(bind)?;
        let server = name::role_dns_name(Role::Coordinator, ca::short_id(ca_fingerprint));
        let connecting = endpoint
            .connect_with(client, to, &server)
            .map_err(|e| TransportError::InvalidAddress { address: address.into(), reason: e.to_string() })?;
        let connection = connecting.await.map_err(|e| quic::connect_error(address, Role::Coordinator, e))?;
        connection.open_bi().await.map(quic::into_stream).map_err(quic::stream_error)
    };
    timeout(deadline, knocking)
        .await
        .unwrap_or_else(|_| Err(TransportError::ConnectTimeout { address: address.into(), deadline }))
}

fn server_config(identity: &Identity, alpn: &[u8]) -> Result<quinn::ServerConfig, TransportError> {
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls::doorway_config(identity, alpn)?));
    server.transport_config(Arc::new(transport_config()));
    Ok(server)
}

fn transport_config() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(1u8.into())
        .max_concurrent_uni_streams(0u8.into())
        .stream_receive_window(WINDOW.into())
        .receive_window(WINDOW.into())
        .send_window(WINDOW.into())
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(
            IdleTimeout::try_from(IDLE_TIMEOUT).expect("10 s fit a variable-length integer"),
        ));
    config
}

async fn accept_all(endpoint: quinn::Endpoint, ready: mpsc::Sender<(Stream, SocketAddr)>) {
    let slots = Arc::new(Semaphore::new(MAX_STRANGERS));
    while let Some(incoming) = endpoint.accept().await {
        let busy = MAX_STRANGERS - slots.available_permits() >= UNVALIDATED;
        let Some((incoming, slot)) = quic::take_slot(incoming, &slots, busy) else { continue };
        let ready = ready.clone();
        tokio::spawn(async move {
            let from = incoming.remote_address();
            let opened = async {
                let connection = incoming.await.map_err(quic::stream_error)?;
                connection.accept_bi().await.map(quic::into_stream).map_err(quic::stream_error)
            };
            match timeout(HANDSHAKE_DEADLINE, opened).await {
                // A full queue is a stranger's bad luck: it comes again.
                Ok(Ok(stream)) => drop(ready.try_send((stream, from))),
                Ok(Err(error)) => tracing::warn!(%from, %error, "a stranger at the doorway failed"),
                Err(_) => tracing::warn!(%from, "a stranger at the doorway said nothing"),
            }
            drop(slot);
        });
    }
}

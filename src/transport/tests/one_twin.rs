//! What only QUIC can refuse, and only memory can span.

use std::{sync::Arc, time::Duration};

use super::*;

/// A client of our own making, with what our endpoints never send.
struct Stranger {
    trusts: Identity,
    shows: Option<Identity>,
    alpn: &'static [u8],
}

impl Stranger {
    /// How its connection ends.
    async fn fate(self, server: &Endpoint) -> quinn::ConnectionError {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.trusts.cas()[0].clone()).unwrap();
        let config =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots);
        let mut config = match self.shows {
            Some(identity) => config
                .with_client_auth_cert(identity.chain().to_vec(), identity.key().clone_key().into())
                .unwrap(),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![self.alpn.to_vec()];
        let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
        let endpoint = quinn::Endpoint::client(loopback()).unwrap();
        let name = name::role_dns_name(Role::Coordinator, self.trusts.cluster());
        let address = server.local_address().parse().unwrap();
        let connecting =
            endpoint.connect_with(quinn::ClientConfig::new(Arc::new(config)), address, &name).unwrap();
        match connecting.await {
            // The server's verdict on a client certificate comes after the client's handshake.
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_and_cost_the_others_nothing() {
    let (world, elsewhere) = (World::new(Twin::Quic), World::new(Twin::Quic));
    let server = world.endpoint(Role::Coordinator, "main");
    let ours = || world.ca.issue(Role::Node, "a").unwrap();
    let theirs = elsewhere.ca.issue(Role::Node, "a").unwrap();
    let no_certificate = Stranger { trusts: ours(), shows: None, alpn: ALPN };
    let other_ca = Stranger { trusts: ours(), shows: Some(theirs), alpn: ALPN };
    let wrong_alpn = Stranger { trusts: ours(), shows: Some(ours()), alpn: b"lockstep-test/2" };
    // TLS alerts: certificate_required, unknown_ca or decrypt_error, no_application_protocol.
    for (stranger, alerts) in [(no_certificate, &[116u64][..]), (other_ca, &[48, 51]), (wrong_alpn, &[120])] {
        match stranger.fate(&server).await {
            quinn::ConnectionError::ConnectionClosed(close) => {
                let code = u64::from(close.error_code);
                assert!(alerts.iter().any(|alert| code == 0x100 + alert), "{close}");
            }
            other => panic!("{other:?}"),
        }
    }
    let client = world.endpoint(Role::Node, "a");
    let (_near, far) = connect(&client, &server, Role::Coordinator).await;
    assert_eq!(far.peer().name, "a", "only the welcome one was handed out");
}

#[tokio::test]
async fn connect_says_who_refused_whom() {
    let (world, elsewhere) = (World::new(Twin::Quic), World::new(Twin::Quic));
    let server = world.endpoint(Role::Coordinator, "main");
    let address = server.local_address();
    // We don't trust them.
    let foreigner = elsewhere.endpoint(Role::Node, "a");
    let error = foreigner.connect(&address, Role::Coordinator, PATIENCE).await.unwrap_err();
    assert!(matches!(error, TransportError::Untrusted { .. }), "{error:?}");
    // They don't speak our protocol.
    let newer =
        Endpoint::quic(loopback(), world.ca.issue(Role::Node, "a").unwrap(), b"lockstep-test/2").unwrap();
    let error = newer.connect(&address, Role::Coordinator, PATIENCE).await.unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains("another version of Lockstep's protocol"), "{error}");
    assert!(!error.is_retryable());
    // A client listens to nobody.
    let client = world.endpoint(Role::Client, "cli");
    let error = world
        .endpoint(Role::Node, "b")
        .connect(&client.local_address(), Role::Client, Duration::from_millis(200))
        .await
        .unwrap_err();
    assert!(matches!(error, TransportError::ConnectTimeout { .. }), "{error:?}");
}

#[test]
fn the_memory_twin_spans_runtimes() {
    let network = MemoryNetwork::default();
    let server = Endpoint::memory(&network, Role::Coordinator, "main").unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let thread = std::thread::spawn(move || {
        runtime().block_on(async {
            let connection = server.accept().await.unwrap();
            let mut stream = connection.accept_stream().await.unwrap();
            let blob = stream.recv.recv_bytes(5 << 20).await.unwrap();
            stream.send.send_frame(&blob.len().to_le_bytes()).await.unwrap();
            stream.send.finish().await.unwrap();
            connection.closed().await
        })
    });
    runtime().block_on(async {
        let client = Endpoint::memory(&network, Role::Node, "a").unwrap();
        let connection = client.connect("memory:main", Role::Coordinator, PATIENCE).await.unwrap();
        let mut stream = connection.open_stream().await.unwrap();
        stream.send.send_bytes(&vec![1; 5 << 20]).await.unwrap();
        assert_eq!(stream.recv.recv_frame(8).await.unwrap().unwrap(), (5usize << 20).to_le_bytes());
        assert_eq!(stream.recv.recv_frame(8).await.unwrap(), None);
        connection.close("done");
    });
    assert!(matches!(thread.join().unwrap(), TransportError::ClosedByPeer { .. }));
}

//! TLS 1.3 with certificates on both sides, from one CA. The crypto provider is passed explicitly:
//! a library has no business installing a process-wide one.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    RootCertStore,
    client::Resumption,
    crypto::CryptoProvider,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};

use super::{Identity, Peer, TransportError, name};

/// Presents `identity`, and trusts servers of its CA under the name that is asked for.
pub(super) fn client_config(identity: &Identity, alpn: &[u8]) -> Result<QuicClientConfig, TransportError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls_error)?
        .with_root_certificates(roots(identity.ca())?)
        .with_client_auth_cert(vec![identity.certificate().clone()], identity.key().clone_key().into())
        .map_err(tls_error)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    // Each handshake proves both identities anew; connections are few and long-lived.
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(|e| TransportError::Certificate(e.to_string()))
}

/// Presents `identity`, and takes only clients with a certificate of its CA.
pub(super) fn server_config(identity: &Identity, alpn: &[u8]) -> Result<QuicServerConfig, TransportError> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls_error)?
        .with_client_cert_verifier(client_verifier(identity.ca())?)
        .with_single_cert(vec![identity.certificate().clone()], identity.key().clone_key().into())
        .map_err(tls_error)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    QuicServerConfig::try_from(config).map_err(|e| TransportError::Certificate(e.to_string()))
}

/// Who a verified certificate of this cluster names.
pub(super) fn peer_of_certificate(
    certificate: &CertificateDer<'_>,
    cluster: &str,
) -> Result<Peer, TransportError> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|e| TransportError::Certificate(format!("unreadable: {e}")))?;
    parsed
        .valid_dns_names()
        .find_map(|dns_name| name::parse_process_dns_name(dns_name, cluster))
        .ok_or_else(|| TransportError::Certificate(format!("it names no process of cluster {cluster}")))
}

/// That `ca` signed `certificate`.
pub(super) fn check_issued(
    certificate: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
) -> Result<(), TransportError> {
    client_verifier(ca)?.verify_client_cert(certificate, &[], UnixTime::now()).map_err(tls_error)?;
    Ok(())
}

/// That `key` is the key of `certificate`.
pub(super) fn check_key(
    certificate: &CertificateDer<'static>,
    key: &PrivatePkcs8KeyDer<'static>,
) -> Result<(), TransportError> {
    CertifiedKey::from_der(vec![certificate.clone()], key.clone_key().into(), &provider())
        .map_err(tls_error)?;
    Ok(())
}

fn client_verifier(ca: &CertificateDer<'_>) -> Result<Arc<dyn ClientCertVerifier>, TransportError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider())
        .build()
        .map_err(|e| TransportError::Certificate(e.to_string()))
}

fn roots(ca: &CertificateDer<'_>) -> Result<RootCertStore, TransportError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned()).map_err(tls_error)?;
    Ok(roots)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn tls_error(error: rustls::Error) -> TransportError {
    TransportError::Certificate(error.to_string())
}

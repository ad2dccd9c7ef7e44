//! TLS 1.3 with certificates on both sides, from one CA. The crypto provider is passed explicitly:
//! a library has no business installing a process-wide one.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

use super::{Identity, Peer, TransportError, ca, name};

/// Presents `identity`, and trusts servers of its CA under the name that is asked for.
pub(super) fn client_config(identity: &Identity, alpn: &[u8]) -> Result<QuicClientConfig, TransportError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls_error)?
        .with_root_certificates(roots(identity.cas())?)
        .with_client_auth_cert(identity.chain().to_vec(), identity.key().clone_key().into())
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
        .with_client_cert_verifier(client_verifier(identity.cas())?)
        .with_single_cert(identity.chain().to_vec(), identity.key().clone_key().into())
        .map_err(tls_error)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    QuicServerConfig::try_from(config).map_err(|e| TransportError::Certificate(e.to_string()))
}

/// Presents `identity` with its CAs behind it, so that whoever knows the fingerprint of one can check
/// both, and asks for nothing.
pub(super) fn doorway_config(identity: &Identity, alpn: &[u8]) -> Result<QuicServerConfig, TransportError> {
    let chain = [identity.chain(), identity.cas()].concat();
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls_error)?
        .with_no_client_auth()
        .with_single_cert(chain, identity.key().clone_key().into())
        .map_err(tls_error)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    QuicServerConfig::try_from(config).map_err(|e| TransportError::Certificate(e.to_string()))
}

/// Presents nothing, and trusts servers of the CA with this fingerprint.
pub(super) fn stranger_config(ca_fingerprint: &str, alpn: &[u8]) -> Result<QuicClientConfig, TransportError> {
    let verifier = Arc::new(PinnedCa { fingerprint: ca_fingerprint.to_owned() });
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls_error)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(|e| TransportError::Certificate(e.to_string()))
}

/// Said where a token is of another CA.
const NOT_THE_PINNED_CA: &str = "its CA is not the one that the token names: the token is of another cluster, or older \
                                 than a change of the CA that is finished; `lockstep token create` makes one that fits";

/// Trusts what the CA of one fingerprint has signed; the CA itself comes with the server's chain.
#[derive(Debug)]
struct PinnedCa {
    fingerprint: String,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = intermediates.iter().find(|ca| ca::fingerprint(ca) == self.fingerprint);
        let ca = ca.ok_or_else(|| rustls::Error::General(NOT_THE_PINNED_CA.into()))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Who a verified certificate of this cluster names.
pub(super) fn peer_of_certificate(
    certificate: &CertificateDer<'_>,
    cluster: &str,
) -> Result<Peer, TransportError> {
    match subject_of_certificate(certificate)? {
        (peer, of) if of == cluster => Ok(peer),
        _ => Err(TransportError::Certificate(format!("it names no process of cluster {cluster}"))),
    }
}

/// Who a certificate names, and the cluster.
pub(super) fn subject_of_certificate(
    certificate: &CertificateDer<'_>,
) -> Result<(Peer, String), TransportError> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|e| TransportError::Certificate(format!("unreadable: {e}")))?;
    parsed
        .valid_dns_names()
        .find_map(name::parse_process_dns_name)
        .map(|(peer, cluster)| (peer, cluster.to_owned()))
        .ok_or_else(|| TransportError::Certificate("it names no process of a cluster".into()))
}

/// That one of these CAs signed `certificate`.
pub(super) fn check_issued(
    certificate: &CertificateDer<'_>,
    cas: &[CertificateDer<'static>],
) -> Result<(), TransportError> {
    client_verifier(cas)?.verify_client_cert(certificate, &[], UnixTime::now()).map_err(tls_error)?;
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

fn client_verifier(cas: &[CertificateDer<'static>]) -> Result<Arc<dyn ClientCertVerifier>, TransportError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(cas)?), provider())
        .build()
        .map_err(|e| TransportError::Certificate(e.to_string()))
}

fn roots(cas: &[CertificateDer<'static>]) -> Result<RootCertStore, TransportError> {
    let mut roots = RootCertStore::empty();
    cas.iter().try_for_each(|ca| roots.add(ca.clone())).map_err(tls_error)?;
    Ok(roots)
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Lets HTTPS clients that take their cryptography from the process, and not from us, find ours;
/// leaves what the program has chosen itself.
pub fn offer_crypto_provider() {
    // An error says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

pub(super) fn tls_error(error: rustls::Error) -> TransportError {
    TransportError::Certificate(error.to_string())
}

/// Which of `cas` signed a certificate, by its SHA-256; none did where a bridge leads to it.
pub(super) fn signer(certificate: &CertificateDer<'_>, cas: &[CertificateDer<'static>]) -> Option<[u8; 32]> {
    let signer = cas.chunks(1).find(|ca| check_issued(certificate, ca).is_ok())?;
    Some(ca::digest(&signer[0]))
}

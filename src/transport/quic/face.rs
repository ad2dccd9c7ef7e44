//! What an endpoint shows of itself and whom it takes, which both change while it is open.

use std::sync::{Arc, PoisonError, RwLock};

use rustls_pki_types::CertificateDer;

use super::{
    super::{
        Connection, Identity, Peer, Proof, Revocation, Role, TransportError, Validity, connection::Wire, tls,
    },
    CODE_CLOSED, CODE_SHUT_OUT, IDLE_TIMEOUT, Link, PEER_IDLE_TIMEOUT, transport_config,
};

/// What may change while the socket is open.
pub(super) struct Shared {
    pub cluster: String,
    pub face: RwLock<Face>,
    pub revoked: RwLock<Vec<Revocation>>,
}

/// What is shown to whom this end connects.
#[derive(Clone)]
pub(super) struct Face {
    pub identity: Identity,
    pub to_node: quinn::ClientConfig,
    pub to_others: quinn::ClientConfig,
}

impl Face {
    pub fn new(identity: Identity, alpn: &[u8]) -> Result<Self, TransportError> {
        let mut to_others = quinn::ClientConfig::new(Arc::new(tls::client_config(&identity, alpn)?));
        to_others.transport_config(Arc::new(transport_config(IDLE_TIMEOUT)));
        let mut to_node = to_others.clone();
        to_node.transport_config(Arc::new(transport_config(PEER_IDLE_TIMEOUT)));
        Ok(Self { identity, to_node, to_others })
    }
}

/// What is shown to whoever connects; nothing by a client.
pub(super) fn server_config(
    identity: &Identity,
    alpn: &[u8],
) -> Result<Option<quinn::ServerConfig>, TransportError> {
    if identity.role() == Role::Client {
        return Ok(None);
    }
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls::server_config(identity, alpn)?));
    server.transport_config(Arc::new(transport_config(IDLE_TIMEOUT)));
    Ok(Some(server))
}

impl Shared {
    pub fn face(&self) -> Face {
        self.face.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads who is at the other end; closes the connection if nobody may be who that is.
    pub fn admit(&self, connection: quinn::Connection) -> Result<Connection, TransportError> {
        let (peer, proof) = match self.peer_of(&connection) {
            Ok(known) => known,
            Err(error) => {
                connection.close(CODE_CLOSED.into(), error.to_string().as_bytes());
                return Err(error);
            }
        };
        let revoked = self.revoked.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(revocation) = revoked.iter().find(|revocation| revocation.concerns(&peer, &proof)) {
            let reason = revocation.to_string();
            connection.close(CODE_SHUT_OUT.into(), reason.as_bytes());
            return Err(TransportError::ShutOut { reason });
        }
        Ok(Connection::new(peer, Some(proof), Wire::Quic(Link(connection))))
    }

    /// Who the verified certificate names, and what else it says.
    fn peer_of(&self, connection: &quinn::Connection) -> Result<(Peer, Proof), TransportError> {
        let chain =
            connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let Some([certificate, ..]) = chain.as_deref().map(Vec::as_slice) else {
            return Err(TransportError::Certificate("the other end showed none".into()));
        };
        let peer = tls::peer_of_certificate(certificate, &self.cluster)?;
        let validity = Validity::of_certificate(certificate)?;
        Ok((peer, Proof { validity, ca: tls::signer(certificate, self.face().identity.cas()) }))
    }
}

use bincode::{Decode, Encode};

/// ALPN name of the doorway, where processes without a certificate come in.
pub const JOIN_ALPN: &[u8] = b"lockstep-join/2";

/// Largest message at the doorway: names, a key, four certificates.
pub const MAX_JOIN_MESSAGE: usize = 8 << 10;

/// A process asks for an identity.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct JoinRequest {
    pub protocol_version: u32,
    /// Which token, and what only its holders know.
    pub token: String,
    pub secret: [u8; 32],
    /// The name that the certificate shall prove.
    pub name: String,
    /// An uncompressed point on P-256.
    pub public_key: Vec<u8>,
}

/// The certificate that a process has now, by its own word. Times are in seconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct HeldCertificate {
    /// SHA-256 of the certificate of the CA that signed it.
    pub ca: [u8; 32],
    pub issued_at: u64,
    pub expires_at: u64,
}

/// What a process should trust.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TrustReply {
    /// CAs, in DER; the first signs. Whoever has others asks for a new certificate.
    pub cas: Vec<Vec<u8>>,
}

/// What it is told.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum JoinReply {
    /// In DER: the certificate, with what leads from it to a former CA; and the CAs to trust, of which the first
    /// has signed.
    Admitted { chain: Vec<Vec<u8>>, cas: Vec<Vec<u8>> },
    /// Why not, in a sentence.
    Refused { reason: String },
}

impl std::fmt::Debug for JoinRequest {
    /// Never shows the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JoinRequest({} as {:?})", self.token, self.name)
    }
}

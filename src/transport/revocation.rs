use std::fmt;

use super::{Peer, Role, Validity};

/// What a peer's certificate says beside who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    pub validity: Validity,
    /// SHA-256 of the certificate of the CA that signed it; absent: one that this end knows only through
    /// another's word.
    pub ca: Option<[u8; 32]>,
}

/// Certificates of one process that are good no more. Later ones, after a new token, are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    pub role: Role,
    pub name: String,
    /// Those issued up to then, in seconds since the Unix epoch.
    pub upto: u64,
}

impl Revocation {
    /// Whether it is this peer's certificate.
    pub fn concerns(&self, peer: &Peer, proof: &Proof) -> bool {
        (self.role, &self.name) == (peer.role, &peer.name) && proof.validity.issued_at <= self.upto
    }
}

/// As its owner is told.
impl fmt::Display for Revocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { role, name, .. } = self;
        write!(
            f,
            "the certificate of {role} {name} was revoked; it needs a new token and no `identity/{name}.*`"
        )
    }
}

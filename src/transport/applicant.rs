//! A process that asks for an identity: its key never leaves it.

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::{Identity, TransportError, ca};

/// An uncompressed point on P-256 (SEC 1, 2.3.3): 4, then two coordinates of 32 bytes.
const POINT: (u8, usize) = (4, 65);

/// A key whose owner has no certificate for it yet.
pub struct Applicant(KeyPair);

/// What an applicant shows of its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(Vec<u8>);

/// What it gets, in DER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// The certificate, then what leads from it to a former CA.
    pub chain: Vec<Vec<u8>>,
    /// CAs to trust; the first has signed.
    pub cas: Vec<Vec<u8>>,
}

impl Applicant {
    /// A fresh key.
    pub fn new() -> Result<Self, TransportError> {
        KeyPair::generate().map(Self).map_err(|e| TransportError::Certificate(e.to_string()))
    }

    /// What goes to the CA.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(self.0.der_bytes().to_vec())
    }

    /// The identity, once certificate and CAs are there. Refuses a certificate of another key, and CAs without
    /// the promised one (SHA-256, hexadecimal).
    pub fn admitted(self, admission: Admission, ca_fingerprint: &str) -> Result<Identity, TransportError> {
        let (key, chain, cas) = self.parts(admission);
        if !cas.iter().any(|ca| ca::fingerprint(ca) == ca_fingerprint) {
            return Err(TransportError::Certificate("it is of another cluster than was asked".into()));
        }
        Identity::new(chain, key, cas)
    }

    /// Key, chain and CAs.
    pub(super) fn parts(
        self,
        admission: Admission,
    ) -> (PrivatePkcs8KeyDer<'static>, Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>) {
        let certificates = |der: Vec<Vec<u8>>| der.into_iter().map(CertificateDer::from).collect();
        (self.0.into(), certificates(admission.chain), certificates(admission.cas))
    }
}

impl PublicKey {
    /// Reads what [`PublicKey::bytes`] wrote. That the point is on the curve is seen when its owner
    /// first signs.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == POINT.1 && bytes[0] == POINT.0).then(|| Self(bytes.to_vec()))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{CERTIFICATE_LIFE, ClusterCa, Role, Validity, unix_now},
        *,
    };

    #[test]
    fn an_applicant_is_admitted_under_its_own_key_and_the_promised_ca_alone() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (ca, other) =
            (ClusterCa::open_or_create(a.path()).unwrap(), ClusterCa::open_or_create(b.path()).unwrap());
        let validity = Validity::lasting(unix_now(), CERTIFICATE_LIFE);
        let admit =
            |ca: &ClusterCa, key: &PublicKey| ca.admit(Role::Node, "far-away", key, validity).unwrap();

        let applicant = Applicant::new().unwrap();
        let key = PublicKey::from_bytes(applicant.public_key().bytes()).unwrap();
        let identity = applicant.admitted(admit(&ca, &key), &ca.fingerprint()).unwrap();
        assert_eq!((identity.role(), identity.name()), (Role::Node, "far-away"));

        let applicant = Applicant::new().unwrap();
        let strange = admit(&other, &applicant.public_key());
        assert!(applicant.admitted(strange, &ca.fingerprint()).is_err(), "another cluster's CA");

        let stolen = admit(&ca, &key);
        assert!(Applicant::new().unwrap().admitted(stolen, &ca.fingerprint()).is_err(), "another's key");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for bytes in [&[][..], &[4; 64], &[4; 66], &[3; 65]] {
            assert_eq!(PublicKey::from_bytes(bytes), None);
        }
    }
}

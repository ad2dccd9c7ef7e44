use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};

use super::{Admission, Identity, PublicKey, Role, TransportError, files, name};

/// The certificate authority of a cluster, in `DIR/ca` (mode 0600): made at first start.
///
/// Whoever holds its key can be anyone in the cluster. Losing it means new certificates for every
/// process, so a damaged one is an error, never silently replaced.
pub struct ClusterCa {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// The CA's subject: names nothing, since a cluster is known by its fingerprint.
const CA_COMMON_NAME: &str = "Lockstep cluster CA";

impl ClusterCa {
    /// Opens or makes the CA of a data directory.
    pub fn open_or_create(directory: &Path) -> Result<Self, TransportError> {
        let home = directory.join("ca");
        if !home.exists() {
            create(directory, &home)?;
        }
        open(&home)
    }

    /// Issues an identity: a fresh key and a certificate that proves `role` and `name`.
    pub fn issue(&self, role: Role, name: &str) -> Result<Identity, TransportError> {
        let key = KeyPair::generate().map_err(certificate_error)?;
        let certificate = self.certify(role, name, &key)?;
        Identity::new(certificate, key.into(), self.certificate.clone())
    }

    /// Issues a certificate for a key that its owner keeps to itself.
    pub fn admit(&self, role: Role, name: &str, key: &PublicKey) -> Result<Admission, TransportError> {
        let certificate = self.certify(role, name, key)?;
        Ok(Admission { certificate: certificate.to_vec(), ca: self.certificate.to_vec() })
    }

    fn certify(
        &self,
        role: Role,
        name: &str,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, TransportError> {
        name::check_name(name)?;
        let cluster = cluster_id(&self.certificate);
        let names = vec![name::process_dns_name(role, name, &cluster), name::role_dns_name(role, &cluster)];
        let mut params = CertificateParams::new(names).map_err(certificate_error)?;
        params.distinguished_name = common_name(&format!("{role} {name}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A node answers the coordinator and calls it: each process is client and server.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params);
        let certificate = params.signed_by(key, &self.issuer).map_err(certificate_error)?;
        Ok(certificate.der().clone())
    }

    /// SHA-256 of the CA certificate, hexadecimal.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.certificate)
    }
}

/// SHA-256 of a certificate, hexadecimal.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hex::encode(Sha256::digest(certificate))
}

/// Short name of the cluster whose CA this is: 64 bits of its fingerprint, enough to tell clusters
/// apart by name. Trust comes from the signature.
pub(super) fn cluster_id(ca: &CertificateDer<'_>) -> String {
    short_id(&fingerprint(ca)).to_owned()
}

/// The same of a CA's fingerprint (or of all of a shorter text, which names no cluster).
pub(super) fn short_id(fingerprint: &str) -> &str {
    fingerprint.get(..16).unwrap_or(fingerprint)
}

/// Builds the CA beside its place and renames it in: a reader, and a second coordinator that
/// starts at the same time, sees a whole one or none.
fn create(directory: &Path, home: &Path) -> Result<(), TransportError> {
    let key = KeyPair::generate().map_err(certificate_error)?;
    let certificate = ca_params().self_signed(&key).map_err(certificate_error)?;

    let building = directory.join(format!("ca.tmp-{}", std::process::id()));
    let at = |source| TransportError::File { path: building.clone(), source };
    fs::create_dir_all(directory).map_err(at)?;
    match fs::remove_dir_all(&building) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(e)),
        _ => {}
    }
    DirBuilder::new().mode(0o700).create(&building).map_err(at)?;
    files::write_private(&key_path(&building), &key.serialize_pem())?;
    files::write_private(&certificate_path(&building), &certificate.pem())?;
    files::sync_directory(&building)?;
    match fs::rename(&building, home) {
        Ok(()) => files::sync_directory(directory),
        // Somebody else was faster: theirs is the cluster's.
        Err(_) if home.exists() => fs::remove_dir_all(&building).map_err(at),
        Err(source) => Err(TransportError::File { path: home.into(), source }),
    }
}

fn open(home: &Path) -> Result<ClusterCa, TransportError> {
    let certificate = files::read_certificate(&certificate_path(home))?;
    let key_file = key_path(home);
    let key: PrivatePkcs8KeyDer<'_> = files::read_key(&key_file)?;
    let key = KeyPair::try_from(&key).map_err(|e| files::damaged(&key_file, e.to_string()))?;
    let anchor = webpki::anchor_from_trusted_cert(&certificate)
        .map_err(|e| files::damaged(&certificate_path(home), e.to_string()))?;
    // The anchor holds the inside of the SEQUENCE that the key writes whole.
    if !key.subject_public_key_info().ends_with(&anchor.subject_public_key_info) {
        return Err(files::damaged(&key_file, "it is not the key of the certificate beside it"));
    }
    Ok(ClusterCa { issuer: Issuer::new(ca_params(), key), certificate })
}

fn key_path(home: &Path) -> PathBuf {
    home.join("ca.key")
}

fn certificate_path(home: &Path) -> PathBuf {
    home.join("ca.crt")
}

/// The same at each start: what an issuer writes into a certificate must match what the CA's own
/// certificate says.
fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(CA_COMMON_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params);
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Nothing here renews certificates, and the machines of a cluster may disagree on the time: valid
/// long before and long after. A process is shut out by replacing the CA.
fn set_validity(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2120, 1, 1);
}

fn certificate_error(error: rcgen::Error) -> TransportError {
    TransportError::Certificate(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_ca_is_made_once_and_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let first = ClusterCa::open_or_create(directory.path()).unwrap();
        let second = ClusterCa::open_or_create(directory.path()).unwrap();
        assert_eq!(first.fingerprint(), second.fingerprint());
        assert_eq!(first.fingerprint().len(), 64);
        for file in ["ca", "ca/ca.key", "ca/ca.crt"] {
            let mode = fs::metadata(directory.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{file} has mode {mode:o}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary is left");
        // What the reopened CA issues is trusted by the certificate of the first.
        second.issue(Role::Node, "a").unwrap();
    }

    #[test]
    fn starts_at_the_same_time_agree_on_one_ca() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path().join("ca");
        let first = ClusterCa::open_or_create(directory.path()).unwrap();
        // A second process found no CA, and loses the race for the rename.
        create(directory.path(), &home).unwrap();
        assert_eq!(open(&home).unwrap().fingerprint(), first.fingerprint());
    }

    #[test]
    fn a_damaged_or_missing_file_is_named() {
        for (file, contents) in [("ca.key", Some("nonsense")), ("ca.crt", Some("nonsense")), ("ca.key", None)]
        {
            let directory = tempfile::tempdir().unwrap();
            ClusterCa::open_or_create(directory.path()).unwrap();
            let path = directory.path().join("ca").join(file);
            match contents {
                Some(contents) => fs::write(&path, contents).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let error = ClusterCa::open_or_create(directory.path()).err().unwrap();
            assert!(error.to_string().contains(file), "{error}");
            assert!(!error.is_retryable());
        }
    }

    #[test]
    fn the_key_of_another_ca_is_noticed() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for directory in [&a, &b] {
            ClusterCa::open_or_create(directory.path()).unwrap();
        }
        fs::copy(b.path().join("ca/ca.key"), a.path().join("ca/ca.key")).unwrap();
        let error = ClusterCa::open_or_create(a.path()).err().unwrap();
        assert!(matches!(error, TransportError::Damaged { .. }), "{error}");
    }
}

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::{Peer, Role, TransportError, ca, files, tls};

/// A certificate, its key and the CA it trusts.
#[derive(Clone)]
pub struct Identity(Arc<Parts>);

struct Parts {
    me: Peer,
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    ca: CertificateDer<'static>,
    cluster: String,
}

impl Identity {
    /// Puts the parts together; refuses those that do not belong together.
    pub(super) fn new(
        certificate: CertificateDer<'static>,
        key: PrivatePkcs8KeyDer<'static>,
        ca: CertificateDer<'static>,
    ) -> Result<Self, TransportError> {
        let cluster = ca::cluster_id(&ca);
        tls::check_issued(&certificate, &ca)?;
        tls::check_key(&certificate, &key)?;
        let me = tls::peer_of_certificate(&certificate, &cluster)?;
        Ok(Self(Arc::new(Parts { me, certificate, key, ca, cluster })))
    }

    /// Writes certificate, key and CA under `directory/<name>.*`, key mode 0600.
    pub fn save(&self, directory: &Path, name: &str) -> Result<(), TransportError> {
        let at = Paths::new(directory, name);
        std::fs::create_dir_all(directory)
            .map_err(|source| TransportError::File { path: directory.into(), source })?;
        // A crash between two of them leaves parts that do not fit, which `load` says.
        files::write_private(&at.key, &pem("PRIVATE KEY", self.0.key.secret_pkcs8_der()))?;
        files::write_private(&at.ca, &pem("CERTIFICATE", &self.0.ca))?;
        files::write_private(&at.certificate, &pem("CERTIFICATE", &self.0.certificate))?;
        files::sync_directory(directory)
    }

    /// Reads what [`Identity::save`] wrote.
    pub fn load(directory: &Path, name: &str) -> Result<Self, TransportError> {
        let at = Paths::new(directory, name);
        let (certificate, ca) = (files::read_certificate(&at.certificate)?, files::read_certificate(&at.ca)?);
        Self::new(certificate, files::read_key(&at.key)?, ca)
            .map_err(|e| files::damaged(&at.certificate, e.to_string()))
    }

    /// The role that the certificate proves.
    pub fn role(&self) -> Role {
        self.0.me.role
    }

    /// The name that the certificate proves.
    pub fn name(&self) -> &str {
        &self.0.me.name
    }

    /// SHA-256 of the certificate of the CA that it trusts, hexadecimal.
    pub fn ca_fingerprint(&self) -> String {
        ca::fingerprint(&self.0.ca)
    }

    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.0.certificate
    }

    pub(super) fn key(&self) -> &PrivatePkcs8KeyDer<'static> {
        &self.0.key
    }

    pub(super) fn ca(&self) -> &CertificateDer<'static> {
        &self.0.ca
    }

    pub(super) fn cluster(&self) -> &str {
        &self.0.cluster
    }
}

impl fmt::Debug for Identity {
    /// Never shows the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} of cluster {})", self.0.me, self.0.cluster)
    }
}

struct Paths {
    certificate: PathBuf,
    key: PathBuf,
    ca: PathBuf,
}

impl Paths {
    fn new(directory: &Path, name: &str) -> Self {
        let file = |kind| directory.join(format!("{name}.{kind}"));
        Self { certificate: file("crt"), key: file("key"), ca: file("ca.crt") }
    }
}

/// RFC 7468: base64 in lines of 64 characters between two markers.
fn pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let body = STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII: every index is a boundary.
        let (line, tail) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::{super::ClusterCa, *};

    #[test]
    fn an_identity_reads_back_and_its_key_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let ca = ClusterCa::open_or_create(directory.path()).unwrap();
        let made = ca.issue(Role::Gateway, "front-1").unwrap();
        made.save(directory.path(), "gateway").unwrap();
        let read = Identity::load(directory.path(), "gateway").unwrap();
        assert_eq!((read.role(), read.name()), (Role::Gateway, "front-1"));
        assert_eq!(read.certificate(), made.certificate());
        assert_eq!(read.ca_fingerprint(), ca.fingerprint());
        let mode = fs::metadata(directory.path().join("gateway.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!format!("{read:?}").contains("PRIVATE"));
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let ca = ClusterCa::open_or_create(directory.path()).unwrap();
        let stranger = ClusterCa::open_or_create(other.path()).unwrap();
        for (role, name) in [(Role::Node, "a"), (Role::Node, "b")] {
            ca.issue(role, name).unwrap().save(directory.path(), name).unwrap();
        }
        stranger.issue(Role::Node, "a").unwrap().save(other.path(), "a").unwrap();
        for (from, file) in [
            (directory.path().join("b.key"), "a.key"),
            (other.path().join("a.ca.crt"), "a.ca.crt"),
            (other.path().join("a.crt"), "a.crt"),
        ] {
            let kept = fs::read(directory.path().join(file)).unwrap();
            fs::copy(from, directory.path().join(file)).unwrap();
            let error = Identity::load(directory.path(), "a").err().unwrap();
            assert!(matches!(error, TransportError::Damaged { .. }), "{file}: {error}");
            fs::write(directory.path().join(file), kept).unwrap();
        }
        Identity::load(directory.path(), "a").unwrap();
        let missing = Identity::load(directory.path(), "c").err().unwrap();
        assert!(matches!(missing, TransportError::File { .. }), "{missing}");
    }
}

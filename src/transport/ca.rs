use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder},
    io, iter,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};

use super::{
    Admission, CERTIFICATE_LIFE, Identity, PublicKey, Role, TransportError, Validity, files, name, unix_now,
    validity::CLOCKS_APART,
};

/// The certificate authority of a cluster, in `DIR/ca` (mode 0700): made at first start.
///
/// ```text
///   ca.key, ca.crt    signs
///   cluster           the cluster's name, which no new CA changes; absent: that of the first CA
///   former.crt        while the CA is being changed: the one before, whose key is gone
///   bridge.crt        and its word for ca.crt: whoever knows only the former CA trusts what this one signs
/// ```
///
/// Whoever holds its key can be anyone in the cluster. Losing it means new certificates for every
/// process, so a damaged one is an error, never silently replaced.
pub struct ClusterCa {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate, then that of the former CA while that is trusted.
    cas: Vec<CertificateDer<'static>>,
    bridge: Option<CertificateDer<'static>>,
    cluster: String,
}

/// The CA's subject: names nothing, since a cluster is known by its fingerprint.
const CA_COMMON_NAME: &str = "Lockstep cluster CA";

/// How long a CA is good. Nothing renews it but `rotate`.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

impl ClusterCa {
    /// Opens or makes the CA of a data directory.
    pub fn open_or_create(directory: &Path) -> Result<Self, TransportError> {
        let (home, put_aside) = (directory.join("ca"), directory.join(PUT_ASIDE));
        if !home.exists() && put_aside.exists() {
            // A change of the CA ended between its two renames. A second process may do the same.
            let _ = fs::rename(&put_aside, &home);
        }
        if !home.exists() {
            create(directory, &home)?;
        }
        open(&home)
    }

    /// Makes a new CA beside the one of a data directory, which is trusted on until [`finish`](Self::finish) and
    /// signs nothing more. Whole or not at all.
    pub fn rotate(directory: &Path) -> Result<Self, TransportError> {
        let former = Self::open_or_create(directory)?;
        if former.is_rotating() {
            return Err(TransportError::Certificate(
                "a change of the CA is under way; finish it first".into(),
            ));
        }
        let key = KeyPair::generate().map_err(certificate_error)?;
        let certificate = ca_params(ROOT_PATH).self_signed(&key).map_err(certificate_error)?;
        let bridge = ca_params(BRIDGE_PATH).signed_by(&key, &former.issuer).map_err(certificate_error)?;
        let building = build(directory, &key, &certificate.pem())?;
        files::write_private(&building.join(FORMER), &files::pem_certificates(&former.cas))?;
        files::write_private(&building.join(BRIDGE), &bridge.pem())?;
        files::write_private(&building.join(CLUSTER), &former.cluster)?;
        files::sync_directory(&building)?;

        let (home, put_aside) = (directory.join("ca"), directory.join(PUT_ASIDE));
        let at = |source| TransportError::File { path: home.clone(), source };
        remove_if_there(&put_aside)?;
        fs::rename(&home, &put_aside).map_err(at)?;
        fs::rename(&building, &home).map_err(at)?;
        files::sync_directory(directory)?;
        // With the former key: from here on nobody can be made with it.
        remove_if_there(&put_aside)?;
        open(&home)
    }

    /// Ends the trust in the former CA, if there is one.
    pub fn finish(directory: &Path) -> Result<Self, TransportError> {
        let home = directory.join("ca");
        // In this order: without the former one a bridge says nothing.
        for file in [FORMER, BRIDGE] {
            remove_if_there(&home.join(file))?;
        }
        files::sync_directory(&home)?;
        Self::open_or_create(directory)
    }

    /// Whether a former CA is still trusted.
    pub fn is_rotating(&self) -> bool {
        self.cas.len() > 1
    }

    /// Issues an identity of the usual life: a fresh key and a certificate that proves `role` and `name`.
    pub fn issue(&self, role: Role, name: &str) -> Result<Identity, TransportError> {
        self.issue_for(role, name, Validity::lasting(unix_now(), CERTIFICATE_LIFE))
    }

    /// The same of another life.
    pub fn issue_for(&self, role: Role, name: &str, validity: Validity) -> Result<Identity, TransportError> {
        let key = KeyPair::generate().map_err(certificate_error)?;
        let certificate = self.certify(role, name, &key, validity)?;
        Identity::new(self.chain(certificate), key.into(), self.cas.clone())
    }

    /// Issues a certificate for a key that its owner keeps to itself.
    pub fn admit(
        &self,
        role: Role,
        name: &str,
        key: &PublicKey,
        validity: Validity,
    ) -> Result<Admission, TransportError> {
        let der = |certificates: &[CertificateDer<'_>]| certificates.iter().map(|c| c.to_vec()).collect();
        let certificate = self.certify(role, name, key, validity)?;
        Ok(Admission { chain: der(&self.chain(certificate)), cas: der(&self.cas) })
    }

    /// What its owner shows: the certificate, and what makes those trust it who know only the former CA.
    fn chain(&self, certificate: CertificateDer<'static>) -> Vec<CertificateDer<'static>> {
        iter::once(certificate).chain(self.bridge.clone()).collect()
    }

    fn certify(
        &self,
        role: Role,
        name: &str,
        key: &impl PublicKeyData,
        validity: Validity,
    ) -> Result<CertificateDer<'static>, TransportError> {
        name::check_name(name)?;
        let mut names = vec![name::process_dns_name(role, name, &self.cluster)];
        // Whoever comes with a token asks under the name of the CA that the token pins.
        let ids = iter::once(self.cluster.clone()).chain(self.cas.iter().map(cluster_id));
        names.extend(ids.collect::<BTreeSet<_>>().iter().map(|id| name::role_dns_name(role, id)));
        let mut params = CertificateParams::new(names).map_err(certificate_error)?;
        params.distinguished_name = common_name(&format!("{role} {name}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A node answers the coordinator and calls it: each process is client and server.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, validity);
        let certificate = params.signed_by(key, &self.issuer).map_err(certificate_error)?;
        Ok(certificate.der().clone())
    }

    /// The cluster's name, whichever CA it has.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// SHA-256 of the CA certificate, hexadecimal.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.cas[0])
    }

    /// The CAs that are trusted, in DER; the first signs.
    pub fn certificates(&self) -> Vec<Vec<u8>> {
        self.cas.iter().map(|ca| ca.to_vec()).collect()
    }

    /// Until when the CA itself is good.
    pub fn expires_at(&self) -> Result<u64, TransportError> {
        Ok(Validity::of_certificate(&self.cas[0])?.expires_at)
    }
}

/// SHA-256 of a certificate, hexadecimal.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hex::encode(digest(certificate))
}

/// The same as bytes.
pub(super) fn digest(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate).into()
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

const FORMER: &str = "former.crt";
const BRIDGE: &str = "bridge.crt";
const CLUSTER: &str = "cluster";

/// Where the former CA stands for the moment between two renames.
const PUT_ASIDE: &str = "ca.former";

/// CAs that may stand between a CA and a certificate: its bridge to the next one, and none behind that.
const ROOT_PATH: u8 = 1;
const BRIDGE_PATH: u8 = 0;

/// Builds the CA beside its place and renames it in: a reader, and a second coordinator that
/// starts at the same time, sees a whole one or none.
fn create(directory: &Path, home: &Path) -> Result<(), TransportError> {
    let key = KeyPair::generate().map_err(certificate_error)?;
    let certificate = ca_params(ROOT_PATH).self_signed(&key).map_err(certificate_error)?;
    let building = build(directory, &key, &certificate.pem())?;
    files::sync_directory(&building)?;
    match fs::rename(&building, home) {
        Ok(()) => files::sync_directory(directory),
        // Somebody else was faster: theirs is the cluster's.
        Err(_) if home.exists() => remove_if_there(&building),
        Err(source) => Err(TransportError::File { path: home.into(), source }),
    }
}

/// A directory beside the CA's place with a key and its certificate.
fn build(directory: &Path, key: &KeyPair, certificate: &str) -> Result<PathBuf, TransportError> {
    let building = directory.join(format!("ca.tmp-{}", std::process::id()));
    let at = |source| TransportError::File { path: building.clone(), source };
    fs::create_dir_all(directory).map_err(at)?;
    remove_if_there(&building)?;
    DirBuilder::new().mode(0o700).create(&building).map_err(at)?;
    files::write_private(&key_path(&building), &key.serialize_pem())?;
    files::write_private(&certificate_path(&building), certificate)?;
    Ok(building)
}

/// A file, or a directory and what is in it.
fn remove_if_there(path: &Path) -> Result<(), TransportError> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(TransportError::File { path: path.into(), source: e })
        }
        _ => Ok(()),
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
    let cluster = match fs::read_to_string(home.join(CLUSTER)) {
        Ok(cluster) => cluster.trim().to_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => cluster_id(&certificate),
        Err(source) => return Err(TransportError::File { path: home.join(CLUSTER), source }),
    };
    let (mut cas, mut bridge) = (vec![certificate], None);
    if home.join(FORMER).exists() {
        cas.push(files::read_certificate(&home.join(FORMER))?);
        bridge = Some(files::read_certificate(&home.join(BRIDGE))?);
    }
    Ok(ClusterCa { issuer: Issuer::new(ca_params(ROOT_PATH), key), cas, bridge, cluster })
}

fn key_path(home: &Path) -> PathBuf {
    home.join("ca.key")
}

fn certificate_path(home: &Path) -> PathBuf {
    home.join("ca.crt")
}

/// What an issuer writes into a certificate must match what the CA's own certificate says: its name is always
/// the same.
fn ca_params(path: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(CA_COMMON_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, Validity::lasting(unix_now(), CA_LIFE));
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_validity(params: &mut CertificateParams, validity: Validity) {
    let at = |seconds| date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
    params.not_before = at(validity.issued_at.saturating_sub(CLOCKS_APART));
    params.not_after = at(validity.expires_at);
}

fn certificate_error(error: rcgen::Error) -> TransportError {
    TransportError::Certificate(error.to_string())
}

#[cfg(test)]
mod tests;

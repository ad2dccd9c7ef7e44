use std::{
    fmt,
    fs::{self, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};

use super::{Admission, Applicant, Peer, Role, TransportError, Validity, ca, files, tls, unix_now};

/// A certificate, its key and the CAs it trusts.
#[derive(Clone)]
pub struct Identity(Arc<Parts>);

struct Parts {
    me: Peer,
    /// The certificate, then what leads from it to a former CA.
    chain: Vec<CertificateDer<'static>>,
    key: PrivatePkcs8KeyDer<'static>,
    /// The first has signed the certificate.
    cas: Vec<CertificateDer<'static>>,
    cluster: String,
    validity: Validity,
    lineage: Lineage,
    /// Directory and name that it was loaded from.
    home: Option<(PathBuf, String)>,
}

/// A secret that a process keeps when its key changes.
type Lineage = [u8; 32];

impl Identity {
    /// Puts the parts together; refuses those that do not belong together, and what has expired.
    pub(super) fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
        cas: Vec<CertificateDer<'static>>,
    ) -> Result<Self, TransportError> {
        let lineage = derived("lockstep lineage", key.secret_pkcs8_der());
        Self::of_lineage(chain, key, cas, lineage)
    }

    fn of_lineage(
        chain: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
        cas: Vec<CertificateDer<'static>>,
        lineage: Lineage,
    ) -> Result<Self, TransportError> {
        let certificate = chain.first().ok_or_else(|| TransportError::Certificate("there is none".into()))?;
        let (me, cluster) = tls::subject_of_certificate(certificate)?;
        let (validity, now) = (Validity::of_certificate(certificate)?, unix_now());
        if validity.is_over(now) {
            let seconds = now - validity.expires_at;
            return Err(TransportError::Expired { who: me.to_string(), ago: ago(seconds) });
        }
        tls::check_issued(certificate, cas.get(..1).unwrap_or_default())?;
        tls::check_key(certificate, &key)?;
        Ok(Self(Arc::new(Parts { me, chain, key, cas, cluster, validity, lineage, home: None })))
    }

    /// What becomes of this one with a new key and certificate. Refuses those of another name, role or cluster.
    pub fn renewed(&self, applicant: Applicant, admission: Admission) -> Result<Self, TransportError> {
        let (key, chain, cas) = applicant.parts(admission);
        let next = Self::of_lineage(chain, key, cas, self.0.lineage)?.at(self.0.home.clone());
        if (&next.0.me, &next.0.cluster) != (&self.0.me, &self.0.cluster) {
            return Err(TransportError::Certificate(format!("it is {}'s, not {}'s", next.0.me, self.0.me)));
        }
        Ok(next)
    }

    /// The same with the secrets of the one before it.
    pub fn succeeding(self, former: &Self) -> Self {
        Self(Arc::new(Parts { lineage: former.0.lineage, ..self.0.copied() }))
    }

    fn at(self, home: Option<(PathBuf, String)>) -> Self {
        Self(Arc::new(Parts { home, ..self.0.copied() }))
    }

    /// Where it was loaded from, and its successor belongs: a directory and a name.
    pub fn home(&self) -> Option<(&Path, &str)> {
        self.0.home.as_ref().map(|(directory, name)| (directory.as_path(), name.as_str()))
    }

    /// Writes certificate, key and CAs under `directory/<name>.*`, key mode 0600. Whoever loads meanwhile, or
    /// after a crash in the middle, gets what was there before or this.
    pub fn save(&self, directory: &Path, name: &str) -> Result<(), TransportError> {
        let at = |source| TransportError::File { path: directory.into(), source };
        fs::create_dir_all(directory).map_err(at)?;
        let mut lock = OpenOptions::new();
        let lock = lock.create(true).truncate(false).write(true).mode(0o600).open(directory.join(".lock"));
        // Two that renew one identity write one after the other.
        let _held = lock.and_then(|lock| lock.lock().map(|()| lock)).map_err(at)?;
        let next = Paths::new(directory, &format!("{name}{NEXT}"));
        self.write(&next)?;
        files::sync_directory(directory)?;
        self.write(&Paths::new(directory, name))?;
        files::sync_directory(directory)?;
        next.all().into_iter().try_for_each(|path| fs::remove_file(path).map_err(at))
    }

    fn write(&self, at: &Paths) -> Result<(), TransportError> {
        files::write_private(&at.key, &files::pem("PRIVATE KEY", self.0.key.secret_pkcs8_der()))?;
        files::write_private(&at.lineage, &hex::encode(self.0.lineage))?;
        files::write_private(&at.ca, &files::pem_certificates(&self.0.cas))?;
        files::write_private(&at.certificate, &files::pem_certificates(&self.0.chain))
    }

    /// Reads what [`Identity::save`] wrote.
    pub fn load(directory: &Path, name: &str) -> Result<Self, TransportError> {
        let at = Paths::new(directory, name);
        // While it is replaced, its parts are of two identities; both are whole, one under the other name.
        let found = Self::read(&at).or_else(|error| {
            let next = Self::read(&Paths::new(directory, &format!("{name}{NEXT}")));
            next.or_else(|_| Self::read(&at)).map_err(|_| error)
        });
        Ok(found?.at(Some((directory.to_owned(), name.to_owned()))))
    }

    fn read(at: &Paths) -> Result<Self, TransportError> {
        let (chain, cas) = (files::read_certificates(&at.certificate)?, files::read_certificates(&at.ca)?);
        let key = files::read_key(&at.key)?;
        let made = match at.lineage.exists() {
            false => Self::new(chain, key, cas),
            true => {
                let mut lineage = Lineage::default();
                let text = files::read(&at.lineage)?;
                hex::decode_to_slice(text.trim_ascii(), &mut lineage)
                    .map_err(|e| files::damaged(&at.lineage, e.to_string()))?;
                Self::of_lineage(chain, key, cas, lineage)
            }
        };
        made.map_err(|error| match error {
            TransportError::Expired { .. } => error,
            error => files::damaged(&at.certificate, error.to_string()),
        })
    }

    /// The role that the certificate proves.
    pub fn role(&self) -> Role {
        self.0.me.role
    }

    /// The name that the certificate proves.
    pub fn name(&self) -> &str {
        &self.0.me.name
    }

    /// From when until when it is good.
    pub fn validity(&self) -> Validity {
        self.0.validity
    }

    /// SHA-256 of the certificate of the CA that signed its own, hexadecimal.
    pub fn ca_fingerprint(&self) -> String {
        ca::fingerprint(&self.0.cas[0])
    }

    /// Whether it is of the cluster of this name ([`ClusterCa::cluster`](super::ClusterCa::cluster)).
    pub fn is_of(&self, cluster: &str) -> bool {
        self.0.cluster == cluster
    }

    /// Whether it trusts the CA with this fingerprint, or is of the cluster that began with it.
    pub fn knows_ca(&self, fingerprint: &str) -> bool {
        self.0.cluster == ca::short_id(fingerprint)
            || self.0.cas.iter().any(|ca| ca::fingerprint(ca) == fingerprint)
    }

    /// Whether it trusts exactly these CAs, in DER.
    pub fn trusts(&self, cas: &[Vec<u8>]) -> bool {
        self.0.cas.iter().map(|ca| &ca[..]).eq(cas.iter().map(|ca| &ca[..]))
    }

    pub(super) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.chain
    }

    pub(super) fn key(&self) -> &PrivatePkcs8KeyDer<'static> {
        &self.0.key
    }

    pub(super) fn cas(&self) -> &[CertificateDer<'static>] {
        &self.0.cas
    }

    pub(super) fn cluster(&self) -> &str {
        &self.0.cluster
    }

    /// 32 secret bytes for a purpose, the same in every life of the process.
    pub(super) fn secret(&self, purpose: &str) -> [u8; 32] {
        derived(purpose, &self.0.lineage)
    }
}

impl Parts {
    fn copied(&self) -> Self {
        let Self { me, chain, key, cas, cluster, validity, lineage, home } = self;
        Self {
            me: me.clone(),
            chain: chain.clone(),
            key: key.clone_key(),
            cas: cas.clone(),
            cluster: cluster.clone(),
            validity: *validity,
            lineage: *lineage,
            home: home.clone(),
        }
    }
}

impl fmt::Debug for Identity {
    /// Never shows the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({} of cluster {})", self.0.me, self.0.cluster)
    }
}

fn derived(purpose: &str, secret: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(purpose).chain_update(secret).finalize().into()
}

/// Behind the name of an identity that takes another's place.
const NEXT: &str = ".next";

struct Paths {
    certificate: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    lineage: PathBuf,
}

impl Paths {
    fn new(directory: &Path, name: &str) -> Self {
        let file = |kind| directory.join(format!("{name}.{kind}"));
        Self { certificate: file("crt"), key: file("key"), ca: file("ca.crt"), lineage: file("lineage") }
    }

    fn all(&self) -> [&Path; 4] {
        [&self.certificate, &self.key, &self.ca, &self.lineage]
    }
}

/// A span for people.
fn ago(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s ago"),
        120..=7_199 => format!("{} minutes ago", seconds / 60),
        7_200..=172_799 => format!("{} hours ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
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
        assert_eq!(read.chain(), made.chain());
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

    #[test]
    fn a_successor_has_another_key_and_the_same_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let ca = ClusterCa::open_or_create(directory.path()).unwrap();
        let first = ca.issue(Role::Node, "a").unwrap();
        let renew = |name: &str| {
            let applicant = Applicant::new().unwrap();
            let validity = Validity::lasting(unix_now(), super::super::CERTIFICATE_LIFE);
            let admitted = ca.admit(Role::Node, name, &applicant.public_key(), validity).unwrap();
            first.renewed(applicant, admitted)
        };
        let next = renew("a").unwrap();
        assert_ne!(next.key(), first.key());
        assert_eq!(next.secret("x"), first.secret("x"));
        assert_ne!(next.secret("x"), next.secret("y"));
        assert!(renew("b").is_err(), "of another name");
        next.save(directory.path(), "a").unwrap();
        assert_eq!(Identity::load(directory.path(), "a").unwrap().secret("x"), first.secret("x"));
    }

    #[test]
    fn wherever_a_replacement_ends_one_of_the_two_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let ca = ClusterCa::open_or_create(directory.path()).unwrap();
        let (old, new) = (ca.issue(Role::Node, "a").unwrap(), ca.issue(Role::Node, "a").unwrap());
        let (at, next) = (Paths::new(directory.path(), "a"), Paths::new(directory.path(), "a.next"));
        // The order in which `write` writes.
        fn order(paths: &Paths) -> [&Path; 4] {
            [&paths.key, &paths.lineage, &paths.ca, &paths.certificate]
        }
        for ended_at in 0..=8 {
            old.save(directory.path(), "a").unwrap();
            new.save(directory.path(), "b").unwrap();
            let written = Paths::new(directory.path(), "b");
            let moves = order(&written).into_iter().cycle().zip(order(&next).into_iter().chain(order(&at)));
            for (from, to) in moves.take(ended_at) {
                fs::copy(from, to).unwrap();
            }
            let found = Identity::load(directory.path(), "a").unwrap();
            assert!(found.chain() == old.chain() || found.chain() == new.chain(), "{ended_at}");
            order(&next).into_iter().for_each(|path| drop(fs::remove_file(path)));
        }
    }

    #[test]
    fn one_that_has_expired_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let ca = ClusterCa::open_or_create(directory.path()).unwrap();
        let validity = Validity::lasting(unix_now() - 300, std::time::Duration::from_secs(100));
        let error = ca.issue_for(Role::Node, "late", validity).unwrap_err();
        assert!(error.to_string().contains("node late expired 3 minutes ago"), "{error}");
    }
}

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock},
    time::Duration,
};

use crate::transport::{
    Admission, ClusterCa, Identity, PublicKey, Revocation, Role, TransportError, Validity, unix_now,
};

use super::JoinError;

/// Whoever signs for a cluster: the CA of a data directory, how long its certificates last, and whose are
/// good no more. Its methods wait for the disk.
pub struct Authority {
    data_dir: PathBuf,
    life: Duration,
    ca: RwLock<ClusterCa>,
    /// Up to when what was issued to a name is refused.
    revoked: RwLock<BTreeMap<(Role, String), u64>>,
    faces: Mutex<Vec<Face>>,
}

/// Shows an identity of the coordinator itself.
type Face = Box<dyn Fn(&Identity) -> Result<(), TransportError> + Send>;

/// A certificate that a process of this machine was given.
#[derive(Debug, Clone)]
pub struct Issued {
    pub role: Role,
    pub name: String,
    pub validity: Validity,
}

impl Authority {
    /// That of a data directory; `life` is how long what it signs is good.
    pub fn open(data_dir: &Path, life: Duration) -> Result<Self, JoinError> {
        let ca = ClusterCa::open_or_create(data_dir).map_err(JoinError::Identity)?;
        Ok(Self {
            data_dir: data_dir.to_owned(),
            life,
            ca: RwLock::new(ca),
            revoked: RwLock::default(),
            faces: Mutex::default(),
        })
    }

    /// A certificate for this key. One whose name's earlier certificates were revoked gets one that is not.
    pub fn admit(&self, role: Role, name: &str, key: &PublicKey) -> Result<Admission, JoinError> {
        let validity = self.validity(role, name);
        self.ca().admit(role, name, key, validity).map_err(JoinError::Identity)
    }

    /// The CAs to trust, in DER; the first signs.
    pub fn cas(&self) -> Vec<Vec<u8>> {
        self.ca().certificates()
    }

    /// Whether a former CA is still trusted.
    pub fn is_rotating(&self) -> bool {
        self.ca().is_rotating()
    }

    /// From now on these are refused, too. What this machine's processes have of them is made anew.
    pub fn revoke(&self, revocations: &[Revocation]) -> Result<Vec<Issued>, JoinError> {
        {
            let mut revoked = self.revoked.write().unwrap_or_else(PoisonError::into_inner);
            for Revocation { role, name, upto } in revocations {
                let known = revoked.entry((*role, name.clone())).or_default();
                *known = (*known).max(*upto);
            }
        }
        self.tend()
    }

    /// A new CA signs from now on, beside the former one.
    pub fn rotate(&self) -> Result<Vec<Issued>, JoinError> {
        self.change(ClusterCa::rotate)
    }

    /// The former CA is trusted no more.
    pub fn finish(&self) -> Result<Vec<Issued>, JoinError> {
        self.change(ClusterCa::finish)
    }

    fn change(
        &self,
        change: impl FnOnce(&Path) -> Result<ClusterCa, TransportError>,
    ) -> Result<Vec<Issued>, JoinError> {
        {
            // Held throughout: nobody signs with a CA that is on its way out.
            let mut ca = self.ca.write().unwrap_or_else(PoisonError::into_inner);
            *ca = change(&self.data_dir).map_err(JoinError::Identity)?;
        }
        self.tend()
    }

    /// Has `face` show what the coordinator's identity becomes, here and now and whenever it changes.
    pub fn show_by(
        &self,
        face: impl Fn(&Identity) -> Result<(), TransportError> + Send + 'static,
    ) -> Result<(), JoinError> {
        let identity = Identity::load(&self.identities(), Role::Coordinator.as_str());
        face(&identity.map_err(JoinError::Identity)?).map_err(JoinError::Identity)?;
        self.faces.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(face));
        Ok(())
    }

    /// Gives processes of this machine new certificates where it is time: two thirds of the old one are spent, it
    /// was revoked, or it is of another CA. What they have in memory is their own business: they look here.
    pub fn tend(&self) -> Result<Vec<Issued>, JoinError> {
        let identities = self.identities();
        let entries = fs::read_dir(&identities)
            .map_err(|source| JoinError::File { path: identities.clone(), source })?;
        let mut issued = Vec::new();
        for entry in entries.flatten() {
            let file = entry.file_name();
            let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".crt")) else { continue };
            if name.contains('.') {
                continue; // Of CAs, or of one that is being replaced.
            }
            // One that is damaged is mended at its owner's next start.
            if let Ok(identity) = Identity::load(&identities, name) {
                issued.extend(self.renew_if_due(&identity, name)?);
            }
        }
        Ok(issued)
    }

    fn renew_if_due(&self, identity: &Identity, file: &str) -> Result<Option<Issued>, JoinError> {
        let (role, name, has) = (identity.role(), identity.name(), identity.validity());
        let (next, ca) = (self.validity(role, name), self.ca());
        if !identity.is_of(ca.cluster()) {
            return Ok(None); // Another cluster's: somebody put it here.
        }
        let longer = has.expires_at - has.issued_at.min(has.expires_at) > self.life.as_secs().max(1);
        let revoked = has.issued_at < next.issued_at && self.is_revoked(role, name, has.issued_at);
        if !(has.is_due(unix_now()) || longer || revoked || !identity.trusts(&ca.certificates())) {
            return Ok(None);
        }
        let made = ca.issue_for(role, name, next).map_err(JoinError::Identity)?.succeeding(identity);
        drop(ca);
        made.save(&self.identities(), file).map_err(JoinError::Identity)?;
        tracing::info!("a new certificate for {role} {name} of this machine");
        if role == Role::Coordinator {
            for face in &*self.faces.lock().unwrap_or_else(PoisonError::into_inner) {
                face(&made).map_err(JoinError::Identity)?;
            }
        }
        Ok(Some(Issued { role, name: name.to_owned(), validity: next }))
    }

    /// Of what is issued now: later than anything of its name that was revoked.
    fn validity(&self, role: Role, name: &str) -> Validity {
        let revoked = self.revoked.read().unwrap_or_else(PoisonError::into_inner);
        let after = revoked.get(&(role, name.to_owned())).map_or(0, |upto| upto + 1);
        Validity::lasting(unix_now().max(after), self.life)
    }

    fn is_revoked(&self, role: Role, name: &str, issued_at: u64) -> bool {
        let revoked = self.revoked.read().unwrap_or_else(PoisonError::into_inner);
        revoked.get(&(role, name.to_owned())).is_some_and(|upto| issued_at <= *upto)
    }

    fn identities(&self) -> PathBuf {
        self.data_dir.join("identity")
    }

    fn ca(&self) -> std::sync::RwLockReadGuard<'_, ClusterCa> {
        self.ca.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Applicant;

    const LIFE: Duration = Duration::from_secs(90 * 86_400);

    /// A data directory with a coordinator, a client and a node of this machine.
    fn cluster() -> (tempfile::TempDir, Authority) {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(directory.path(), LIFE).unwrap();
        for (role, name) in
            [(Role::Coordinator, "coordinator"), (Role::Client, "client"), (Role::Node, "node-0")]
        {
            authority.ca().issue(role, name).unwrap().save(&authority.identities(), name).unwrap();
        }
        (directory, authority)
    }

    fn names(issued: &[Issued]) -> Vec<&str> {
        let mut names: Vec<&str> = issued.iter().map(|issued| issued.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_is_fresh_stays_and_what_is_longer_than_allowed_does_not() {
        let (directory, authority) = cluster();
        assert!(authority.tend().unwrap().is_empty());
        let shorter = Authority::open(directory.path(), LIFE / 2).unwrap();
        assert_eq!(names(&shorter.tend().unwrap()), ["client", "coordinator", "node-0"]);
        assert!(shorter.tend().unwrap().is_empty());
    }

    #[test]
    fn a_revoked_name_gets_a_later_certificate_of_the_same_lineage() {
        let (_directory, authority) = cluster();
        let load = || Identity::load(&authority.identities(), "client").unwrap();
        let before = load();
        let revocation =
            Revocation { role: Role::Client, name: "client".into(), upto: before.validity().issued_at };
        assert_eq!(names(&authority.revoke(std::slice::from_ref(&revocation)).unwrap()), ["client"]);
        assert!(load().validity().issued_at > revocation.upto, "in the same second, too");
        // One that was decided before, and comes later, takes nothing back.
        assert!(authority.revoke(&[]).unwrap().is_empty());
        assert!(authority.is_revoked(Role::Client, "client", revocation.upto));
        let key = Applicant::new().unwrap().public_key();
        authority.admit(Role::Client, "client", &key).unwrap();
        assert!(authority.tend().unwrap().is_empty());
    }

    #[test]
    fn a_change_of_the_ca_reaches_this_machine_at_once_and_the_coordinators_faces() {
        let (_directory, authority) = cluster();
        let (shown, seen) = std::sync::mpsc::channel();
        let show = move |identity: &Identity| {
            shown.send(identity.ca_fingerprint()).unwrap();
            Ok(())
        };
        authority.show_by(show).unwrap();
        let first = seen.try_recv().unwrap();
        assert_eq!(names(&authority.rotate().unwrap()), ["client", "coordinator", "node-0"]);
        assert!(authority.is_rotating());
        let second = seen.try_recv().unwrap();
        assert_ne!(first, second);
        assert_eq!(authority.finish().unwrap().len(), 3, "they trust the former one no more");
        assert_eq!(seen.try_recv().unwrap(), second);
        assert!(!authority.is_rotating());
    }
}

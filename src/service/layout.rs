use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::{
    client::{CLIENT_IDENTITY, ENDPOINT_FILE},
    transport::{ClusterCa, Identity, Role, unix_now},
};

use super::ServiceError;

/// What stands where in a service's data directory.
///
/// ```text
///   DATA/journal.sqlite    what must survive (and its lock)
///   DATA/blobs/            payloads, snapshots and checkpoints by digest, if no bucket holds them
///   DATA/store             which bucket holds them, and whose they are in there
///   DATA/ca/               the cluster's certificate authority, mode 0600
///   DATA/identity/         certificates of the parts and of local clients, mode 0600
///   DATA/tokens/           what lets processes on other machines in
///   DATA/models/           models that `lockstep model pull` fetched
///   DATA/cache/            what nodes can make again: digests of model files, packed weights that they map
///   DATA/endpoint          QUIC address of the running coordinator, then the CA's SHA-256
///   DATA/presign.key       signs URLs of checkpoint files, mode 0600
///   DATA/logs/             logs of the parts, where they don't go to stderr
/// ```
#[derive(Debug, Clone)]
pub struct DataDirectory {
    path: PathBuf,
}

/// Where a data directory has what nodes can make again.
pub const CACHE: &str = "cache";

/// Identities that local parts use beside those of nodes, by file name.
const PARTS: [(&str, Role); 3] =
    [("coordinator", Role::Coordinator), ("gateway", Role::Gateway), (CLIENT_IDENTITY, Role::Client)];

impl DataDirectory {
    /// Opens or makes the directory, private to its owner.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, ServiceError> {
        let path = path.into();
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|source| ServiceError::File { path: path.clone(), source })?;
        Ok(Self { path })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Certificates of the parts and of local clients.
    pub fn identities(&self) -> PathBuf {
        self.path.join("identity")
    }

    /// The file with the coordinator's address.
    pub fn endpoint_file(&self) -> PathBuf {
        self.path.join(ENDPOINT_FILE)
    }

    /// The key that URLs of checkpoint files are signed with.
    pub fn presign_key(&self) -> PathBuf {
        self.path.join("presign.key")
    }

    /// Logs of the parts.
    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// Makes the CA at first start and a certificate for each local part that has none.
    pub fn prepare_identities(&self) -> Result<(), ServiceError> {
        PARTS.into_iter().try_for_each(|(name, role)| self.prepare(role, name))
    }

    /// The same for a node of this machine.
    pub fn prepare_node(&self, name: &str) -> Result<(), ServiceError> {
        self.prepare(Role::Node, name)
    }

    /// What a running coordinator keeps fresh ([`Authority::tend`](crate::join::Authority::tend)) begins here.
    fn prepare(&self, role: Role, name: &str) -> Result<(), ServiceError> {
        let (ca, identities) = (ClusterCa::open_or_create(&self.path)?, self.identities());
        let present = Identity::load(&identities, name);
        let good =
            |present: &Identity| present.trusts(&ca.certificates()) && !present.validity().is_due(unix_now());
        if present.as_ref().is_ok_and(good) {
            return Ok(());
        }
        let made = ca.issue(role, name)?;
        let made = match &present {
            Ok(present) => made.succeeding(present),
            Err(_) => made,
        };
        Ok(made.save(&identities, name)?)
    }

    /// The identity of a local part.
    pub fn identity(&self, name: &str) -> Result<Identity, ServiceError> {
        Ok(Identity::load(&self.identities(), name)?)
    }

    /// Tells local clients where the coordinator listens: written beside and renamed, so that
    /// nobody reads half of it.
    pub fn write_endpoint(&self, address: &str) -> Result<(), ServiceError> {
        let fingerprint = ClusterCa::open_or_create(&self.path)?.fingerprint();
        let (path, beside) = (self.endpoint_file(), self.path.join("endpoint.new"));
        let written = fs::write(&beside, format!("{address}\n{fingerprint}\n"));
        written
            .and_then(|()| fs::rename(&beside, &path))
            .map_err(|source| ServiceError::File { path, source })
    }
}

//! Who may be connected: certificates are renewed and revoked here, and the cluster's CA is changed, where the
//! network and the files are. What is decided about them is decided by the state machine.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use actix::Addr;
use sha2::{Digest as _, Sha256};

use crate::{
    join::{Authority, Issued, JoinError},
    journal::KnownCertificate,
    protocol::{HeldCertificate, JoinReply, TrustReply},
    transport::{Connection, Endpoint, PublicKey, Revocation, Role},
    types::{Digest, ErrorKind, OperationError},
};

use super::{
    actor::{Coordinator, Happened},
    state::{Event, WaiterId},
};

/// How long a client whose certificate was revoked stays connected: the answer to its own request may be on its way.
const LAST_ANSWER: Duration = Duration::from_millis(250);

/// Watches the door of one coordinator.
#[derive(Default)]
pub(super) struct Doorkeeper {
    /// Absent in memory, where nobody has a certificate.
    authority: Option<Arc<Authority>>,
    endpoint: Option<Endpoint>,
    /// Whoever is connected.
    guests: Mutex<BTreeMap<u64, Connection>>,
    next_guest: AtomicU64,
}

/// Counts a connection among the guests for as long as it lives.
pub(super) struct Guest {
    doorkeeper: Arc<Doorkeeper>,
    number: u64,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.doorkeeper.guests().remove(&self.number);
    }
}

impl Doorkeeper {
    pub(super) fn new(authority: Option<Arc<Authority>>, endpoint: Endpoint) -> Arc<Self> {
        Arc::new(Self { authority, endpoint: Some(endpoint), ..Self::default() })
    }

    /// Lets nobody in any more whom these concern; for the start, when nobody is in.
    pub(super) async fn begin(self: &Arc<Self>, revocations: Vec<Revocation>, actor: &Addr<Coordinator>) {
        self.refuse(revocations, actor).await;
        self.say_ca(actor).await;
    }

    /// A connection that was accepted; what its certificate says is told to the state machine.
    pub(super) async fn enter(self: &Arc<Self>, connection: &Connection, actor: &Addr<Coordinator>) -> Guest {
        let number = self.next_guest.fetch_add(1, Ordering::Relaxed);
        self.guests().insert(number, connection.clone());
        if let Some(proof) = connection.proof()
            && let Some(ca) = proof.ca
        {
            let held = HeldCertificate {
                ca,
                issued_at: proof.validity.issued_at,
                expires_at: proof.validity.expires_at,
            };
            self.note(connection, held, actor).await;
        }
        Guest { doorkeeper: self.clone(), number }
    }

    /// What a process says that it has, and what it should trust; nothing where nobody has certificates.
    pub(super) async fn trust(
        &self,
        connection: &Connection,
        held: HeldCertificate,
        actor: &Addr<Coordinator>,
    ) -> Option<TrustReply> {
        let authority = self.authority.as_ref()?;
        self.note(connection, held, actor).await;
        Some(TrustReply { cas: authority.cas() })
    }

    async fn note(&self, connection: &Connection, held: HeldCertificate, actor: &Addr<Coordinator>) {
        let peer = connection.peer();
        if peer.role == Role::Coordinator {
            return;
        }
        let known = KnownCertificate {
            role: peer.role,
            name: peer.name.clone(),
            ca: Digest(held.ca),
            issued_at: held.issued_at,
            expires_at: held.expires_at,
        };
        tell(actor, Event::Certified(known)).await;
    }

    /// A certificate of the name and role that the connection proves, for another key.
    pub(super) async fn renew(&self, connection: &Connection, public_key: Vec<u8>) -> Option<JoinReply> {
        let authority = self.authority.clone()?;
        let Some(key) = PublicKey::from_bytes(&public_key) else {
            return Some(JoinReply::Refused { reason: "the public key is no point on P-256".into() });
        };
        let peer = connection.peer().clone();
        let admitted = authority.admit(peer.role, &peer.name, &key);
        Some(match admitted {
            Ok(admitted) => {
                tracing::info!(%peer, "its certificate is renewed");
                JoinReply::Admitted { chain: admitted.chain, cas: admitted.cas }
            }
            Err(error) => {
                tracing::warn!(%peer, "its certificate is not renewed: {error}");
                JoinReply::Refused { reason: error.to_string() }
            }
        })
    }

    /// A new CA beside the old one, or the old one's end.
    pub(super) async fn rotate(&self, finish: bool, actor: &Addr<Coordinator>) -> Result<(), OperationError> {
        let change = move |authority: &Authority| {
            if finish { authority.finish() } else { authority.rotate() }
        };
        let Some(changed) = self.with_authority(change).await else {
            let problem = "a cluster inside one process has no certificates";
            return Err(OperationError::new(ErrorKind::InvalidInput, problem));
        };
        let issued = changed.map_err(|e| OperationError::new(ErrorKind::Unavailable, e.to_string()))?;
        tracing::warn!("{}", if finish { "the former CA is trusted no more" } else { "a new CA signs" });
        self.say_ca(actor).await;
        self.say_issued(issued, actor).await;
        Ok(())
    }

    /// Refuses these from now on, has that answered, and ends their connections.
    pub(super) async fn shut_out(
        self: Arc<Self>,
        revocations: Vec<Revocation>,
        waiter: WaiterId,
        actor: Addr<Coordinator>,
    ) {
        self.refuse(revocations.clone(), &actor).await;
        tell(&actor, Event::ShutOut { waiter }).await;
        let guests: Vec<Connection> = self.guests().values().cloned().collect();
        for connection in guests {
            let Some(proof) = connection.proof() else { continue };
            let concerned = revocations.iter().find(|r| r.concerns(connection.peer(), proof));
            let Some(reason) = concerned.map(Revocation::to_string) else { continue };
            let waits = connection.peer().role == Role::Client;
            tokio::spawn(async move {
                if waits {
                    tokio::time::sleep(LAST_ANSWER).await;
                }
                tracing::warn!(peer = %connection.peer(), "its connection is ended: {reason}");
                connection.shut_out(&reason);
            });
        }
    }

    /// Processes of this machine get theirs anew before they are refused what they have.
    async fn refuse(&self, revocations: Vec<Revocation>, actor: &Addr<Coordinator>) {
        let list = revocations.clone();
        match self.with_authority(move |authority| authority.revoke(&list)).await {
            Some(Ok(issued)) => self.say_issued(issued, actor).await,
            Some(Err(error)) => tracing::error!("certificates of this machine: {error}"),
            None => {}
        }
        if let Some(endpoint) = &self.endpoint {
            endpoint.refuse(revocations);
        }
    }

    async fn say_ca(&self, actor: &Addr<Coordinator>) {
        let Some(authority) = &self.authority else { return };
        if let Some(ca) = signing(authority) {
            tell(actor, Event::Ca { ca, rotating: authority.is_rotating() }).await;
        }
    }

    async fn say_issued(&self, issued: Vec<Issued>, actor: &Addr<Coordinator>) {
        let Some(ca) = self.authority.as_deref().and_then(signing) else { return };
        for Issued { role, name, validity } in issued {
            if role != Role::Coordinator {
                let known = KnownCertificate {
                    role,
                    name,
                    ca,
                    issued_at: validity.issued_at,
                    expires_at: validity.expires_at,
                };
                tell(actor, Event::Certified(known)).await;
            }
        }
    }

    /// Runs what waits for the disk where it may; nothing without an authority.
    async fn with_authority<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Authority) -> Result<T, JoinError> + Send + 'static,
    ) -> Option<Result<T, JoinError>> {
        let authority = self.authority.clone()?;
        tokio::task::spawn_blocking(move || work(&authority)).await.ok()
    }

    fn guests(&self) -> MutexGuard<'_, BTreeMap<u64, Connection>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which CA signs, by its SHA-256.
fn signing(authority: &Authority) -> Option<Digest> {
    authority.cas().first().map(|ca| Digest(Sha256::digest(ca).into()))
}

/// The actor is gone only with this process.
async fn tell(actor: &Addr<Coordinator>, event: Event) {
    let _ = actor.send(Happened(event)).await;
}

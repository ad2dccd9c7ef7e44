//! Whose certificates are known and whose are good no more, and when a change of the cluster's CA is over.
//!
//! ```text
//!   rotate ─► a new CA signs, both are trusted ─► every known process has a certificate of the new one ─► finish
//! ```
//!
//! Signing is not done here. What is known of a process is the newest certificate that it has shown or said it has,
//! and it is journaled: a process that is away while the CA is changed is waited for, until what it has expires.

use std::collections::BTreeMap;

use crate::{
    journal::{JournalError, KnownCertificate, Record},
    protocol::{ClientResponse, CoordinatorMessage, NodeId, TrustStatus},
    transport::{Revocation, Role},
    types::{Digest, InvalidInput},
};

use super::{Appending, Effect, Refusal, State, WaiterId};

/// Certificates that are known at once; of more, none is waited for.
const CERTIFICATES_MAX: usize = 16_384;

/// Names that are revoked at once. They take 64 bytes each of every welcome.
const REVOKED_MAX: usize = 4_096;

/// How long the change of a CA takes at least: who was let in just before it has connected by then.
const ROTATION_MIN_MS: u64 = 20_000;

/// Between two looks for certificates that have expired.
const TEND_MS: u64 = 60_000;

/// What the state machine knows of certificates.
#[derive(Default)]
pub(super) struct Trust {
    /// The CA that signs, once that has been told.
    ca: Option<Digest>,
    /// Since when, while a former CA is trusted.
    rotating_since_ms: Option<u64>,
    /// The former CA is being given up.
    finishing: bool,
    known: BTreeMap<(Role, String), KnownCertificate>,
    /// Up to when what was issued to a name is refused.
    revoked: BTreeMap<(Role, String), u64>,
    next_tending_ms: u64,
}

impl Trust {
    pub fn recovered(known: Vec<KnownCertificate>, revoked: BTreeMap<(Role, String), u64>) -> Self {
        let known = known.into_iter().map(|known| ((known.role, known.name.clone()), known)).collect();
        Self { known, revoked, ..Self::default() }
    }

    fn revocations(&self) -> Vec<Revocation> {
        let revocation = |((role, name), upto): (&(Role, String), &u64)| Revocation {
            role: *role,
            name: name.clone(),
            upto: *upto,
        };
        self.revoked.iter().map(revocation).collect()
    }

    /// Processes whose newest certificate is not of the CA that signs.
    fn waits_for(&self, now_s: u64) -> impl Iterator<Item = &(Role, String)> {
        let ca = self.ca;
        let of_others = move |known: &KnownCertificate| Some(known.ca) != ca && known.expires_at > now_s;
        self.known.iter().filter(move |(_, known)| of_others(known)).map(|(name, _)| name)
    }
}

impl State {
    /// Which certificates are refused, to whoever accepts connections.
    pub fn revocations(&self) -> Vec<Revocation> {
        self.trust.revocations()
    }

    /// Which CA signs, and whether a former one is trusted beside it.
    pub(super) fn ca_is(&mut self, ca: Digest, rotating: bool) {
        let since_ms = self.trust.rotating_since_ms.unwrap_or(self.now_ms);
        self.trust.rotating_since_ms = rotating.then_some(since_ms);
        (self.trust.ca, self.trust.finishing) = (Some(ca), false);
    }

    /// A process has shown a certificate, or says that it has it.
    pub(super) fn certified(&mut self, known: KnownCertificate) {
        let name = (known.role, known.name.clone());
        let refused = self.trust.revoked.get(&name).is_some_and(|upto| known.issued_at <= *upto);
        let newest = self.trust.known.get(&name);
        if refused || newest.is_some_and(|newest| newest.issued_at >= known.issued_at) {
            return;
        }
        if newest.is_none() && self.trust.known.len() >= CERTIFICATES_MAX {
            tracing::warn!(
                "more than {CERTIFICATES_MAX} processes have certificates: {} {} is not noted",
                name.0,
                name.1
            );
            return;
        }
        self.trust.known.insert(name, known.clone());
        self.append(vec![Record::Certificate(known)], Appending::Noted);
    }

    /// What no certificate's fate hangs on.
    pub(super) fn noted(&self, result: Result<(), JournalError>) {
        if let Err(why) = result {
            tracing::warn!("what is known of a certificate is not durable: {why}");
        }
    }

    /// Refuses what has been issued to a name, once that is durable.
    pub(super) fn revoke(
        &mut self,
        waiter: WaiterId,
        role: Option<String>,
        name: String,
    ) -> Result<Option<ClientResponse>, Refusal> {
        self.refuse_while_draining()?;
        let role = self.role_of(role, &name)?;
        let key = (role, name);
        if !self.trust.revoked.contains_key(&key) && self.trust.revoked.len() >= REVOKED_MAX {
            return Err(Refusal::Overloaded { what: "revoked names", bound: REVOKED_MAX });
        }
        let upto = self.wall_ms / 1_000;
        let (role, name) = key.clone();
        let records = vec![
            Record::Revoked { role, name: name.clone(), upto },
            Record::ForgetCertificate { role, name },
        ];
        self.append(records, Appending::Revoked { process: key, upto, waiter });
        Ok(None)
    }

    /// The role that is asked for, or else the one that is known of the name.
    fn role_of(&self, role: Option<String>, name: &str) -> Result<Role, Refusal> {
        if let Err(problem) = crate::transport::check_name(name) {
            return Err(InvalidInput::new("name", problem.to_string()).into());
        }
        if let Some(role) = role {
            return match Role::parse(&role) {
                Some(role) if role != Role::Coordinator => Ok(role),
                _ => Err(InvalidInput::new("role", "must be node, gateway or client").into()),
            };
        }
        let of_name =
            self.trust.known.keys().filter(|(role, known)| known == name && *role != Role::Coordinator);
        let roles: Vec<Role> = of_name.map(|(role, _)| *role).collect();
        match roles[..] {
            [role] => Ok(role),
            [] => {
                let problem = format!(
                    "no process called {name:?} has shown a certificate; say its role to revoke one that was never used"
                );
                Err(InvalidInput::new("name", problem).into())
            }
            _ => {
                let roles = roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" and a ");
                Err(InvalidInput::new("role", format!("there is a {roles} of this name; say which")).into())
            }
        }
    }

    pub(super) fn revoked_durable(
        &mut self,
        process: (Role, String),
        upto: u64,
        waiter: WaiterId,
        result: Result<(), JournalError>,
    ) {
        if let Err(why) = result {
            return self.refuse(waiter, Refusal::NotDurable(why.to_string()));
        }
        let (role, name) = process.clone();
        tracing::warn!("the certificates of {role} {name} are revoked");
        self.trust.known.remove(&process);
        self.trust.revoked.insert(process, upto);
        let node = self.nodes.iter().find(|(_, node)| role == Role::Node && node.hello.name == name);
        if let Some(id) = node.map(|(id, _)| *id) {
            self.lose_node(id, "its certificate was revoked");
        }
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.tell_revoked(id);
        }
        let revocations = self.trust.revocations();
        self.effects.push(Effect::Revoked { revocations, waiter });
    }

    /// Nobody gets in any more whose certificate was revoked, and this machine's processes have theirs anew. The
    /// connection that brings the answer may be one of those that are ended now.
    pub(super) fn shut_out(&mut self, waiter: WaiterId) {
        self.respond(waiter, ClientResponse::Cluster(self.cluster_status()));
    }

    /// Nodes connect to one another, too.
    pub(super) fn tell_revoked(&mut self, node: NodeId) {
        let nodes = self.trust.revoked.iter().filter(|((role, _), _)| *role == Role::Node);
        let nodes: Vec<_> = nodes.map(|((_, name), upto)| (name.clone(), *upto)).collect();
        if !nodes.is_empty() {
            self.send(node, CoordinatorMessage::Revoked { nodes });
        }
    }

    /// Forgets what has expired, and ends a change of the CA that nobody is waited for with.
    pub(super) fn tend_trust(&mut self) {
        let now_s = self.wall_ms / 1_000;
        if self.now_ms >= self.trust.next_tending_ms {
            self.trust.next_tending_ms = self.now_ms + TEND_MS;
            let over: Vec<_> = self
                .trust
                .known
                .extract_if(.., |_, known| known.expires_at <= now_s)
                .map(|(n, _)| n)
                .collect();
            if !over.is_empty() {
                let forget = |(role, name)| Record::ForgetCertificate { role, name };
                self.append(over.into_iter().map(forget).collect(), Appending::Noted);
            }
        }
        let due = self.trust.rotating_since_ms.is_some_and(|since| self.now_ms >= since + ROTATION_MIN_MS);
        if due && !self.trust.finishing && self.trust.waits_for(now_s).next().is_none() {
            self.trust.finishing = true;
            self.effects.push(Effect::FinishRotation);
        }
    }

    pub(super) fn trust_status(&self) -> TrustStatus {
        let named = |(role, name): &(Role, String)| format!("{role} {name}");
        let waits_for = || self.trust.waits_for(self.wall_ms / 1_000).map(named).collect();
        TrustStatus {
            rotation: self.trust.rotating_since_ms.map(|_| waits_for()),
            revoked: self.trust.revoked.keys().map(named).collect(),
        }
    }

    /// Until when a node's newest certificate is good, in seconds since the Unix epoch.
    pub(super) fn certified_until(&self, node: &str) -> Option<u64> {
        self.trust.known.get(&(Role::Node, node.to_owned())).map(|known| known.expires_at)
    }
}

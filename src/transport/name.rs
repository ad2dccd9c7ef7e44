//! Names of processes, as their certificates write them: `<role>-<name>.<cluster>.lockstep.internal`
//! says who it is; `<role>.<cluster>.lockstep.internal` beside it is what a client asks for, whatever
//! address it dials.

use std::fmt;

use super::TransportError;

/// What a process is, proved by its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Coordinator,
    Node,
    Gateway,
    Client,
}

/// Who is at the other end, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub role: Role,
    pub name: String,
}

impl Role {
    const ALL: [Self; 4] = [Self::Coordinator, Self::Node, Self::Gateway, Self::Client];

    /// Reads a role by its name: `node`, ….
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }

    /// Its name: `node`, ….
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Node => "node",
            Self::Gateway => "gateway",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

/// A DNS label has 63 characters, of which `coordinator-` takes 12.
pub(super) const MAX_NAME: usize = 50;

/// Under which every certificate's names stand. `.internal` is reserved for private use.
const DOMAIN: &str = "lockstep.internal";

/// That a process can be called so: the rest of a DNS label after its role.
pub fn check_name(name: &str) -> Result<(), TransportError> {
    let characters = name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    let ends = !name.starts_with('-') && !name.ends_with('-');
    if characters && ends && (1..=MAX_NAME).contains(&name.len()) {
        return Ok(());
    }
    Err(TransportError::InvalidName { name: name.into(), limit: MAX_NAME })
}

/// The name of one process.
pub(super) fn process_dns_name(role: Role, name: &str, cluster: &str) -> String {
    format!("{role}-{name}.{cluster}.{DOMAIN}")
}

/// The name that every process of a role shares.
pub(super) fn role_dns_name(role: Role, cluster: &str) -> String {
    format!("{role}.{cluster}.{DOMAIN}")
}

/// Reads what [`process_dns_name`] wrote: who it is, and the cluster.
pub(super) fn parse_process_dns_name(dns_name: &str) -> Option<(Peer, &str)> {
    let (label, cluster) = dns_name.strip_suffix(DOMAIN)?.strip_suffix('.')?.split_once('.')?;
    let (role, name) = label.split_once('-')?;
    let role = Role::parse(role)?;
    check_name(name).ok()?;
    Some((Peer { role, name: name.into() }, cluster))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_reads_back() {
        for role in Role::ALL {
            let dns = process_dns_name(role, "gpu-07", "0123456789abcdef");
            let peer = Peer { role, name: "gpu-07".into() };
            assert_eq!(parse_process_dns_name(&dns), Some((peer, "0123456789abcdef")));
            assert_eq!(parse_process_dns_name(&role_dns_name(role, "0123456789abcdef")), None);
        }
    }

    #[test]
    fn names_that_dns_or_we_could_misread_are_refused() {
        for bad in ["", "-a", "a-", "a.b", "A", "a_b", "ä", &"a".repeat(MAX_NAME + 1)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        check_name(&"a".repeat(MAX_NAME)).unwrap();
    }
}

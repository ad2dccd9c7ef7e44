//! API keys: who may use the service, and whose runs are whose.
//!
//! A key file has a line `NAME KEY [LIMIT=VALUE …]` for each; `#` begins a comment. The keys themselves
//! are forgotten once they are read: requests are held against their digests.

use std::{fs, path::Path};

use crate::types::Digest;

use super::{GatewayError, Limits, body::Bodies};

/// Shortest key: 16 characters of base64 are 96 bits.
const KEY_MIN: usize = 16;

/// Longest name and key, in bytes.
const LENGTH_MAX: usize = 128;

/// The keys of a service.
#[derive(Debug, Clone, Default)]
pub struct ApiKeys {
    keys: Vec<ApiKey>,
}

/// One of them.
#[derive(Debug, Clone)]
pub(super) struct ApiKey {
    pub name: String,
    pub limits: Limits,
    /// Room for the bodies of its requests.
    pub bodies: Bodies,
    digest: Digest,
}

impl ApiKeys {
    /// Reads a key file. `limits`: of every key whose line says nothing else.
    pub fn read(file: &Path, limits: &Limits) -> Result<Self, GatewayError> {
        let text = fs::read_to_string(file).map_err(|e| e.to_string());
        let refused = |problem| GatewayError::Keys { file: file.to_owned(), problem };
        text.and_then(|text| Self::parse(&text, limits)).map_err(refused)
    }

    fn parse(text: &str, limits: &Limits) -> Result<Self, String> {
        let mut keys: Vec<ApiKey> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let refused = |problem: &str| Err(format!("line {}: {problem}", number + 1));
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let (name, digest) = match (words.next(), words.next()) {
                (None, _) => continue,
                (Some(name), Some(key)) if is_name(name) && is_key(key) => (name, Digest::of(key.as_bytes())),
                _ => {
                    return refused(&format!(
                        "expected `NAME KEY`, a name of A-Z a-z 0-9 . _ - and a key of {KEY_MIN} to {LENGTH_MAX} \
                         characters"
                    ));
                }
            };
            let mut limits = limits.clone();
            if let Err(problem) = words.try_for_each(|limit| limits.set(limit)) {
                return refused(&problem);
            }
            if keys.iter().any(|other| other.name == name) {
                return refused("the name stands on an earlier line as well");
            }
            if keys.iter().any(|other| other.digest == digest) {
                return refused("the key stands on an earlier line as well");
            }
            let bodies = Bodies::new(limits.body_bytes);
            keys.push(ApiKey { name: name.to_owned(), limits, bodies, digest });
        }
        if keys.is_empty() { Err("has no key".to_owned()) } else { Ok(Self { keys }) }
    }

    /// What is known of this key. Takes as long for a key that is nearly right.
    pub(super) fn find(&self, key: &str) -> Option<&ApiKey> {
        let given = Digest::of(key.as_bytes());
        let same = |digest: &Digest| digest.0.iter().zip(given.0).fold(0, |odd, (a, b)| odd | (a ^ b)) == 0;
        self.keys.iter().fold(None, |found, known| if same(&known.digest) { Some(known) } else { found })
    }
}

/// The key in an `Authorization` header: `Api-Key KEY` or `Bearer KEY`.
pub fn key_of(authorization: &str) -> Option<&str> {
    let (scheme, key) = authorization.trim().split_once(' ')?;
    let known = ["api-key", "bearer"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    known.then_some(key.trim())
}

fn is_name(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    text.len() <= LENGTH_MAX && text.chars().all(legal)
}

fn is_key(text: &str) -> bool {
    (KEY_MIN..=LENGTH_MAX).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# who\nada   0123456789abcdef\n\nbob fedcba9876543210 runs=2 disk=none # his\n";

    #[test]
    fn a_key_says_who_has_it() {
        let keys = ApiKeys::parse(FILE, &Limits::default()).unwrap();
        let name_of = |key: &str| keys.find(key).map(|known| known.name.as_str());
        assert_eq!(name_of("0123456789abcdef"), Some("ada"));
        assert_eq!(name_of("fedcba9876543210"), Some("bob"));
        for wrong in ["", "0123456789abcdeF", "0123456789abcde", "ada"] {
            assert_eq!(name_of(wrong), None, "{wrong:?}");
        }
        let limits = |key: &str| keys.find(key).unwrap().limits.clone();
        assert_eq!(limits("0123456789abcdef"), Limits::default());
        assert_eq!(limits("fedcba9876543210"), "runs=2,disk=none".parse().unwrap());
        assert!(!format!("{keys:?}").contains("0123456789abcdef"), "a log never has a key");
    }

    #[test]
    fn both_ways_to_send_a_key_are_read() {
        for header in ["Api-Key secret", "Bearer secret", "bearer  secret "] {
            assert_eq!(key_of(header), Some("secret"), "{header:?}");
        }
        for header in ["secret", "Basic secret", ""] {
            assert_eq!(key_of(header), None, "{header:?}");
        }
    }

    #[test]
    fn a_file_that_is_no_key_file_is_refused_by_its_line() {
        let refused = |text: &str| ApiKeys::parse(text, &Limits::default()).unwrap_err();
        assert!(refused("ada\n").starts_with("line 1: expected"));
        assert!(refused("ada short\n").starts_with("line 1: expected"));
        assert!(refused("\nada 0123456789abcdef too\n").starts_with("line 2: unknown limit"));
        assert!(refused("a/da 0123456789abcdef\n").starts_with("line 1: expected"));
        assert!(refused("a 0123456789abcdef\na 0123456789abcdee\n").starts_with("line 2: the name"));
        assert!(refused("a 0123456789abcdef\nb 0123456789abcdef\n").starts_with("line 2: the key"));
        assert_eq!(refused("# nobody\n"), "has no key");
    }
}

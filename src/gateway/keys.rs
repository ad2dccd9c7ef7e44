//! API keys: who may use the service, and whose runs are whose.
//!
//! A key file has a line `NAME KEY` for each; `#` begins a comment. The keys themselves are
//! forgotten once they are read: requests are held against their digests.

use std::{fs, path::Path};

use crate::types::Digest;

use super::GatewayError;

/// Shortest key: 16 characters of base64 are 96 bits.
const KEY_MIN: usize = 16;

/// Longest name and key, in bytes.
const LENGTH_MAX: usize = 128;

/// The keys of a service.
#[derive(Debug, Clone, Default)]
pub struct ApiKeys {
    keys: Vec<(String, Digest)>,
}

impl ApiKeys {
    /// Reads a key file.
    pub fn read(file: &Path) -> Result<Self, GatewayError> {
        let text = fs::read_to_string(file).map_err(|e| e.to_string());
        let refused = |problem| GatewayError::Keys { file: file.to_owned(), problem };
        text.and_then(|text| Self::parse(&text)).map_err(refused)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut keys: Vec<(String, Digest)> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let refused = |problem: &str| Err(format!("line {}: {problem}", number + 1));
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let (name, key) = match (words.next(), words.next(), words.next()) {
                (None, ..) => continue,
                (Some(name), Some(key), None) if is_name(name) && is_key(key) => {
                    (name, Digest::of(key.as_bytes()))
                }
                _ => {
                    return refused(&format!(
                        "expected `NAME KEY`, a name of A-Z a-z 0-9 . _ - and a key of {KEY_MIN} to {LENGTH_MAX} \
                         characters"
                    ));
                }
            };
            if keys.iter().any(|(other, _)| other == name) {
                return refused("the name stands on an earlier line as well");
            }
            if keys.iter().any(|(_, other)| *other == key) {
                return refused("the key stands on an earlier line as well");
            }
            keys.push((name.to_owned(), key));
        }
        if keys.is_empty() { Err("has no key".to_owned()) } else { Ok(Self { keys }) }
    }

    /// The name of whoever has this key. Takes as long for a key that is nearly right.
    pub fn name_of(&self, key: &str) -> Option<&str> {
        let given = Digest::of(key.as_bytes());
        let same = |digest: &Digest| digest.0.iter().zip(given.0).fold(0, |odd, (a, b)| odd | (a ^ b)) == 0;
        self.keys
            .iter()
            .fold(None, |found, (name, digest)| if same(digest) { Some(name.as_str()) } else { found })
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

    const FILE: &str = "# who\nada   0123456789abcdef\n\nbob fedcba9876543210 # his\n";

    #[test]
    fn a_key_says_who_has_it() {
        let keys = ApiKeys::parse(FILE).unwrap();
        assert_eq!(keys.name_of("0123456789abcdef"), Some("ada"));
        assert_eq!(keys.name_of("fedcba9876543210"), Some("bob"));
        for wrong in ["", "0123456789abcdeF", "0123456789abcde", "ada"] {
            assert_eq!(keys.name_of(wrong), None, "{wrong:?}");
        }
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
        let refused = |text: &str| ApiKeys::parse(text).unwrap_err();
        assert!(refused("ada\n").starts_with("line 1: expected"));
        assert!(refused("ada short\n").starts_with("line 1: expected"));
        assert!(refused("\nada 0123456789abcdef too\n").starts_with("line 2: expected"));
        assert!(refused("a/da 0123456789abcdef\n").starts_with("line 1: expected"));
        assert!(refused("a 0123456789abcdef\na 0123456789abcdee\n").starts_with("line 2: the name"));
        assert!(refused("a 0123456789abcdef\nb 0123456789abcdef\n").starts_with("line 2: the key"));
        assert_eq!(refused("# nobody\n"), "has no key");
    }
}

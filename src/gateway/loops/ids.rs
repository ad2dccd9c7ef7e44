//! Ids that say what they stand for, so that no gateway has to remember them.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};

use crate::{
    protocol::{OperationKey, OperationSeq},
    types::{Digest, InvalidInput, RunId},
};

use super::super::refusal::Refused;

/// `run-N-op-M`: an operation by its run and its place in the run's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperationId {
    pub run: RunId,
    pub seq: OperationSeq,
}

/// A sampler by what it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SamplerId {
    /// `run-N`: the weights that a run publishes.
    Paired(RunId),
    /// `base-…`: a base model.
    Base(String),
    /// `path-…`: a sampler checkpoint.
    Checkpoint(String),
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-op-{}", self.run, self.seq.0)
    }
}

impl FromStr for OperationId {
    type Err = InvalidInput;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once("-op-").and_then(|(run, seq)| {
            Some(Self { run: run.parse().ok()?, seq: OperationSeq(seq.parse().ok()?) })
        });
        // Compared with how it is written: `op-07` would be a second name.
        parsed
            .filter(|id| id.to_string() == text)
            .ok_or_else(|| malformed("operation_id", "run-N-op-M", text))
    }
}

impl fmt::Display for SamplerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paired(run) => write!(f, "{run}"),
            Self::Base(model) => write!(f, "base-{}", BASE64.encode(model)),
            Self::Checkpoint(path) => write!(f, "path-{}", BASE64.encode(path)),
        }
    }
}

impl FromStr for SamplerId {
    type Err = InvalidInput;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = |encoded: &str| String::from_utf8(BASE64.decode(encoded).ok()?).ok();
        let parsed = match text.split_once('-') {
            Some(("base", encoded)) => name(encoded).map(Self::Base),
            Some(("path", encoded)) => name(encoded).map(Self::Checkpoint),
            _ => text.parse().ok().map(Self::Paired),
        };
        parsed.ok_or_else(|| malformed("sampler_id", "the id of a sampler", text))
    }
}

/// The key of a retry. The client's own are 32 hexadecimal digits, which are taken as they are;
/// anything else counts by its digest.
pub fn operation_key(header: &str) -> OperationKey {
    let mut key = [0; 16];
    if hex::decode_to_slice(header, &mut key).is_err() {
        key.copy_from_slice(&Digest::of(header.as_bytes()).0[..16]);
    }
    OperationKey(key)
}

/// A key of a request that came without one: it stays the same while the gateway repeats it.
pub fn fresh_key() -> Result<OperationKey, Refused> {
    let mut key = [0; 16];
    getrandom::fill(&mut key).map_err(|e| Refused::fault(format!("no randomness for a key: {e}")))?;
    Ok(OperationKey(key))
}

fn malformed(field: &str, expected: &str, text: &str) -> InvalidInput {
    let shown: String = text.chars().take(128).collect();
    InvalidInput::new(field, format!("expected {expected}, got {shown:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_named_in_one_way() {
        let id = OperationId { run: RunId(3), seq: OperationSeq(17) };
        assert_eq!(id.to_string(), "run-3-op-17");
        assert_eq!("run-3-op-17".parse(), Ok(id));
        for text in ["run-3-op-017", "run-3-op-", "run-3", "run-03-op-1", "x", "run-3-op--1", ""] {
            assert!(text.parse::<OperationId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_sampler_is_named_by_what_it_serves() {
        for id in [
            SamplerId::Paired(RunId(7)),
            SamplerId::Base("HuggingFaceTB/SmolLM2-135M-Instruct".into()),
            SamplerId::Checkpoint("bt://loops:run-1/sampler_weights/a".into()),
        ] {
            let text = id.to_string();
            assert_eq!(text.parse(), Ok(id));
            assert!(text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_'), "{text}");
        }
        for text in ["", "run-", "base-%%", "path-\u{e9}", "other-eA"] {
            assert!(text.parse::<SamplerId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn keys_of_the_client_are_taken_as_they_are() {
        assert_eq!(operation_key("000102030405060708090a0b0c0d0e0f").0[..3], [0, 1, 2]);
        assert_ne!(operation_key("a"), operation_key("b"));
        assert_eq!(operation_key("a"), operation_key("a"));
    }
}

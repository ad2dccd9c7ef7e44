use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Digest, InvalidInput};

/// Declares a numbered identity that is written `prefix-N`.
macro_rules! numbered_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidInput;

            fn from_str(s: &str) -> Result<Self, Self::Err> {
                // Compared with how it is written: `+7` and `07` would be second names.
                s.strip_prefix(concat!($prefix, "-"))
                    .and_then(|n| n.parse().ok())
                    .map(Self)
                    .filter(|id| id.to_string() == s)
                    .ok_or_else(|| InvalidInput::new(
                        concat!($prefix, "_id"),
                        format!(concat!("expected `", $prefix, "-N`, got {:?}"), s),
                    ))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

numbered_id!(
    /// One client's stay; runs are created in it.
    SessionId, "session"
);
numbered_id!(
    /// One training run: an adapter, its optimiser and its order of operations.
    RunId, "run"
);
numbered_id!(
    /// One saved checkpoint. Saving a name again makes a new id.
    CheckpointId, "checkpoint"
);

/// The identity of published weights: which run, which life of it, which step, which bytes.
///
/// The step alone is what users see as `policy_version`, but it is no identity: loading a
/// state sets it back to 0, so numbers repeat. `incarnation` rises with every
/// initialisation, load and fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PolicyId {
    /// The run that made the weights.
    pub run: RunId,
    /// Which life of the run: rises at init, load and fork.
    pub incarnation: u32,
    /// Optimiser steps taken in this life: the `policy_version` on the wire.
    pub step: u64,
    /// SHA-256 over the adapter's tensors, rank, alpha and targets.
    pub digest: Digest,
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}@{}#{}", self.run, self.incarnation, self.step, self.digest.short())
    }
}

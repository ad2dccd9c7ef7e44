//! All-reduce between GPUs, through NVIDIA's NCCL.
//!
//! NCCL carries the values alone. Everything else goes through the exchange that the ranks have in any case,
//! shared memory or QUIC ("control"): who is there, what each contributes, the identifier under which the
//! communicators meet. It names a rank that is missing, which NCCL can't, and nothing is given to NCCL
//! before every rank has said that it takes part. It is also where the ranks agree on whether NCCL has started
//! on all of them ([`start`]); if not, their sums go through control itself, and the same GPUs are left alone for a while.
//!
//! ```text
//!   control: who holds which partial sums?            a missing rank is named here
//!   GPU:     partial sums up ─► slice j of each to rank j ─► add in tree order ─► slice j to everyone ─► down
//!            a piece at a time; one queue, no wait of the host between                 (Reduction::Tree)
//!   or:      partial sums up ─► add mine ─► ncclAllReduce ─► down                      (Reduction::Fast)
//! ```
//!
//! The tree's sum has the bits of every other collective of this room; NCCL's own depends on how the ranks
//! are connected, and so is never replaced by another once the ranks have chosen it. The calling thread polls and never blocks in NCCL, so a deadline
//! is always seen; then the communicator is aborted, and the next generation makes another.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

mod agree;
mod memory;
mod rounds;

#[cfg(any(test, feature = "nccl"))]
mod abortable;
#[cfg(any(test, feature = "nccl"))]
mod failures;
#[cfg(any(test, feature = "nccl"))]
mod layout;
#[cfg(any(test, feature = "nccl"))]
mod link;
#[cfg(any(test, feature = "nccl"))]
mod program;
#[cfg(any(test, feature = "nccl"))]
mod reduce;
#[cfg(any(test, feature = "nccl"))]
mod start;

#[cfg(feature = "nccl")]
mod device;
#[cfg(all(test, feature = "nccl"))]
mod gpu;
#[cfg(test)]
mod host;

pub(super) use agree::join;
pub use memory::nccl_memory;
#[cfg(any(test, feature = "nccl"))]
use {
    link::{Fault, Link},
    reduce::Nccl,
};

/// In which order the gradients of ranks on several GPUs are added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reduction {
    /// In the tree of micro-batches: the bits are those of any number of ranks, on GPUs or not.
    #[default]
    Tree,
    /// As NCCL likes: less traffic, and the same bits only on the same GPUs in the same order.
    Fast,
}

/// Variables under which NCCL adds up in one order, whatever the size and the load. Processes that reduce
/// [fast](Reduction::Fast) are started with them.
pub const NCCL_IN_ONE_ORDER: [(&str, &str); 2] = [("NCCL_ALGO", "Ring"), ("NCCL_NVLS_ENABLE", "0")];

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tree => "deterministic",
            Self::Fast => "fast",
        })
    }
}

impl FromStr for Reduction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "deterministic" => Ok(Self::Tree),
            "fast" => Ok(Self::Fast),
            _ => Err("gradients are added up deterministic or fast".to_owned()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests;

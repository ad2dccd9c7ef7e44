//! `lockstep bench`: measures this machine, Lockstep on it and, where they are installed, its peers.
//!
//! ```text
//!   machine, limits   what the figures stand beside: CPU, memory, load; memcpy, quinn's bulk transfer
//!   worker            processes of this program that do the work, and how they are told
//!   allreduce         the collective, with real processes, over shared memory and QUIC
//! ```
//!
//! Every figure is the median of repeats after one that is not counted, and a report says the machine
//! and its load. Nothing else in the crate knows this room.

mod error;
mod figures;
mod machine;
mod worker;

mod limits;
mod peer;

mod allreduce;

pub use allreduce::{AllReduceConfig, AllReduceReport, AllReduceResult, Carrier, all_reduce};
pub use error::BenchError;
pub use limits::{Bulk, Memcpy};
pub use machine::Machine;
pub use worker::{WorkerKind, run_worker};

//! One rule a test; what many rules make of a history of accidents is `tests/simulation`.

pub(in crate::coordinator) mod desk;
mod history;
mod lost_ranks;
mod memory;
mod recovery;
mod runs;
mod samplers;

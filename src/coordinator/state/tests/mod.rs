//! One rule a test; what many rules make of a history of accidents is `tests/simulation`.

mod deletion;
pub(in crate::coordinator) mod desk;
mod evacuation;
mod history;
mod lost_ranks;
mod memory;
mod publishing;
mod quota;
mod recall;
mod recovery;
mod replicas;
mod runs;
mod samplers;
mod severed;
mod trust;

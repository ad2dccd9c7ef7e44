//! The operations of a decoder layer, forward and backward, on CPU slices.

mod buffer;
mod matrix;
mod threads;

pub use matrix::Matrix;
pub use threads::{CoreBudget, Lease, Priority, Team, lower_thread_priority};

//! The operations of a decoder layer, forward and backward, on CPU slices.

mod threads;

pub use threads::{CoreBudget, Lease, Priority, Team};

/// A frozen linear layer's weight, `[out, in]` row-major, f32.
#[derive(Debug, Clone)]
pub struct Matrix {
    pub out_features: usize,
    pub in_features: usize,
    pub data: std::sync::Arc<Vec<f32>>,
}

//! Low-rank adapters: where their matrices stand, how they begin, and their bytes.
//!
//! An adapted linear layer computes `y = W x + (alpha / rank) · B (A x)`, with A `[rank, in]`
//! and B `[out, rank]` (Hu et al., 2021). All matrices of an adapter are one flat vector of
//! f32, so that gradients, moments and weights are added, hashed and sent as slices.

pub(super) mod layout;

mod adapter;
pub(super) mod bytes;
mod init;
mod peft;

pub use adapter::Adapter;
pub use bytes::AdapterError;
pub use layout::{LoraEntry, LoraLayout};

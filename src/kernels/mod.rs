//! The operations of a decoder layer, forward and backward, on CPU slices.

mod amx;
mod attention;
mod blocks;
mod buffer;
mod dtype;
mod exp;
mod linear;
mod matrix;
mod norm;
mod pack;
mod pair;
mod rotary;
mod route;
mod rows;
mod simd;
mod softmax;
mod swiglu;
#[cfg(test)]
mod tests;
mod threads;
mod tile;

pub use amx::amx;
pub use blocks::{BLOCK, BlockRows, CodeBits};
pub use dtype::WeightDtype;
pub use matrix::Matrix;
pub use simd::{choose_path, numerics, path, paths};
pub use threads::{CoreBudget, Lease, Priority, Team, lower_thread_priority};

#[cfg(test)]
pub(crate) use amx::with_emulation as with_emulated_tiles;
pub(crate) use attention::{
    AttentionGradients, BLOCK as ATTENTION_BLOCK, Heads, KvBlocks, Span, append, attention,
    attention_backward,
};
pub(crate) use buffer::{Buffer, Shared};
pub(crate) use linear::{Adapted, Gradients, Layer, LowRank, down_projections, linear, linear_backward};
pub(crate) use norm::{rms_norm, rms_norm_backward};
pub(crate) use rotary::{RotaryTable, Turn};
pub(crate) use route::Router;
pub(crate) use rows::for_rows;
pub(crate) use softmax::{entropy, log_sum_exp, softmax_gradient};
pub(crate) use swiglu::{add, add_bias, swiglu, swiglu_backward};

//! A GPU: its memory, its matrix products and the kernels between them.
//!
//! ```text
//!   Gpu ── array, upload, download ──► Array      typed memory, shared, freed when nobody holds it
//!       ── product ─────────────────► cuBLAS      matrix products, f32 sums
//!       ── operations (ops.rs) ─────► kernels/    everything between two products
//! ```
//!
//! Two things stand behind it. CUDA, with the feature `cuda`: device, stream, memory and cuBLAS are
//! candle's, and `kernels/` is compiled by NVRTC when the GPU is opened, for the GPU that is there;
//! so neither building nor running needs nvcc for our kernels, and one binary serves every
//! generation. And an emulation ([`Gpu::emulated`]): the same source compiled by g++, a block's threads as
//! fibres. It is slow, and it is how the kernels and everything that launches them are tested on
//! machines without a GPU.
//!
//! A step that comes again and again is recorded and then done as one launch.
//!
//! Calls return before the GPU has done what they ask; a download waits. All work of a GPU goes through
//! one stream, so it happens in the order in which it was asked for. Threads take [turns](Gpu::turn).

mod array;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod emulator;
mod error;
mod graph;
mod heap;
mod kernels;
mod lists;
mod ops;
mod product;
#[cfg(any(test, feature = "cuda"))]
mod staging;
#[cfg(test)]
mod tests;
mod turns;

pub use array::{Array, Element};
pub use device::{DeviceChoice, Gpu};
pub use error::GpuError;
pub use turns::Turn;

pub(crate) use graph::Graph;
pub(crate) use heap::Pool;
pub(crate) use lists::{ListPlace, Lists};
pub(crate) use ops::{
    AttentionBackward, BACKWARD_KEYS, BACKWARD_ROWS, FORWARD_ROWS, HeadShape, MAX_HEAD_DIM, PAGE, Pages,
    RowDraw, RowStatistics, Spans, TargetRows,
};
pub(crate) use product::{Factor, Product};

//! The decoder on a GPU: the passes of `decoder/`, over arrays in its memory.
//!
//! Layer by layer as there, with the same adapters, the same losses above and the same formulas. What
//! differs: matrix products are cuBLAS's; activations between products have the element type of the
//! weights, and only the residual stream, its gradient, sums, logits and the adapter's gradient are f32;
//! a pass allocates what it needs from the device's pool instead of keeping a workspace.
//!
//! Over the bus go, down: tokens, positions and places of pages, the adapter when it is new, and the
//! derivative of the loss by each log-probability; up: the log-probabilities, and the adapter's
//! gradient at the end of a micro-batch. In decoding, what decides each draw down, and token and log-probability up.
//!
//! Legend of shapes as in `decoder/`; T is the element type of the weights.

mod adapter;
mod backward;
mod cache;
mod draw;
mod forward;
mod head;
mod linear;
mod memory;
mod plan;
mod steps;
#[cfg(test)]
mod tests;
mod weights;

pub use adapter::DeviceAdapter;
pub use backward::backward;
pub use cache::DeviceCache;
pub(super) use draw::draw_rows;
pub use forward::{DeviceSequence, DeviceTape, forward};
pub use head::{DeviceHeadGradient, head_logprobs};
pub use memory::{GpuFootprint, GpuRows};
pub use steps::StepCounts;
pub use weights::DeviceModel;

use crate::{collective::Reduction, gpu::DeviceChoice, kernels::WeightDtype};

/// How a node computes, whatever the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ComputeOptions {
    /// What computes.
    pub device: DeviceChoice,
    /// What base weights are held as.
    pub dtype: WeightDtype,
    /// Whether a training pass keeps each layer's input alone and computes the layer again on its way back:
    /// a fifth of the memory for a token (SmolLM2-135M), more time, and the same bits.
    pub activation_checkpointing: bool,
    /// Whether steps of decoding on a GPU are launched kernel by kernel, each time, instead of being recorded and replayed.
    pub plain_decoding: bool,
    /// In which order ranks on GPUs add up their gradients; those on CPUs know one.
    pub reduction: Reduction,
}

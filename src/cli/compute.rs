use clap::Args;
use lockstep::{gpu::DeviceChoice, kernels::WeightDtype, model::ComputeOptions};

/// How nodes compute.
#[derive(Args, Clone, Copy)]
pub struct Compute {
    /// What computes: cpu, cuda (or cuda:N; in a build with the feature `cuda`), auto (the first GPU if there is one,
    /// else the CPU), or emulated (the GPU's engine on the CPU, thousands of times slower, for trying it out; needs
    /// g++). All nodes that share a run compute on the same.
    #[arg(long, default_value_t, env = "LOCKSTEP_DEVICE")]
    device: DeviceChoice,
    /// What products with base weights are computed in: f32, which is nothing lost (bf16 and quantised files stay as
    /// small as they are), or bf16, which rounds the weights and what they are multiplied with: half the memory of f32,
    /// and up to twice the speed on CPUs with AVX512-BF16. Sums and adapters are f32 either way. One for all nodes of a
    /// cluster.
    #[arg(long, default_value_t, env = "LOCKSTEP_DTYPE")]
    dtype: WeightDtype,
    /// Keep each layer's input alone when training and compute the layer again on the way back: a fifth of the memory
    /// for a token, so longer sequences, in more time; the same bits.
    #[arg(long, env = "LOCKSTEP_ACTIVATION_CHECKPOINTING")]
    activation_checkpointing: bool,
}

impl Compute {
    pub fn options(self) -> ComputeOptions {
        let Self { device, dtype, activation_checkpointing } = self;
        ComputeOptions { device, dtype, activation_checkpointing }
    }
}

use clap::Args;
use lockstep::{collective::Reduction, gpu::DeviceChoice, kernels::WeightDtype, model::ComputeOptions};

/// How nodes compute.
#[derive(Args, Clone, Copy)]
pub struct Compute {
    /// What computes: cpu, cuda (or cuda:N; in a build with the feature `cuda`), auto (the first GPU if there is one,
    /// else the CPU), or emulated (the GPU's engine on the CPU, thousands of times slower, for trying it out; needs
    /// g++). All nodes that share a run compute on the same. Several nodes that are started together take a GPU each,
    /// from cuda:N on.
    #[arg(long, default_value_t, env = "LOCKSTEP_DEVICE")]
    device: DeviceChoice,
    /// What products with base weights are computed in: f32, which is nothing lost (bf16 and quantised files stay as
    /// small as they are), or bf16, which rounds the weights and what they are multiplied with: half the memory of f32,
    /// and up to twice the speed on CPUs with a fast AVX512-BF16. Sums and adapters are f32 either way. One for all nodes of a
    /// cluster.
    #[arg(long, default_value_t, env = "LOCKSTEP_DTYPE")]
    dtype: WeightDtype,
    /// Keep each layer's input alone when training and compute the layer again on the way back: a fifth of the memory
    /// for a token, so longer sequences, in more time; the same bits.
    #[arg(long, env = "LOCKSTEP_ACTIVATION_CHECKPOINTING")]
    activation_checkpointing: bool,
    /// On a GPU, launch every step of decoding kernel by kernel instead of replaying recorded ones as one launch each:
    /// slower, for finding out whether a fault is theirs.
    #[arg(long, env = "LOCKSTEP_PLAIN_DECODING")]
    plain_decoding: bool,
    /// How ranks with a GPU each add up their gradients through NCCL: deterministic, in the tree of micro-batches, with
    /// the bits of any number of ranks; or fast, by ncclAllReduce, with the same bits only on the same GPUs: a run that
    /// loses one may not come out as journaled when it is repeated, and is then refused. One for all nodes of a run.
    #[arg(long, default_value_t, env = "LOCKSTEP_REDUCE")]
    reduce: Reduction,
}

impl Compute {
    pub fn options(self) -> ComputeOptions {
        let Self { device, dtype, activation_checkpointing, plain_decoding, reduce: reduction } = self;
        ComputeOptions { device, dtype, activation_checkpointing, plain_decoding, reduction }
    }
}

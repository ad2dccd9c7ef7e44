use clap::Args;
use lockstep::{kernels::WeightDtype, model::ComputeOptions};

/// How nodes compute.
#[derive(Args, Clone, Copy)]
pub struct Compute {
    /// What base weights are rounded to: f32, which is nothing lost (bf16 and quantised files stay as small as they
    /// are), or bf16, which makes f32 files half as large. Sums, activations and adapters are f32
    /// either way. One for all nodes of a cluster.
    #[arg(long, default_value_t, env = "LOCKSTEP_DTYPE")]
    dtype: WeightDtype,
    /// Keep each layer's input alone when training and compute the layer again on the way back: a fifth of the memory
    /// for a token, so longer sequences, in more time; the same bits.
    #[arg(long, env = "LOCKSTEP_ACTIVATION_CHECKPOINTING")]
    activation_checkpointing: bool,
}

impl Compute {
    pub fn options(self) -> ComputeOptions {
        ComputeOptions { dtype: self.dtype, activation_checkpointing: self.activation_checkpointing }
    }
}

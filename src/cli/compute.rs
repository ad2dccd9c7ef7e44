use clap::Args;
use lockstep::{kernels::WeightDtype, model::ComputeOptions};

/// How nodes compute.
#[derive(Args, Clone, Copy)]
pub struct Compute {
    /// What base weights are held as: f32, or bf16 in half the memory. Sums, activations and adapters are f32
    /// either way. One for all nodes of a cluster.
    #[arg(long, default_value_t, env = "LOCKSTEP_DTYPE")]
    dtype: WeightDtype,
}

impl Compute {
    pub fn options(self) -> ComputeOptions {
        ComputeOptions { dtype: self.dtype }
    }
}

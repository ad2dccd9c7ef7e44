use crate::kernels::WeightDtype;

/// How a node computes, whatever the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ComputeOptions {
    /// What base weights are held as.
    pub dtype: WeightDtype,
}

use crate::types::{ErrorKind, OperationError};

/// Why a GPU cannot be had, or did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// Built without the feature `cuda`.
    #[error("this lockstep was built without CUDA: build with `--features cuda`, or use `--device cpu`")]
    NotBuilt,
    /// There is no such GPU, or its libraries are not there.
    #[error("GPU {ordinal} cannot be used: {problem}")]
    Unavailable { ordinal: usize, problem: String },
    /// The kernels did not compile; on a GPU a defect of ours, in an emulation perhaps a missing g++.
    #[error("the GPU's kernels did not compile: {problem}")]
    Kernels { problem: String },
    /// Memory is short.
    #[error("the GPU has no {bytes} bytes left: {problem}")]
    OutOfMemory { bytes: usize, problem: String },
    /// A call of the driver or a library failed; the GPU is of no further use to this process.
    #[error("the GPU failed in {call}: {problem}")]
    Failed { call: &'static str, problem: String },
    /// A model or batch that the kernels do not cover.
    #[error("`{field}` {problem}")]
    Unsupported { field: &'static str, problem: String },
}

impl From<GpuError> for OperationError {
    fn from(error: GpuError) -> Self {
        let kind = match &error {
            GpuError::OutOfMemory { .. } => ErrorKind::ResourceExhausted,
            GpuError::Unsupported { .. } => ErrorKind::InvalidInput,
            GpuError::NotBuilt | GpuError::Unavailable { .. } => ErrorKind::Unavailable,
            GpuError::Kernels { .. } | GpuError::Failed { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

//! The public data types: what a training loop hands in, and what it gets back.
//!
//! They exist once for Rust callers and, with the same meaning, as the JSON of the HTTP
//! dialects (serde). Nothing here knows a transport, an actor or a file: a value is checked
//! where it is made, so that whatever receives one need not check it again.
//!
//! Reading order: identities, tensors and inputs, configuration, results, handles.

mod digest;
mod error;
mod ids;

mod input;
mod tensor;

mod adam;
mod lora;
mod loss;
mod sampling;
mod wandb;

mod checkpoint;
mod output;
mod sample;
mod service;

mod future;

pub use adam::AdamParams;
pub use checkpoint::{Checkpoint, CheckpointFile, CheckpointFilesResponse, CheckpointPath, CheckpointTarget};
pub use digest::{Digest, Hasher};
pub use error::{ErrorKind, InvalidInput, OperationError};
pub use future::{ForwardBackwardFuture, OperationCompleter, OperationFuture, ResultTimeout};
pub use ids::{CheckpointId, PolicyId, RunId, SessionId};
pub use input::{Datum, EncodedTextChunk, ImageChunk, ImageFormat, ModelInput, ModelInputChunk};
pub use lora::{LoraConfig, LoraTarget, NoDropout};
pub use loss::{CheckedDatum, CheckedTarget, DataLimits, LossFn, LossInputs, LossSetting, LossSpec};
pub use output::{
    DatumOutput, ForwardBackwardOutput, InitTrainerServerResponse, LoadWeightsResponse, OptimStepResponse,
    SaveWeightsForSamplerResponse, SaveWeightsResponse,
};
pub use sample::{SampleResponse, SampleResult, SampledSequence, StopReason, TopkLogprobs};
pub use sampling::{MAX_STOP_BYTES, MAX_STOPS, MAX_TOPK_LOGPROBS, SampleFlags, SamplingParams, Stop};
pub use service::{ServerCapabilities, SupportedModel};
pub use tensor::{Dtype, TensorData, TensorValues};
pub use wandb::WandbConfig;

#[cfg(test)]
pub(crate) mod arbitrary;
#[cfg(test)]
mod tests;

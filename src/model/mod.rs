//! Decoder, LoRA, losses, optimiser, drawing and loaders: the mathematics, which knows no actor.

mod compute_options;
mod config;
mod digest_cache;
mod error;
mod files;
mod library;
mod pack;
mod source;
mod text;
mod weights;

mod decoder;
pub mod device;
mod draw;
mod kv_cache;
mod memory;
mod passes;

mod lora;
mod loss;
mod merge;
mod micro_batch;
mod param_vector;
mod state;

pub mod tiny;

pub use compute_options::ComputeOptions;
pub use config::{ExpertsConfig, Family, ModelConfig, RopeScaling};
pub use decoder::{
    AdapterRows, Batch, BatchSequence, HeadGradient, HeadRequest, HeadScores, Tape, Workspace, backward,
    forward, head_logits, head_logprobs,
};
pub use device::{GpuFootprint, GpuRows, StepCounts};
pub use draw::{Decoding, DrawBuffers, DrawKey, Drawn, Filter, MIN_LOGPROB, NotFinite};
pub use error::ModelError;
pub use kv_cache::KvCache;
pub use library::Library;
pub use lora::{Adapter, AdapterError, LoraEntry, LoraLayout};
pub use memory::{Footprint, RunMemory};
pub use merge::merge_into_weights;
pub use micro_batch::{Example, MicroBatchOutput, cut_micro_batches, prepare, run_micro_batch};
pub use pack::{PackError, PackFile};
pub use param_vector::ParamVector;
pub use passes::{DrawRow, HiddenStates, SequenceCache, SequenceRows, draw_rows, extend, logprobs_of};
pub use source::ModelSource;
pub use state::{GradientKind, TrainState};
pub use text::{ChatMessage, TextCodec};
pub(crate) use weights::shards_of_index;
pub use weights::{
    BaseModel, BaseWeights, ExpertsWeights, LayerWeights, Mlp, MlpWeights, Place, QkNorm, QkvBias,
    base_digest,
};

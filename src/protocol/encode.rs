//! bincode for the public types, written here so that `types/` knows no wire.
//!
//! The order of fields and the numbers of variants in this file are the wire format.

use bincode::{
    BorrowDecode, Decode, Encode,
    de::{BorrowDecoder, Decoder},
    enc::Encoder,
    error::{DecodeError, EncodeError},
};

use crate::{
    model::{Footprint, GpuFootprint, GpuRows},
    types::{
        AdamParams, Checkpoint, CheckpointFile, CheckpointFilesResponse, CheckpointId, CheckpointTarget,
        Datum, Digest, Dtype, EncodedTextChunk, ErrorKind, ForwardBackwardOutput, ImageChunk, ImageFormat,
        InitTrainerServerResponse, LoadWeightsResponse, LoraConfig, LoraTarget, LossFn, LossSpec, ModelInput,
        ModelInputChunk, OperationError, OptimStepResponse, PolicyId, RunId, SampleFlags, SampleResult,
        SampledSequence, SamplingParams, SaveWeightsForSamplerResponse, SaveWeightsResponse,
        ServerCapabilities, SessionId, Stop, StopReason, SupportedModel, TensorData, TensorValues,
    },
};

/// `BorrowDecode` by way of `Decode`: nothing here borrows from the input.
macro_rules! borrow_as_owned {
    ($type:ty) => {
        impl<'de, C> BorrowDecode<'de, C> for $type {
            fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(d: &mut D) -> Result<Self, DecodeError> {
                <Self as Decode<C>>::decode(d)
            }
        }
    };
}

/// A struct is its fields, in the order given.
macro_rules! wire_struct {
    ($type:ident { $($field:tt),* }) => {
        impl Encode for $type {
            fn encode<E: Encoder>(&self, e: &mut E) -> Result<(), EncodeError> {
                $(Encode::encode(&self.$field, e)?;)*
                Ok(())
            }
        }
        impl<C> Decode<C> for $type {
            fn decode<D: Decoder<Context = C>>(d: &mut D) -> Result<Self, DecodeError> {
                Ok(Self { $($field: Decode::decode(d)?),* })
            }
        }
        borrow_as_owned!($type);
    };
}

/// An enum is its variant's number (a `u32`), then the variant's one field if it has one.
macro_rules! wire_enum {
    ($type:ident { $($number:literal => $variant:ident $(($inner:ident))?),* }) => {
        impl Encode for $type {
            fn encode<E: Encoder>(&self, e: &mut E) -> Result<(), EncodeError> {
                match self {
                    $(Self::$variant $(($inner))? => {
                        Encode::encode(&($number as u32), e)?;
                        $(Encode::encode($inner, e)?;)?
                    })*
                }
                Ok(())
            }
        }
        impl<C> Decode<C> for $type {
            fn decode<D: Decoder<Context = C>>(d: &mut D) -> Result<Self, DecodeError> {
                match <u32 as Decode<C>>::decode(d)? {
                    $($number => Ok(Self::$variant $(({ let $inner = Decode::decode(d)?; $inner }))?),)*
                    _ => Err(DecodeError::Other(concat!("unknown variant of ", stringify!($type)))),
                }
            }
        }
        borrow_as_owned!($type);
    };
}

wire_struct!(Digest { 0 });
wire_struct!(SessionId { 0 });
wire_struct!(RunId { 0 });
wire_struct!(CheckpointId { 0 });
wire_struct!(PolicyId { run, incarnation, step, digest });
wire_struct!(OperationError { kind, message });
wire_enum!(ErrorKind {
    0 => InvalidInput, 1 => NotFound, 2 => NotFinite, 3 => ResourceExhausted, 4 => Unavailable,
    5 => DeadlineExceeded, 6 => PermissionDenied, 7 => Internal
});

wire_enum!(Dtype {
    0 => Float32, 1 => Float16, 2 => Bfloat16, 3 => Float64, 4 => Int64, 5 => Int32, 6 => Int16, 7 => Int8,
    8 => Uint8, 9 => Uint32, 10 => Bool
});
wire_enum!(TensorValues { 0 => F32(values), 1 => F64(values), 2 => I64(values) });

impl Encode for TensorData {
    fn encode<E: Encoder>(&self, e: &mut E) -> Result<(), EncodeError> {
        self.values().encode(e)?;
        self.dtype().encode(e)?;
        self.shape().encode(e)
    }
}

impl<C> Decode<C> for TensorData {
    fn decode<D: Decoder<Context = C>>(d: &mut D) -> Result<Self, DecodeError> {
        let (values, dtype, shape) = (Decode::decode(d)?, Decode::decode(d)?, Decode::decode(d)?);
        Self::new(values, dtype, shape).map_err(|e| DecodeError::OtherString(e.to_string()))
    }
}
borrow_as_owned!(TensorData);

wire_struct!(EncodedTextChunk { tokens });
wire_enum!(ImageFormat { 0 => Png, 1 => Jpeg });
wire_struct!(ImageChunk { data, format, expected_tokens });
wire_enum!(ModelInputChunk { 0 => EncodedText(chunk), 1 => Image(chunk) });
wire_struct!(ModelInput { chunks });
wire_struct!(Datum { model_input, loss_fn_inputs });

wire_struct!(AdamParams { learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm });
wire_enum!(LoraTarget {
    0 => QProj, 1 => KProj, 2 => VProj, 3 => OProj, 4 => GateProj, 5 => UpProj, 6 => DownProj, 7 => LmHead
});
wire_struct!(LoraConfig { rank, alpha, seed, targets });
wire_struct!(Footprint { weights, adapter_values, row, row_of_rank, workspace, checkpointed });
wire_struct!(GpuRows { kept, kept_of_rank, passing, passing_of_rank });
wire_struct!(GpuFootprint {
    weights,
    steps,
    element,
    rows,
    checkpointed,
    head_rows,
    head,
    head_of_rank,
    workspace
});
wire_enum!(LossFn {
    0 => CrossEntropy, 1 => ImportanceSampling, 2 => Ppo, 3 => Cispo, 4 => Dro, 5 => Dppo, 6 => Dpo, 7 => Gspo,
    8 => StableReinforce
});
wire_struct!(LossSpec { loss_fn, config, skip_token_normalization, top_k_logprobs });
wire_enum!(Stop { 0 => Text(text), 1 => Texts(texts), 2 => Tokens(tokens) });
wire_struct!(SamplingParams { temperature, top_p, top_k, max_tokens, seed, stop });
wire_struct!(SampleFlags { prompt_logprobs, topk_prompt_logprobs });

wire_struct!(ForwardBackwardOutput { loss, loss_fn_output_type, loss_fn_outputs, metrics });
wire_struct!(OptimStepResponse { metrics });
wire_struct!(SaveWeightsResponse { path });
wire_struct!(SaveWeightsForSamplerResponse { path, version });
wire_struct!(LoadWeightsResponse { step });
wire_struct!(InitTrainerServerResponse { step, lora_rank });
wire_enum!(StopReason { 0 => Stop, 1 => Length });
wire_struct!(SampledSequence { tokens, logprobs, stop_reason });
wire_struct!(SampleResult { sequences, policy_version, prompt_logprobs, topk_prompt_logprobs });

wire_enum!(CheckpointTarget { 0 => Trainer, 1 => Sampler });
wire_struct!(Checkpoint {
    id,
    run_id,
    checkpoint_id,
    checkpoint_type,
    target,
    created_at_ms,
    base_model,
    lora_rank,
    lora_alpha,
    step,
    size_bytes,
    path,
    expires_at_ms
});
wire_struct!(CheckpointFile { url, relative_file_name, node_rank, size_bytes, last_modified_ms });
wire_struct!(CheckpointFilesResponse { presigned_urls, next_page_token, total_count });
wire_struct!(SupportedModel { model_name, max_context_length, devices });
wire_struct!(ServerCapabilities { supported_models });

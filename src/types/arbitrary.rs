//! Any value of each public type, for property tests here and in `protocol/`.

use std::collections::BTreeMap;

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;

pub(crate) use super::tensor::any_tensor;

pub(crate) fn any_f64() -> impl Strategy<Value = f64> {
    prop::num::f64::NORMAL | prop::num::f64::ZERO
}

pub(crate) fn any_f32() -> impl Strategy<Value = f32> {
    prop::num::f32::NORMAL | prop::num::f32::ZERO
}

pub(crate) fn any_digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn any_metrics() -> impl Strategy<Value = BTreeMap<String, f64>> {
    prop::collection::btree_map(".{0,8}", any_f64(), 0..4)
}

pub(crate) fn any_policy() -> impl Strategy<Value = PolicyId> {
    (any::<u64>(), any::<u32>(), any::<u64>(), any_digest())
        .prop_map(|(run, incarnation, step, digest)| PolicyId { run: RunId(run), incarnation, step, digest })
}

pub(crate) fn any_error() -> impl Strategy<Value = OperationError> {
    let kinds = [
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
        ErrorKind::NotFinite,
        ErrorKind::ResourceExhausted,
        ErrorKind::Unavailable,
        ErrorKind::DeadlineExceeded,
        ErrorKind::PermissionDenied,
        ErrorKind::Internal,
    ];
    (select(kinds.to_vec()), ".*").prop_map(|(kind, message)| OperationError { kind, message })
}

pub(crate) fn any_model_input() -> impl Strategy<Value = ModelInput> {
    let text =
        vec(any::<u32>(), 0..8).prop_map(|tokens| ModelInputChunk::EncodedText(EncodedTextChunk { tokens }));
    let format = select(&[ImageFormat::Png, ImageFormat::Jpeg][..]);
    let image = (vec(any::<u8>(), 0..8), format, any::<u32>()).prop_map(|(data, format, expected_tokens)| {
        ModelInputChunk::Image(ImageChunk { data, format, expected_tokens })
    });
    vec(prop_oneof![text, image], 0..4).prop_map(|chunks| ModelInput { chunks })
}

pub(crate) fn any_outputs() -> impl Strategy<Value = BTreeMap<String, TensorData>> {
    prop::collection::btree_map("[a-z_]{1,8}", any_tensor(), 0..3)
}

pub(crate) fn any_datum() -> impl Strategy<Value = Datum> {
    (any_model_input(), any_outputs())
        .prop_map(|(model_input, loss_fn_inputs)| Datum { model_input, loss_fn_inputs })
}

pub(crate) fn any_adam() -> impl Strategy<Value = AdamParams> {
    (any_f64(), any_f64(), any_f64(), any_f64(), any_f64(), any_f64()).prop_map(
        |(learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm)| AdamParams {
            learning_rate,
            beta1,
            beta2,
            eps,
            weight_decay,
            grad_clip_norm,
        },
    )
}

pub(crate) fn any_lora() -> impl Strategy<Value = LoraConfig> {
    (any::<u32>(), any_f32(), any::<u64>(), prop::sample::subsequence(LoraTarget::ALL.to_vec(), 0..=8))
        .prop_map(|(rank, alpha, seed, targets)| LoraConfig { rank, alpha, seed, targets })
}

pub(crate) fn any_loss() -> impl Strategy<Value = LossSpec> {
    (select(&LossFn::ALL[..]), any_metrics(), any::<bool>(), any::<u32>()).prop_map(
        |(loss_fn, config, skip_token_normalization, top_k_logprobs)| LossSpec {
            loss_fn,
            config,
            skip_token_normalization,
            top_k_logprobs,
        },
    )
}

pub(crate) fn any_stop() -> impl Strategy<Value = Stop> {
    prop_oneof![
        ".{0,8}".prop_map(Stop::Text),
        vec(".{0,8}", 0..4).prop_map(Stop::Texts),
        // Empty lists are `Texts` in JSON.
        vec(any::<u32>(), 1..4).prop_map(Stop::Tokens),
    ]
}

pub(crate) fn any_sampling() -> impl Strategy<Value = SamplingParams> {
    let limits = (option::of(any::<u32>()), option::of(any::<u64>()), option::of(any_stop()));
    (any_f64(), any_f64(), any::<i64>(), limits).prop_map(
        |(temperature, top_p, top_k, (max_tokens, seed, stop))| SamplingParams {
            temperature,
            top_p,
            top_k,
            max_tokens,
            seed,
            stop,
        },
    )
}

pub(crate) fn any_flags() -> impl Strategy<Value = SampleFlags> {
    (any::<bool>(), any::<u32>()).prop_map(|(prompt_logprobs, topk_prompt_logprobs)| SampleFlags {
        prompt_logprobs,
        topk_prompt_logprobs,
    })
}

pub(crate) fn any_output() -> impl Strategy<Value = ForwardBackwardOutput> {
    (any_f64(), ".{0,8}", vec(any_outputs(), 0..3), any_metrics()).prop_map(
        |(loss, loss_fn_output_type, loss_fn_outputs, metrics)| ForwardBackwardOutput {
            loss,
            loss_fn_output_type,
            loss_fn_outputs,
            metrics,
        },
    )
}

pub(crate) fn any_optim_step() -> impl Strategy<Value = OptimStepResponse> {
    any_metrics().prop_map(|metrics| OptimStepResponse { metrics })
}

pub(crate) fn any_sequence() -> impl Strategy<Value = SampledSequence> {
    let reasons = select(&[StopReason::Stop, StopReason::Length][..]);
    (vec(any::<u32>(), 0..5), option::of(vec(any_f32(), 0..5)), reasons)
        .prop_map(|(tokens, logprobs, stop_reason)| SampledSequence { tokens, logprobs, stop_reason })
}

pub(crate) fn any_sample() -> impl Strategy<Value = SampleResult> {
    let topk = vec(option::of(vec((any::<u32>(), any_f32()), 0..3)), 0..4);
    let prompt = vec(option::of(any_f32()), 0..4);
    (vec(any_sequence(), 0..3), any::<u64>(), option::of(prompt), option::of(topk)).prop_map(
        |(sequences, policy_version, prompt_logprobs, topk_prompt_logprobs)| SampleResult {
            sequences,
            policy_version,
            prompt_logprobs,
            topk_prompt_logprobs,
        },
    )
}

pub(crate) fn any_checkpoint() -> impl Strategy<Value = Checkpoint> {
    let target = select(&[CheckpointTarget::Trainer, CheckpointTarget::Sampler][..]);
    let ids = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
    (ids, vec(".{0,8}", 4), target, any::<u32>(), any_f32()).prop_map(
        |((id, run, created_at_ms, step, size_bytes), texts, target, lora_rank, lora_alpha)| Checkpoint {
            id: CheckpointId(id),
            run_id: RunId(run),
            checkpoint_id: texts[0].clone(),
            checkpoint_type: texts[1].clone(),
            target,
            created_at_ms,
            base_model: texts[2].clone(),
            lora_rank,
            lora_alpha,
            step,
            size_bytes,
            path: texts[3].clone(),
            expires_at_ms: (lora_rank % 2 == 0).then_some(size_bytes),
        },
    )
}

pub(crate) fn any_checkpoint_files() -> impl Strategy<Value = CheckpointFilesResponse> {
    let file = (".{0,8}", ".{0,8}", any::<u32>(), any::<u64>(), any::<u64>()).prop_map(
        |(url, relative_file_name, node_rank, size_bytes, last_modified_ms)| CheckpointFile {
            url,
            relative_file_name,
            node_rank,
            size_bytes,
            last_modified_ms,
        },
    );
    (vec(file, 0..3), option::of(any::<u64>()), any::<u64>()).prop_map(
        |(presigned_urls, next_page_token, total_count)| CheckpointFilesResponse {
            presigned_urls,
            next_page_token,
            total_count,
        },
    )
}

pub(crate) fn any_capabilities() -> impl Strategy<Value = ServerCapabilities> {
    let model = (".{0,8}", option::of(any::<u32>()), vec(".{0,8}", 0..3)).prop_map(
        |(model_name, max_context_length, devices)| SupportedModel {
            model_name,
            max_context_length,
            devices,
        },
    );
    vec(model, 0..3).prop_map(|supported_models| ServerCapabilities { supported_models })
}

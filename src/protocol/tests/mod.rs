//! Every variant of every message there and back, and what is none of them.

mod properties;

use std::{collections::BTreeMap, fmt::Debug};

use bincode::{Decode, Encode};

use crate::{
    model::{ComputeOptions, tiny},
    types::*,
};

use super::*;

fn digest() -> Digest {
    Digest::of(b"bytes")
}

fn blob() -> BlobRef {
    BlobRef { digest: digest(), size: 1 << 40 }
}

fn error() -> OperationError {
    OperationError::new(ErrorKind::Unavailable, "node-3 was lost")
}

fn policy() -> PolicyId {
    PolicyId { run: RunId(1), incarnation: 2, step: 300, digest: digest() }
}

fn token() -> OpToken {
    OpToken {
        run: RunId(1),
        epoch: Epoch(2),
        generation: Generation(3),
        seq: OperationSeq(u64::MAX),
        incarnation: 5,
    }
}

fn payloads() -> Vec<Payload> {
    vec![Payload::Inline(vec![1, 2, 3]), Payload::Blob(blob())]
}

fn operations() -> Vec<Operation> {
    let (inline, stored) = (payloads()[0].clone(), payloads()[1].clone());
    let loss = LossSpec { config: [("beta".into(), 0.1)].into(), ..LossSpec::new(LossFn::CrossEntropy) };
    let source = LoadSource { target: CheckpointTarget::Trainer, blob: blob() };
    vec![
        Operation::Init { lora: LoraConfig::new(16, 7) },
        Operation::Forward { loss: loss.clone(), data: inline },
        Operation::ForwardBackward { loss, data: stored },
        Operation::OptimStep { adam: AdamParams::default() },
        Operation::SaveState { name: "a".into(), ttl_seconds: Some(60) },
        Operation::SaveWeightsForSampler { name: "b".into(), publish: true, ttl_seconds: None },
        Operation::LoadState { path: "bt://".into(), with_optimizer: false, source: Some(source) },
    ]
}

fn results() -> Vec<OperationResult> {
    let path = || "bt://loops:run-1/weights/a".to_owned();
    vec![
        OperationResult::Init(InitTrainerServerResponse { step: 0, lora_rank: 16 }),
        OperationResult::ForwardBackward(Payload::Blob(blob())),
        OperationResult::OptimStep(OptimStepResponse { metrics: [("step".into(), 1.0)].into() }),
        OperationResult::SaveState(SaveWeightsResponse { path: path() }),
        OperationResult::SaveWeightsForSampler(SaveWeightsForSamplerResponse { path: path(), version: 4 }),
        OperationResult::LoadState(LoadWeightsResponse { step: 9 }),
    ]
}

fn sample() -> SampleResult {
    let sequence = SampledSequence {
        tokens: vec![1, 70_000],
        logprobs: Some(vec![-0.5, -1.5]),
        stop_reason: StopReason::Length,
    };
    SampleResult {
        sequences: vec![sequence],
        policy_version: 300,
        prompt_logprobs: Some(vec![None, Some(-2.0)]),
        topk_prompt_logprobs: Some(vec![None, Some(vec![(5, -0.1)])]),
    }
}

fn call() -> Call {
    Call {
        quota: Quota { runs: Some(1), queued_operations: None, checkpoint_bytes: Some(u64::MAX) },
        trace: Some(Trace { trace_id: [1; 16], request_id: [2; 8] }),
        key: Some(OperationKey([3; 16])),
    }
}

fn create() -> CreateRun {
    CreateRun {
        session: SessionId(1),
        base_model: "org/model".into(),
        lora: LoraConfig::new(8, u64::MAX),
        replicas: Some(2),
        max_seq_len: None,
        micro_batch_tokens: Some(1024),
        name: None,
    }
}

fn run_info() -> RunInfo {
    RunInfo {
        run: RunId(1),
        session: SessionId(2),
        owner: Some("ada".into()),
        name: "a run".into(),
        base_model: "org/model".into(),
        lora: LoraConfig::new(8, 1),
        replicas: 3,
        max_seq_len: 4,
        vocab_size: Some(259),
        micro_batch_tokens: 5,
        incarnation: 6,
        step: 7,
        live: Some(policy()),
        live_since_ms: 9,
        initial: Some(policy()),
        accepted: 10,
        queued: 8,
        phase: "ready".into(),
    }
}

fn targets() -> Vec<SampleTarget> {
    vec![
        SampleTarget::Base { base_model: "org/model".into() },
        SampleTarget::Live { run: RunId(1), min_version: 2 },
        SampleTarget::Policy(policy()),
        SampleTarget::Checkpoint { path: "bt://".into() },
        SampleTarget::Initial { run: RunId(1) },
        SampleTarget::LiveOrCheckpoint { run: RunId(1), min_version: 2, path: "bt://".into() },
    ]
}

fn params() -> SamplingParams {
    SamplingParams { stop: Some(Stop::Texts(vec!["END".into()])), ..SamplingParams::default() }
}

fn client_requests() -> Vec<ClientRequest> {
    let submit = |operation| SubmitOperation { run: RunId(1), key: OperationKey([9; 16]), operation };
    let request = SampleRequest {
        target: targets().swap_remove(2),
        prompt: ModelInput::from_ints(vec![1, 2, 3]),
        num_samples: 4,
        params: params(),
        flags: SampleFlags { prompt_logprobs: true, topk_prompt_logprobs: 5 },
    };
    vec![
        ClientRequest::CreateSession,
        ClientRequest::Capabilities,
        ClientRequest::CreateRun(create()),
        ClientRequest::Submit(submit(operations().swap_remove(2))),
        ClientRequest::WaitOperation { run: RunId(1), seq: OperationSeq(2), hold_ms: 30_000 },
        ClientRequest::Sample(request),
        ClientRequest::RunInfo { run: RunId(1) },
        ClientRequest::ListCheckpoints { run: None },
        ClientRequest::CheckpointFiles {
            checkpoint: CheckpointId(1),
            page_size: 2,
            page_token: 3,
            presigned: true,
        },
        ClientRequest::Tokenizer { base_model: "org/model".into() },
        ClientRequest::ClusterStatus,
        ClientRequest::FindRun { name: "local:a".into() },
        ClientRequest::CreateSessionFor { owner: "ada".into() },
        ClientRequest::SessionOwner { session: SessionId(1) },
        ClientRequest::DeleteCheckpoint { checkpoint: CheckpointId(1) },
        ClientRequest::DeleteRun { run: RunId(1) },
        ClientRequest::ForkRun { run: RunId(1), step: 2, name: Some("b".into()) },
        ClientRequest::ReplayRun { run: RunId(1), step: 2 },
        ClientRequest::BackUp,
        ClientRequest::DrainNode { name: "node".into(), drain: true },
        ClientRequest::Revoke { role: Some("node".into()), name: "a".into() },
        ClientRequest::RotateCa { finish: true },
    ]
}

fn statuses() -> Vec<OperationStatus> {
    vec![
        OperationStatus::Pending,
        OperationStatus::Done(results().swap_remove(2)),
        OperationStatus::Failed(error()),
    ]
}

fn client_responses() -> Vec<ClientResponse> {
    let model = SupportedModel {
        model_name: "org/model".into(),
        max_context_length: Some(8192),
        devices: vec!["cpu".into()],
    };
    let node = NodeStatus {
        name: "n".into(),
        pid: 1,
        trainers: 2,
        samplers: 3,
        numerics: "avx2".into(),
        certified_until: Some(4),
        drain: Some(NodeDrain { runs: 1, samples: 2 }),
    };
    let trust = TrustStatus { rotation: Some(vec!["node a".into()]), revoked: vec!["client b".into()] };
    let checkpoint = Checkpoint {
        id: CheckpointId(1),
        run_id: RunId(2),
        checkpoint_id: "a".into(),
        checkpoint_type: "lora".into(),
        target: CheckpointTarget::Sampler,
        created_at_ms: 3,
        base_model: "org/model".into(),
        lora_rank: 8,
        lora_alpha: 32.0,
        step: 4,
        size_bytes: 5,
        path: "bt://".into(),
        expires_at_ms: Some(6),
    };
    let file = CheckpointFile {
        url: "blob:".into(),
        relative_file_name: ADAPTER_FILE.into(),
        node_rank: 0,
        size_bytes: 1,
        last_modified_ms: 2,
    };
    let files =
        CheckpointFilesResponse { presigned_urls: vec![file], next_page_token: Some(1), total_count: 2 };
    vec![
        ClientResponse::Session(SessionId(1)),
        ClientResponse::Capabilities(ServerCapabilities { supported_models: vec![model] }),
        ClientResponse::Run(run_info()),
        ClientResponse::Accepted { seq: OperationSeq(1) },
        ClientResponse::Operation(OperationStatus::Pending),
        ClientResponse::Sample { result: sample(), policy: Some(policy()) },
        ClientResponse::Checkpoints(vec![checkpoint]),
        ClientResponse::CheckpointFiles(files),
        ClientResponse::Blob(blob()),
        ClientResponse::Cluster(ClusterStatus {
            nodes: vec![node],
            drained_away: vec!["m".into()],
            trust,
            runs: vec![run_info()],
        }),
        ClientResponse::Error(error()),
        ClientResponse::SessionOwner(Some("ada".into())),
        ClientResponse::Deleted,
        ClientResponse::Replayed(Replayed {
            from_step: 8,
            to_step: 12,
            operations: 8,
            difference: Some("operation 9".into()),
        }),
    ]
}

fn hello() -> NodeHello {
    let model = ModelOffer {
        name: "org/model".into(),
        aliases: vec!["model".into()],
        digest: digest(),
        context: 8192,
        vocab: 49_152,
        tokenizer: digest(),
        tokenizer_size: 1,
        footprint: tiny::config().footprint(&ComputeOptions::default()),
        gpu_footprint: Some(tiny::config().gpu_footprint(&ComputeOptions::default())),
        lora_rank_max: tiny::config().lora_rank_max(),
    };
    let [build, kernels, dtype, reduction] = ["0.1.0", "avx512", "f32", "deterministic"].map(str::to_owned);
    let numerics = Numerics { build, kernels, dtype, reduction };
    NodeHello {
        protocol_version: PROTOCOL_VERSION,
        name: "node".into(),
        pid: 1,
        trainers: 2,
        samplers: 3,
        models: vec![model],
        numerics,
        address: "127.0.0.1:1".into(),
        host: "host".into(),
        memory: Some(NodeMemory { machine_bytes: 1 << 34, cache_bytes: 0 }),
        gpu_memory: Some(GpuMemory { gpu: "GPU-1".into(), bytes: 1 << 36, cache_bytes: 1 << 31 }),
    }
}

fn generate() -> Generate {
    Generate {
        request: RequestId(1),
        base_model: "org/model".into(),
        policy: Some(policy()),
        prompt: vec![1, 2],
        num_samples: 3,
        params: params(),
        seed: u64::MAX,
        flags: SampleFlags::default(),
    }
}

fn stream_opens() -> Vec<StreamOpen> {
    let collective = StreamOpen::Collective {
        run: RunId(1),
        epoch: Epoch(2),
        generation: Generation(3),
        from: RankIndex(4),
        to: RankIndex(5),
    };
    vec![
        StreamOpen::NodeControl(hello()),
        StreamOpen::Request { call: call(), request: ClientRequest::CreateSession },
        StreamOpen::PutBlob { digest: digest(), size: 1 },
        StreamOpen::GetBlob { digest: digest() },
        StreamOpen::Generate(generate()),
        collective,
        StreamOpen::GetBlobPart { digest: digest(), offset: 1, length: 2 },
        StreamOpen::Figures,
        StreamOpen::Trust(HeldCertificate { ca: [7; 32], issued_at: 1, expires_at: 2 }),
        StreamOpen::Renew { public_key: vec![4; 65] },
    ]
}

fn coordinator_messages() -> Vec<CoordinatorMessage> {
    let (run, generation) = (RunId(1), Generation(3));
    let spec = RunSpec {
        run,
        base_model: "org/model".into(),
        max_seq_len: 1,
        micro_batch_tokens: 2,
        lora: LoraConfig::new(8, 1),
    };
    let seat =
        RankSeat { rank: RankIndex(0), node: NodeId(1), slot: 2, host: "h".into(), address: "a".into() };
    vec![
        CoordinatorMessage::Welcome { node: NodeId(1), epoch: Epoch(2) },
        CoordinatorMessage::FormRanks {
            spec,
            epoch: Epoch(2),
            generation,
            roster: vec![seat],
            restore: Some(blob()),
        },
        CoordinatorMessage::ReleaseRanks { run, generation },
        CoordinatorMessage::Execute { token: token(), operation: operations().swap_remove(3) },
        CoordinatorMessage::Commit { token: token() },
        CoordinatorMessage::Discard { token: token() },
        CoordinatorMessage::TakeSnapshot { token: token() },
        CoordinatorMessage::Stage { policy: policy(), base_model: "org/model".into(), adapter: blob() },
        CoordinatorMessage::Activate { policy: policy() },
        CoordinatorMessage::Retire { policy: policy() },
        CoordinatorMessage::Ping { nonce: 1 },
        CoordinatorMessage::Shutdown,
        CoordinatorMessage::Revoked { nodes: vec![("a".into(), 3)] },
    ]
}

fn node_messages() -> Vec<NodeMessage> {
    let (run, generation, rank) = (RunId(1), Generation(3), RankIndex(2));
    let file = SavedFile { name: STATE_FILE.into(), blob: blob() };
    vec![
        NodeMessage::RanksReady { run, generation },
        NodeMessage::RanksFailed { run, generation, error: error(), blame: Blame::Peer(RankIndex(1)) },
        NodeMessage::Prepared {
            token: token(),
            rank,
            state: digest(),
            result: results().swap_remove(3),
            saved: Some(Saved { digest: digest(), files: vec![file] }),
            step: 4,
        },
        NodeMessage::OperationFailed { token: token(), rank, error: error(), blame: Blame::Environment },
        NodeMessage::SnapshotTaken { token: token(), snapshot: blob() },
        NodeMessage::SnapshotFailed { token: token(), error: error() },
        NodeMessage::Staged { policy: policy() },
        NodeMessage::StageFailed { policy: policy(), error: error() },
        NodeMessage::Activated { policy: policy() },
        NodeMessage::Pong { nonce: 1 },
        NodeMessage::Progress { token: token(), rank, done: 3, of: 64 },
    ]
}

fn rank_parts() -> Vec<RankPart> {
    let part = MicroBatchPart {
        loss_sum: 1.5,
        active: 2,
        sums: BTreeMap::from([("a".into(), 0.5)]),
        maxima: BTreeMap::new(),
        outputs: vec![[("logprobs".into(), TensorData::from_f32(vec![-0.5, -1.0]))].into()],
    };
    vec![
        RankPart::Computed { first: 1, micro_batches: vec![part] },
        RankPart::Failed { error: error(), blame: Blame::Operation },
    ]
}

/// Checks that each comes back, that no part of its bytes is a message and that nothing may
/// follow it.
fn there_and_back<T: Encode + Decode<()> + Debug + PartialEq>(messages: &[T]) {
    for message in messages {
        let bytes = encode(message);
        assert_eq!(&decode::<T>("message", &bytes, bytes.len()).unwrap(), message);
        for end in 0..bytes.len() {
            let cut = decode::<T>("message", &bytes[..end], bytes.len());
            assert!(matches!(cut, Err(CodecError::Malformed { .. })), "{message:?} cut to {end} bytes");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        let trailing = decode::<T>("message", &longer, longer.len()).unwrap_err();
        assert_eq!(trailing, CodecError::Trailing { what: "message", trailing: 1 });
    }
}

/// The same, and that `messages` are the enum's variants, each once and in the order of their
/// numbers: the next number is none.
fn every_variant<T: Encode + Decode<()> + Debug + PartialEq>(messages: &[T]) {
    there_and_back(messages);
    for (number, message) in messages.iter().enumerate() {
        assert_eq!(usize::from(encode(message)[0]), number, "{message:?}");
    }
    let next = [messages.len() as u8];
    match decode::<T>("message", &next, 1).unwrap_err() {
        CodecError::Malformed { reason, .. } => {
            let unknown = reason.contains("UnexpectedVariant") || reason.contains("unknown variant");
            assert!(unknown, "a variant behind {:?} is missing here: {reason}", messages.last());
        }
        other => panic!("a variant behind {:?} is missing here: {other}", messages.last()),
    }
}

#[test]
fn every_variant_of_every_message_comes_back_and_nothing_else_does() {
    every_variant(&stream_opens());
    every_variant(&[BlobReply::Stored, BlobReply::Found { size: 1 << 33 }, BlobReply::Refused(error())]);
    every_variant(&client_requests());
    every_variant(&client_responses());
    every_variant(&statuses());
    every_variant(&targets());
    every_variant(&coordinator_messages());
    every_variant(&node_messages());
    every_variant(&rank_parts());
    every_variant(&[GenerateReply::Done(sample()), GenerateReply::Failed(error())]);
    every_variant(&[Blame::Operation, Blame::Environment, Blame::Peer(RankIndex(2))]);
    every_variant(&operations());
    every_variant(&results());
    every_variant(&payloads());
}

#[test]
fn every_variant_of_the_public_enums_comes_back_and_nothing_else_does() {
    every_variant(&[
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
        ErrorKind::NotFinite,
        ErrorKind::ResourceExhausted,
        ErrorKind::Unavailable,
        ErrorKind::DeadlineExceeded,
        ErrorKind::PermissionDenied,
        ErrorKind::Internal,
    ]);
    every_variant(&Dtype::ALL);
    every_variant(&[TensorValues::F32(vec![1.0]), TensorValues::F64(vec![1.0]), TensorValues::I64(vec![-1])]);
    every_variant(&[
        ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![1] }),
        ModelInputChunk::Image(ImageChunk { data: vec![1], format: ImageFormat::Png, expected_tokens: 1 }),
    ]);
    every_variant(&[ImageFormat::Png, ImageFormat::Jpeg]);
    every_variant(&LoraTarget::ALL);
    every_variant(&LossFn::ALL);
    every_variant(&[Stop::Text("a".into()), Stop::Texts(vec!["a".into()]), Stop::Tokens(vec![1])]);
    every_variant(&[StopReason::Stop, StopReason::Length]);
    every_variant(&[CheckpointTarget::Trainer, CheckpointTarget::Sampler]);
}

#[test]
fn a_tensor_that_breaks_its_invariant_is_refused() {
    let values = || TensorValues::I64(vec![1, 300]);
    let refused = |dtype: Dtype, shape: Vec<usize>| {
        let bytes = encode(&(values(), dtype, shape));
        match decode::<TensorData>("tensor", &bytes, bytes.len()).unwrap_err() {
            CodecError::Malformed { reason, .. } => reason,
            other => panic!("{other}"),
        }
    };
    assert!(refused(Dtype::Int64, vec![3]).contains("`shape`"));
    assert!(refused(Dtype::Uint8, vec![2]).contains("300"));
    assert!(refused(Dtype::Float32, vec![2]).contains("`dtype`"));
}

#[test]
fn a_bool_or_text_that_is_none_is_refused() {
    let flags = encode(&SampleFlags { prompt_logprobs: true, topk_prompt_logprobs: 0 });
    assert_eq!(flags, [1, 0]);
    decode::<SampleFlags>("flags", &[2, 0], 2).unwrap_err();
    decode::<LoadWeightsResponse>("response", &[7], 1).unwrap();
    decode::<SaveWeightsResponse>("response", &[1, 0xff], 2).unwrap_err();
}

//! Inputs that are taken, to begin with.

use std::sync::Arc;

use lockstep::{
    model::{Adapter, LoraLayout, TrainState, tiny},
    protocol::{
        BlobRef, BlobReply, Call, ClientRequest, ClientResponse, CoordinatorMessage, CreateRun, Epoch,
        Generation, JoinReply, JoinRequest, NodeHello, NodeId, NodeMessage, Numerics, OpToken, Operation,
        OperationKey, OperationSeq, OperationStatus, PROTOCOL_VERSION, Payload, StreamOpen, SubmitOperation,
        encode, encode_compressed,
    },
    types::{
        AdamParams, Datum, Digest, ErrorKind, LoraConfig, LossFn, LossSpec, ModelInput, OperationError,
        RunId, SamplingParams, SessionId,
    },
};

pub fn messages() -> Vec<Vec<u8>> {
    let blob = BlobRef { digest: Digest::of(b"blob"), size: 1 << 30 };
    let token = OpToken {
        run: RunId(1),
        epoch: Epoch(2),
        generation: Generation(3),
        seq: OperationSeq(300),
        incarnation: 70_000,
    };
    let error = OperationError::new(ErrorKind::Unavailable, "node-3 was lost");
    let lora = LoraConfig::new(16, 7);
    let loss = LossSpec { config: [("beta".into(), 0.1)].into(), ..LossSpec::new(LossFn::CrossEntropy) };
    let submit = |operation| SubmitOperation { run: RunId(1), key: OperationKey([7; 16]), operation };
    let request = |request| encode(&StreamOpen::Request { call: Call::default(), request });
    let pass = Operation::ForwardBackward { loss, data: Payload::Inline(vec![1, 2, 3]) };
    let hello = NodeHello {
        protocol_version: PROTOCOL_VERSION,
        name: "node".into(),
        pid: 1,
        trainers: 2,
        samplers: 3,
        models: Vec::new(),
        numerics: Numerics {
            build: "build".into(),
            kernels: "avx2".into(),
            dtype: "f32".into(),
            reduction: "deterministic".into(),
        },
        address: "127.0.0.1:7700".into(),
        host: "host".into(),
        memory: None,
        gpu_memory: None,
    };
    let create = CreateRun {
        session: SessionId(1),
        base_model: "org/model".into(),
        lora: lora.clone(),
        replicas: Some(2),
        max_seq_len: None,
        micro_batch_tokens: Some(1_024),
        name: None,
    };
    let join = JoinRequest {
        protocol_version: PROTOCOL_VERSION,
        token: "0123456789abcdef".into(),
        secret: [7; 32],
        name: "node".into(),
        public_key: vec![4; 65],
    };
    vec![
        encode(&StreamOpen::NodeControl(hello)),
        encode(&StreamOpen::GetBlob { digest: blob.digest }),
        encode(&StreamOpen::PutBlob { digest: blob.digest, size: blob.size }),
        request(ClientRequest::CreateRun(create)),
        request(ClientRequest::Submit(submit(pass.clone()))),
        request(ClientRequest::Submit(submit(Operation::Init { lora }))),
        request(ClientRequest::Submit(submit(Operation::OptimStep { adam: AdamParams::default() }))),
        request(ClientRequest::WaitOperation { run: RunId(1), seq: OperationSeq(9), hold_ms: 1_000 }),
        encode(&ClientResponse::Operation(OperationStatus::Failed(error.clone()))),
        encode(&ClientResponse::Blob(blob)),
        encode(&CoordinatorMessage::Welcome { node: NodeId(1), epoch: Epoch(2) }),
        encode(&CoordinatorMessage::Execute { token, operation: pass }),
        encode(&CoordinatorMessage::Ping { nonce: u64::MAX }),
        encode(&NodeMessage::Pong { nonce: 1 }),
        encode(&NodeMessage::SnapshotTaken { token, snapshot: blob }),
        encode(&NodeMessage::SnapshotFailed { token, error: error.clone() }),
        encode(&BlobReply::Found { size: 1 << 40 }),
        encode(&BlobReply::Refused(error)),
        encode(&join),
        encode(&JoinReply::Admitted { chain: vec![vec![48; 300]; 2], cas: vec![vec![48; 300]; 2] }),
    ]
}

fn data() -> Vec<Datum> {
    let datum =
        |tokens| Datum { model_input: ModelInput::from_ints(tokens), loss_fn_inputs: Default::default() };
    vec![datum(vec![1, 2, 300, 70_000]), datum((0..64).collect())]
}

pub fn payloads() -> Vec<Vec<u8>> {
    vec![encode_compressed(&data()), encode(&data())]
}

pub fn datums() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> =
        data().iter().map(|datum| serde_json::to_vec(datum).expect("a datum is JSON")).collect();
    seeds.push(serde_json::to_vec(&SamplingParams::default()).expect("they are JSON"));
    seeds.push(
        br#"{"model_input":{"chunks":[{"type":"encoded_text","tokens":[1,2]}]},
            "loss_fn_inputs":{"weights":{"data":[0.5,1.0],"dtype":"float32","shape":[2]}}}"#
            .to_vec(),
    );
    seeds
}

/// A header with a few keys and one tensor, by the format's layout.
pub fn gguf() -> Vec<Vec<u8>> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend(1_u64.to_le_bytes());
    bytes.extend(3_u64.to_le_bytes());
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    text(&mut bytes, "general.architecture");
    bytes.extend(8_u32.to_le_bytes()); // a string
    text(&mut bytes, "llama");
    text(&mut bytes, "llama.block_count");
    bytes.extend(4_u32.to_le_bytes()); // u32
    bytes.extend(2_u32.to_le_bytes());
    text(&mut bytes, "tokenizer.ggml.tokens");
    bytes.extend(9_u32.to_le_bytes()); // an array of strings
    bytes.extend(8_u32.to_le_bytes());
    bytes.extend(2_u64.to_le_bytes());
    text(&mut bytes, "a");
    text(&mut bytes, "b");
    text(&mut bytes, "token_embd.weight");
    bytes.extend(2_u32.to_le_bytes()); // dimensions
    bytes.extend(32_u64.to_le_bytes());
    bytes.extend(2_u64.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes()); // f32
    bytes.extend(0_u64.to_le_bytes()); // offset
    bytes.resize(bytes.len().next_multiple_of(32) + 32 * 2 * 4, 0);
    vec![bytes]
}

fn adapter() -> Adapter {
    let layout = LoraLayout::new(&tiny::config(), &LoraConfig::new(2, 7)).expect("it fits the model");
    Adapter::init(Arc::new(layout))
}

pub fn adapters() -> Vec<Vec<u8>> {
    let [(_, config), (_, tensors)] = adapter().to_peft("org/model");
    vec![[config, vec![0], tensors].concat()]
}

pub fn train_states() -> Vec<Vec<u8>> {
    vec![TrainState::of_adapter(adapter()).to_bytes()]
}

pub fn join() -> Vec<Vec<u8>> {
    let token = format!("{}.{}.{}", "01".repeat(6), "ab".repeat(32), "cd".repeat(32));
    vec![token.into_bytes(), [vec![4], vec![9; 64]].concat()]
}

//! A whole node against a coordinator played by the test.

use tokio::sync::oneshot;

use super::*;
use crate::{
    model::{ComputeOptions, tiny},
    protocol::{
        BlobReply, CoordinatorMessage, Epoch, Generate, GenerateReply, MAX_MESSAGE, NodeHello, NodeId,
        NodeMessage, RequestId, StreamOpen, decode, encode,
    },
    transport::{Connection, MemoryNetwork, Role, Stream, TransportError},
    types::{Digest, SampleFlags, SamplingParams, StopReason},
};

#[test]
fn a_lost_coordinator_is_found_again_under_the_same_name() {
    node(async |coordinator, serving| {
        let mut first = coordinator.welcome(Epoch(1)).await;
        assert_eq!((first.hello.name.as_str(), first.hello.trainers, first.hello.samplers), ("n", 1, 1));
        first.answers_ping(1).await;
        first.connection.close("crash");

        let mut second = coordinator.welcome(Epoch(2)).await;
        assert_eq!(second.hello, first.hello);
        second.answers_ping(2).await;
        second.tell(CoordinatorMessage::Shutdown).await;
        serving.await.unwrap().expect("it ends in peace");
    });
}

#[test]
fn an_older_coordinator_is_turned_away() {
    node(async |coordinator, _serving| {
        let newer = coordinator.welcome(Epoch(2)).await;
        newer.connection.close("crash");
        let older = coordinator.welcome(Epoch(1)).await;
        let TransportError::ClosedByPeer { reason } = older.connection.closed().await else {
            panic!("the node closes it");
        };
        assert_eq!(reason, "a newer coordinator was seen");
    });
}

#[test]
fn a_model_is_offered_with_its_tokenizer() {
    node(async |coordinator, _serving| {
        let link = coordinator.welcome(Epoch(1)).await;
        let [offer] = &link.hello.models[..] else { panic!("one model") };
        assert_eq!((offer.name.as_str(), offer.vocab, offer.context), ("tiny", 259, 512));
        let stored = (offer.tokenizer, offer.tokenizer_size);
        assert!(link.blobs.contains(&stored), "the blob is stored before the hello");
    });
}

#[test]
fn a_request_is_answered_and_a_shutdown_waits_for_it() {
    node(async |coordinator, serving| {
        let mut link = coordinator.welcome(Epoch(1)).await;
        let GenerateReply::Done(result) = answer(link.generate(3).await).await else { panic!("done") };
        assert_eq!(result.sequences.len(), 2);
        assert_eq!(result.policy_version, 0);

        let long = link.generate(300).await;
        // Answered after it was taken in: by now the long one is under way.
        answer(link.generate(3).await).await;
        link.tell(CoordinatorMessage::Shutdown).await;
        let GenerateReply::Done(result) = answer(long).await else { panic!("done") };
        let ended = |reason| if reason == StopReason::Length { 300 } else { 0 };
        for sequence in result.sequences {
            assert!(sequence.tokens.len() >= ended(sequence.stop_reason), "to its end");
        }
        serving.await.unwrap().expect("it ends in peace");
    });
}

#[test]
fn a_missing_model_fails_at_once() {
    let system = actix_rt::System::new();
    let missing = ModelSource { name: "m".to_owned(), aliases: Vec::new(), path: "/does/not/exist".into() };
    let endpoint = Endpoint::memory(&MemoryNetwork::default(), Role::Node, "n").unwrap();
    let outcome = system.block_on(serve(config(missing), endpoint, std::future::pending()));
    assert!(matches!(outcome, Err(NodeError::Model(_))), "{outcome:?}");
}

fn config(model: ModelSource) -> NodeConfig {
    NodeConfig {
        compute: ComputeOptions::default(),
        name: "n".to_owned(),
        coordinator: "memory:coordinator".to_owned(),
        advertise: None,
        trainers: 1,
        samplers: 1,
        threads: 1,
        models: vec![model],
        cache: None,
    }
}

type Serving = oneshot::Receiver<Result<(), NodeError>>;

/// Runs `test` beside a node.
fn node(test: impl AsyncFnOnce(FakeCoordinator, Serving)) {
    let directory = tempfile::tempdir().unwrap();
    tiny::write(directory.path(), &tiny::config(), 5).unwrap();
    let model =
        ModelSource { name: "tiny".to_owned(), aliases: Vec::new(), path: directory.path().to_owned() };
    let system = actix_rt::System::with_tokio_rt(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    });
    system.block_on(async {
        let network = MemoryNetwork::default();
        let endpoint = Endpoint::memory(&network, Role::Coordinator, "coordinator").unwrap();
        let node = Endpoint::memory(&network, Role::Node, "n").unwrap();
        let (ended, serving) = oneshot::channel();
        actix_rt::spawn(async move {
            // A test that is over does not listen.
            let _ = ended.send(serve(config(model), node, std::future::pending()).await);
        });
        let limit = Duration::from_secs(120);
        tokio::time::timeout(limit, test(FakeCoordinator { endpoint }, serving)).await.expect("in time");
    });
}

/// The test as coordinator.
struct FakeCoordinator {
    endpoint: Endpoint,
}

/// A node that was let in.
struct Link {
    connection: Connection,
    control: Stream,
    hello: NodeHello,
    /// What it stored before.
    blobs: Vec<(Digest, u64)>,
}

impl FakeCoordinator {
    async fn welcome(&self, epoch: Epoch) -> Link {
        let connection = self.endpoint.accept().await.unwrap();
        let mut blobs = Vec::new();
        loop {
            let mut stream = connection.accept_stream().await.unwrap();
            let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
            match decode("opening", &frame, MAX_MESSAGE).unwrap() {
                StreamOpen::PutBlob { digest, size } => {
                    let bytes = stream.recv.recv_bytes(size).await.unwrap();
                    assert_eq!(Digest::of(&bytes), digest);
                    blobs.push((digest, size));
                    stream.send.send_frame(&encode(&BlobReply::Stored)).await.unwrap();
                    stream.send.finish().await.unwrap();
                }
                StreamOpen::NodeControl(hello) => {
                    let mut link = Link { connection, control: stream, hello, blobs };
                    link.tell(CoordinatorMessage::Welcome { node: NodeId(1), epoch }).await;
                    return link;
                }
                other => panic!("unexpected: {other:?}"),
            }
        }
    }
}

impl Link {
    async fn tell(&mut self, message: CoordinatorMessage) {
        self.control.send.send_frame(&encode(&message)).await.unwrap();
    }

    async fn answers_ping(&mut self, nonce: u64) {
        self.tell(CoordinatorMessage::Ping { nonce }).await;
        let frame = self.control.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
        let message: NodeMessage = decode("message", &frame, MAX_MESSAGE).unwrap();
        assert_eq!(message, NodeMessage::Pong { nonce });
    }

    /// Asks for two sequences of the base model.
    async fn generate(&self, max_tokens: u32) -> Stream {
        let generate = Generate {
            request: RequestId(1),
            base_model: "tiny".to_owned(),
            policy: None,
            prompt: vec![5, 6, 7],
            num_samples: 2,
            params: SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() },
            seed: 1,
            flags: SampleFlags::default(),
        };
        let mut stream = self.connection.open_stream().await.unwrap();
        stream.send.send_frame(&encode(&StreamOpen::Generate(generate))).await.unwrap();
        stream
    }
}

async fn answer(mut stream: Stream) -> GenerateReply {
    let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
    decode("answer", &frame, MAX_MESSAGE).unwrap()
}

//! The coordinator on an in-memory network, with a journal and a store on disk and a node that
//! speaks the protocol and computes nothing.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::{
    journal::{Journal, JournalError, Record, SavedCheckpoint},
    protocol::{
        BlobRef, BlobReply, Call, ClientRequest, ClientResponse, CoordinatorMessage, GenerateReply,
        MAX_MESSAGE, NodeId, Operation, OperationKey, OperationResult, OperationSeq, OperationStatus,
        Payload, STATE_FILE, SampleRequest, SampleTarget, SavedFile, StreamOpen, SubmitOperation, decode,
        encode,
    },
    store::BlobStore,
    transport::{Connection, Endpoint, MemoryNetwork, Role, Stream},
    types::{
        Checkpoint, CheckpointId, CheckpointTarget, Digest, EncodedTextChunk, ErrorKind, LossFn, LossSpec,
        ModelInput, ModelInputChunk, RunId, SampleFlags, SampleResult, SampledSequence, SamplingParams,
        SessionId, StopReason,
    },
};

use super::{
    CoordinatorConfig, CoordinatorError,
    actor::{Ask, Clock, Coordinator},
    serve,
    state::WaiterId,
    state::tests::desk::{Desk, MODEL, create, hello, init, publish},
    sweep::sweep_once,
};

const DEADLINE: Duration = Duration::from_secs(20);

/// A coordinator that runs until it is told to stop.
struct Running {
    network: MemoryNetwork,
    stop: oneshot::Sender<()>,
    ended: tokio::task::JoinHandle<Result<(), CoordinatorError>>,
}

impl Running {
    fn start(data_dir: &Path) -> Self {
        let network = MemoryNetwork::default();
        let endpoint = Endpoint::memory(&network, Role::Coordinator, "coordinator").unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let config = CoordinatorConfig::new(data_dir);
        let ended = actix_rt::spawn(serve(config, endpoint, async {
            let _ = stopped.await;
        }));
        Self { network, stop, ended }
    }

    async fn connect(&self, role: Role, name: &str) -> (Endpoint, Connection) {
        let endpoint = Endpoint::memory(&self.network, role, name).unwrap();
        let connection = endpoint.connect("memory:coordinator", Role::Coordinator, DEADLINE).await.unwrap();
        (endpoint, connection)
    }

    async fn stop(self) -> Result<(), CoordinatorError> {
        self.stop.send(()).unwrap();
        tokio::time::timeout(DEADLINE, self.ended).await.expect("it stops").unwrap()
    }
}

fn in_system<T>(test: impl Future<Output = T>) -> T {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    actix_rt::System::with_tokio_rt(runtime)
        .block_on(async { tokio::time::timeout(DEADLINE, test).await.expect("the test ends in time") })
}

async fn open(connection: &Connection, first: &StreamOpen) -> Stream {
    let mut stream = connection.open_stream().await.unwrap();
    stream.send.send_frame(&encode(first)).await.unwrap();
    stream
}

async fn ask(connection: &Connection, request: ClientRequest) -> ClientResponse {
    let mut stream = open(connection, &StreamOpen::Request { call: Call::default(), request }).await;
    stream.send.finish().await.unwrap();
    let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().expect("an answer");
    decode("response", &frame, MAX_MESSAGE).unwrap()
}

async fn put(connection: &Connection, blob: BlobRef, bytes: &[u8]) -> BlobReply {
    let mut stream = open(connection, &StreamOpen::PutBlob { digest: blob.digest, size: blob.size }).await;
    stream.send.send_bytes(bytes).await.unwrap();
    stream.send.finish().await.unwrap();
    let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().expect("an answer");
    decode("blob reply", &frame, MAX_MESSAGE).unwrap()
}

fn blob_of(bytes: &[u8]) -> BlobRef {
    BlobRef { digest: Digest::of(bytes), size: bytes.len() as u64 }
}

/// Joins and answers everything until the coordinator says to stop.
async fn node(connection: Connection, name: &'static str) {
    let mut stream = open(&connection, &StreamOpen::NodeControl(hello(name, 2, 1))).await;
    let streams = connection.clone();
    tokio::spawn(async move {
        while let Ok(mut stream) = streams.accept_stream().await {
            let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
            let Ok(StreamOpen::Generate(generate)) = decode("open", &frame, MAX_MESSAGE) else {
                panic!("no request")
            };
            let sequence =
                SampledSequence { tokens: generate.prompt, logprobs: None, stop_reason: StopReason::Length };
            let reply = GenerateReply::Done(SampleResult {
                sequences: vec![sequence],
                policy_version: generate.policy.map_or(0, |policy| policy.step),
                prompt_logprobs: None,
                topk_prompt_logprobs: None,
            });
            stream.send.send_frame(&encode(&reply)).await.unwrap();
            stream.send.finish().await.unwrap();
        }
    });
    let mut desk = Desk::new();
    let mut id = NodeId(0);
    while let Ok(Some(frame)) = stream.recv.recv_frame(MAX_MESSAGE).await {
        let message = decode("message", &frame, MAX_MESSAGE).unwrap();
        match message {
            CoordinatorMessage::Welcome { node, .. } => id = node,
            CoordinatorMessage::Shutdown => break,
            message => {
                for answer in desk.ideal_answers(id, message) {
                    stream.send.send_frame(&encode(&answer)).await.unwrap();
                }
            }
        }
    }
    connection.close("told to stop");
}

async fn create_run(client: &Connection) -> RunId {
    let ClientResponse::Session(session) = ask(client, ClientRequest::CreateSession).await else {
        panic!("no session")
    };
    match ask(client, ClientRequest::CreateRun(create(session, None))).await {
        ClientResponse::Run(info) => info.run,
        other => panic!("no run: {other:?}"),
    }
}

async fn run_operation(client: &Connection, run: RunId, key: u8, operation: Operation) -> OperationStatus {
    let submit = SubmitOperation { run, key: OperationKey([key; 16]), operation };
    let ClientResponse::Accepted { seq } = ask(client, ClientRequest::Submit(submit)).await else {
        panic!("not accepted")
    };
    match ask(client, ClientRequest::WaitOperation { run, seq, hold_ms: 10_000 }).await {
        ClientResponse::Operation(status) => status,
        other => panic!("no status: {other:?}"),
    }
}

#[test]
fn runs_train_publish_and_sample_and_are_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    in_system(async {
        let coordinator = Running::start(folder.path());
        let (_node_endpoint, connection) = coordinator.connect(Role::Node, "node1").await;
        let node = tokio::spawn(node(connection, "node1"));
        let (_endpoint, client) = coordinator.connect(Role::Client, "client").await;
        let run = create_run(&client).await;
        assert!(matches!(run_operation(&client, run, 1, init()).await, OperationStatus::Done(_)));
        assert!(matches!(run_operation(&client, run, 2, publish("v0")).await, OperationStatus::Done(_)));
        let request = SampleRequest {
            target: SampleTarget::Live { run, min_version: 0 },
            prompt: ModelInput {
                chunks: vec![ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![3, 4] })],
            },
            num_samples: 1,
            params: SamplingParams::default(),
            flags: SampleFlags::default(),
        };
        let ClientResponse::Sample { result, policy } = ask(&client, ClientRequest::Sample(request)).await
        else {
            panic!("no sample")
        };
        assert_eq!((result.sequences[0].tokens.as_slice(), policy.unwrap().run), ([3, 4].as_slice(), run));
        coordinator.stop().await.unwrap();
        node.await.unwrap();

        let coordinator = Running::start(folder.path());
        let (_endpoint, client) = coordinator.connect(Role::Client, "client").await;
        let ClientResponse::Run(info) = ask(&client, ClientRequest::RunInfo { run }).await else {
            panic!("no run")
        };
        assert_eq!((info.base_model.as_str(), info.live.or(info.initial)), (MODEL, policy));
        let again = SubmitOperation { run, key: OperationKey([1; 16]), operation: init() };
        let accepted = ask(&client, ClientRequest::Submit(again)).await;
        assert_eq!(accepted, ClientResponse::Accepted { seq: OperationSeq(1) });
        let session = ask(&client, ClientRequest::CreateSession).await;
        assert_eq!(session, ClientResponse::Session(SessionId(2)));
        coordinator.stop().await.unwrap();
    });
}

#[test]
fn what_a_node_that_goes_away_was_doing_is_done_when_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    in_system(async {
        let coordinator = Running::start(folder.path());
        let (_endpoint, client) = coordinator.connect(Role::Client, "client").await;
        let (node_endpoint, connection) = coordinator.connect(Role::Node, "mute").await;
        let mut control = open(&connection, &StreamOpen::NodeControl(hello("mute", 1, 0))).await;
        let run = create_run(&client).await;
        let waiting = {
            let client = client.clone();
            tokio::spawn(async move { run_operation(&client, run, 1, init()).await })
        };
        // Answers until it has something to compute.
        let mut desk = Desk::new();
        loop {
            let frame = control.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
            match decode("message", &frame, MAX_MESSAGE).unwrap() {
                CoordinatorMessage::Execute { .. } => break,
                message => {
                    for answer in desk.ideal_answers(NodeId(1), message) {
                        control.send.send_frame(&encode(&answer)).await.unwrap();
                    }
                }
            }
        }
        connection.close("killed");
        drop((control, connection));

        let again = node_endpoint.connect("memory:coordinator", Role::Coordinator, DEADLINE).await.unwrap();
        let second_life = tokio::spawn(node(again, "mute"));
        match waiting.await.unwrap() {
            OperationStatus::Done(OperationResult::Init(_)) => {}
            other => panic!("not done: {other:?}"),
        }
        coordinator.stop().await.unwrap();
        second_life.await.unwrap();
    });
}

#[test]
fn blobs_are_checked_against_their_names() {
    let folder = tempfile::tempdir().unwrap();
    in_system(async {
        let coordinator = Running::start(folder.path());
        let (_endpoint, client) = coordinator.connect(Role::Gateway, "gateway").await;
        let bytes = vec![7; 200_000];
        assert_eq!(put(&client, blob_of(&bytes), &bytes).await, BlobReply::Stored);
        let mut stream = open(&client, &StreamOpen::GetBlob { digest: blob_of(&bytes).digest }).await;
        let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
        let found: BlobReply = decode("blob reply", &frame, MAX_MESSAGE).unwrap();
        assert_eq!(found, BlobReply::Found { size: 200_000 });
        assert_eq!(stream.recv.recv_bytes(200_000).await.unwrap(), bytes);

        let wrong = BlobRef { digest: Digest::of(b"other"), size: 200_000 };
        assert!(
            matches!(put(&client, wrong, &bytes).await, BlobReply::Refused(e) if e.kind == ErrorKind::InvalidInput)
        );
        let mut stream = open(&client, &StreamOpen::GetBlob { digest: wrong.digest }).await;
        let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
        let absent: BlobReply = decode("blob reply", &frame, MAX_MESSAGE).unwrap();
        assert!(matches!(absent, BlobReply::Refused(e) if e.kind == ErrorKind::NotFound));

        let huge = BlobRef { digest: wrong.digest, size: u64::MAX };
        let mut stream = open(&client, &StreamOpen::PutBlob { digest: huge.digest, size: huge.size }).await;
        let frame = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
        let refused: BlobReply = decode("blob reply", &frame, MAX_MESSAGE).unwrap();
        assert!(matches!(refused, BlobReply::Refused(e) if e.kind == ErrorKind::ResourceExhausted));

        let operation =
            Operation::Forward { loss: LossSpec::new(LossFn::CrossEntropy), data: Payload::Blob(wrong) };
        let submit = SubmitOperation { run: RunId(1), key: OperationKey([1; 16]), operation };
        let response = ask(&client, ClientRequest::Submit(submit)).await;
        assert!(matches!(response, ClientResponse::Error(e) if e.message.contains("is not in the store")));
        coordinator.stop().await.unwrap();
    });
}

#[test]
fn a_journal_that_breaks_ends_the_coordinator_so_that_it_is_started_again() {
    in_system(async {
        let broken = JournalError::Io { path: "journal.sqlite".into(), reason: "disk I/O error".into() };
        let state = Desk::new().state;
        let (clock, journal) = (Clock::start(), Journal::failing(broken.clone()));
        let (actor, stopped) = Coordinator::launch(state, clock, journal, DEADLINE, Arc::default());
        let (reply, answered) = oneshot::channel();
        let call = Call::default();
        let ask = Ask { waiter: WaiterId(1), call, request: ClientRequest::CreateSession, reply };
        actor.send(ask).await.unwrap();
        assert_eq!(stopped.await.unwrap(), Err(broken.clone()));
        assert!(answered.await.is_err(), "the client asks the next coordinator");
        assert!(!CoordinatorError::Journal(broken).is_final());
    });
}

#[test]
fn a_full_disk_refuses_what_must_be_written_and_ends_nothing() {
    in_system(async {
        let state = Desk::new().state;
        let journal = Journal::failing(JournalError::DiskFull { path: "journal.sqlite".into() });
        let (actor, mut stopped) =
            Coordinator::launch(state, Clock::start(), journal, DEADLINE, Arc::default());
        let mut answers = Vec::new();
        for request in [ClientRequest::CreateSession, ClientRequest::ClusterStatus] {
            let (reply, answered) = oneshot::channel();
            let waiter = WaiterId(answers.len() as u64);
            actor.send(Ask { waiter, call: Call::default(), request, reply }).await.unwrap();
            answers.push(answered.await.unwrap());
        }
        match &answers[..] {
            [ClientResponse::Error(error), ClientResponse::Cluster(_)] => {
                assert_eq!(error.kind, ErrorKind::ResourceExhausted, "{error}");
            }
            other => panic!("unexpected: {other:?}"),
        }
        assert!(stopped.try_recv().is_err());
    });
}

#[test]
fn the_sweep_takes_what_neither_a_row_nor_the_state_needs() {
    let folder = tempfile::tempdir().unwrap();
    in_system(async {
        let (journal, _) = Journal::open(folder.path()).unwrap();
        let store = BlobStore::open_local(&folder.path().join("blobs")).unwrap();
        let named = store.put(Bytes::from_static(b"a row's")).await.unwrap();
        // What `Desk`'s nodes offer as their model's.
        let counted_on = store.put(Bytes::from_static(b"tokenizer")).await.unwrap();
        let left_over = store.put(Bytes::from_static(b"left over")).await.unwrap();
        let checkpoint = saved_checkpoint(BlobRef { digest: named, size: 7 });
        journal.append(vec![Record::Checkpoint(checkpoint)], Box::new(|written| written.unwrap()));
        let mut desk = Desk::new();
        desk.join(1, 1, 1);
        let (actor, _stopped) =
            Coordinator::launch(desk.state, Clock::start(), journal.clone(), DEADLINE, Arc::default());

        let hour = Duration::from_secs(3_600);
        assert_eq!(sweep_once(&store, &journal, &actor, hour).await, Ok(0), "all are young");
        assert_eq!(sweep_once(&store, &journal, &actor, Duration::ZERO).await, Ok(1));
        assert_eq!(store.size(&left_over).await.unwrap(), None);
        assert!(
            store.size(&named).await.unwrap().is_some() && store.size(&counted_on).await.unwrap().is_some()
        );
    });
}

fn saved_checkpoint(blob: BlobRef) -> SavedCheckpoint {
    let checkpoint = Checkpoint {
        id: CheckpointId(1),
        run_id: RunId(1),
        checkpoint_id: "a".into(),
        checkpoint_type: "lora".into(),
        target: CheckpointTarget::Trainer,
        created_at_ms: 7,
        base_model: MODEL.into(),
        lora_rank: 8,
        lora_alpha: 32.0,
        step: 1,
        size_bytes: blob.size,
        path: "bt://loops:run-1/weights/a".into(),
        expires_at_ms: None,
    };
    let files = vec![SavedFile { name: STATE_FILE.into(), blob }];
    SavedCheckpoint { checkpoint, files, policy: None, published: false }
}

#[test]
fn a_role_opens_only_its_own_streams() {
    let folder = tempfile::tempdir().unwrap();
    in_system(async {
        let coordinator = Running::start(folder.path());
        let (_node_endpoint, node) = coordinator.connect(Role::Node, "node1").await;
        let response = ask(&node, ClientRequest::CreateSession).await;
        assert!(matches!(response, ClientResponse::Error(e) if e.kind == ErrorKind::PermissionDenied));
        let (_endpoint, client) = coordinator.connect(Role::Client, "client").await;
        let mut stream = open(&client, &StreamOpen::NodeControl(hello("intruder", 8, 8))).await;
        assert!(!matches!(stream.recv.recv_frame(MAX_MESSAGE).await, Ok(Some(_))));
        let ClientResponse::Cluster(status) = ask(&client, ClientRequest::ClusterStatus).await else {
            panic!("no status")
        };
        assert!(status.nodes.is_empty());
        // Bytes that are no message cost only their own stream.
        let mut stream = client.open_stream().await.unwrap();
        stream.send.send_frame(&[0xFF; 64]).await.unwrap();
        assert!(!matches!(stream.recv.recv_frame(MAX_MESSAGE).await, Ok(Some(_))));
        assert!(matches!(ask(&client, ClientRequest::CreateSession).await, ClientResponse::Session(_)));
        coordinator.stop().await.unwrap();
    });
}

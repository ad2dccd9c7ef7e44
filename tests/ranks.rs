//! Bits do not depend on ranks: the same operations on one, two and three ranks, on one node
//! and over three, leave the same adapter to the bit; and so does the same run twice.
//!
//! A real coordinator and real nodes in one process, over the in-memory twin of the transport,
//! training a model of random weights. The client is a bare connection, so that nothing but
//! the wire is between the test and the service.

use std::{collections::BTreeMap, path::Path, time::Duration};

use lockstep::{
    collective::assign_leaves,
    coordinator::{self, CoordinatorConfig},
    model::{ComputeOptions, ModelSource, cut_micro_batches, prepare, tiny},
    node::{self, NodeConfig},
    protocol::{
        ADAPTER_FILE, BlobReply, Call, ClientRequest, ClientResponse, CreateRun, MAX_MESSAGE, Operation,
        OperationKey, OperationResult, OperationSeq, OperationStatus, Payload, RunInfo, STATE_FILE,
        StreamOpen, SubmitOperation, decode, decode_compressed, encode, encode_compressed,
    },
    transport::{Connection, Endpoint, MemoryNetwork, Role, Stream},
    types::{
        AdamParams, Checkpoint, CheckpointTarget, Datum, Digest, ErrorKind, ForwardBackwardOutput,
        LoraConfig, LossFn, LossSpec, ModelInput, OperationError, RunId, SessionId, TensorData,
    },
};
use tokio::sync::watch;

const MODEL: &str = "tiny";

/// Small enough that a [`batch`] makes eight micro-batches.
const MICRO_BATCH_TOKENS: u32 = 32;

const STEPS: u64 = 10;

#[test]
fn the_batch_is_shared_unevenly() {
    let examples = prepare(&tiny::config(), 512, &LossSpec::new(LossFn::CrossEntropy), &batch(0)).unwrap();
    let cut = cut_micro_batches(&examples, MICRO_BATCH_TOKENS as usize);
    assert_eq!(cut, [0..2, 2..4, 4..5, 5..7, 7..8, 8..9, 9..10, 10..11]);
    let costs: Vec<u64> =
        cut.into_iter().map(|range| examples[range].iter().map(|e| e.tokens() as u64).sum()).collect();
    let shares = |ranks| assign_leaves(&costs, ranks).iter().map(|share| share.len()).collect::<Vec<_>>();
    assert_ne!(shares(3)[0], shares(3)[2], "{:?}", shares(3));
}

#[test]
fn one_two_and_three_ranks_give_the_same_bits() {
    cluster(&[3], async |client| {
        let alone = client.train(1).await;
        assert!(alone.losses[STEPS as usize - 1] < alone.losses[0], "it learns: {:?}", alone.losses);
        assert_eq!(alone, client.train(1).await, "the same run again");
        assert_eq!(alone, client.train(2).await, "two ranks");
        assert_eq!(alone, client.train(3).await, "three ranks");
    });
}

#[test]
fn three_nodes_give_the_bits_of_one() {
    cluster(&[1, 1, 1], async |client| {
        let spread = client.train(3).await;
        assert_eq!(client.train(1).await, spread);
    });
}

#[test]
fn a_failure_is_heard_by_every_rank_and_leaves_the_run_as_it_was() {
    cluster(&[3], async |client| {
        let run = client.create_run(3).await;
        let before = client.save(run, "before").await;
        let beyond_the_vocabulary = vec![Datum {
            model_input: ModelInput::from_ints(vec![1, 2, 100_000]),
            loss_fn_inputs: BTreeMap::new(),
        }];
        // Well under the deadline that a rank which waited for another would run into.
        let refused = tokio::time::timeout(
            Duration::from_secs(60),
            client.forward_backward(run, &beyond_the_vocabulary),
        );
        let error = refused.await.expect("answered at once").unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidInput, "{error}");
        assert!(error.message.contains("data[0]"), "{error}");

        assert_eq!(client.save(run, "after").await, before);
        client.forward_backward(run, &batch(0)).await.expect("the run is usable");
        client.optim_step(run).await.expect("the run is usable");
    });
}

#[test]
fn a_gradient_that_is_not_finite_is_refused_on_every_rank_and_harms_nothing() {
    cluster(&[2], async |client| {
        let [hit, spared] = [client.create_run(2).await, client.create_run(2).await];
        for run in [hit, spared] {
            client.forward_backward(run, &batch(0)).await.unwrap();
        }
        let error = client.forward_backward(hit, &overflowing()).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFinite, "{error}");
        for run in [hit, spared] {
            client.forward_backward(run, &batch(1)).await.unwrap();
            client.optim_step(run).await.expect("what had accumulated is kept");
        }
        assert_eq!(client.save(hit, "end").await, client.save(spared, "end").await);
        assert_eq!(client.info(hit).await.step, 1);
    });
}

#[test]
fn a_state_saved_by_two_ranks_goes_on_with_three() {
    cluster(&[3], async |client| {
        let straight = client.create_run(1).await;
        let split = client.create_run(2).await;
        for run in [straight, split] {
            client.step(run, 0).await;
            // Not saved: loading drops it.
            client.forward_backward(run, &batch(5)).await.unwrap();
        }
        let path = client.save_state(split, "half-way").await;
        let resumed = client.create_run(3).await;
        for (run, path) in [(straight, client.save_state(straight, "half-way").await), (resumed, path)] {
            let load = Operation::LoadState { path, with_optimizer: true, source: None };
            let loaded = client.run_operation(run, load).await.unwrap();
            assert!(
                matches!(loaded, OperationResult::LoadState(ref response) if response.step == 1),
                "{loaded:?}"
            );
            client.step(run, 1).await;
        }
        assert_eq!(client.save(straight, "end").await, client.save(resumed, "end").await);
        let [straight, resumed] = [client.state(straight).await, client.state(resumed).await];
        assert_eq!(straight, resumed, "moments and counts, too");
    });
}

/// What ten steps of training left.
#[derive(Debug, PartialEq)]
struct Trained {
    losses: Vec<f64>,
    logprobs: Vec<TensorData>,
    adapter: Digest,
}

/// Eleven sequences of uneven lengths, 3 to 24 tokens.
fn batch(step: u64) -> Vec<Datum> {
    let mut random = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = move |bound: u64| {
        // Knuth's MMIX generator; its high bits are good enough for token ids.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    let lengths = [24, 7, 3, 21, 19, 16, 5, 23, 11, 24, 9];
    lengths
        .iter()
        .map(|&length| Datum {
            // A handful of tokens, so that there is something to learn in ten steps.
            model_input: ModelInput::from_ints((0..length).map(|_| 3 + next(7) as u32).collect()),
            loss_fn_inputs: BTreeMap::new(),
        })
        .collect()
}

/// A gradient near the largest f32: two of them are past it.
fn overflowing() -> Vec<Datum> {
    let weights = TensorData::from_f32(vec![1e38; 8]);
    vec![Datum {
        model_input: ModelInput::from_ints(vec![5; 8]),
        loss_fn_inputs: BTreeMap::from([("weights".to_owned(), weights)]),
    }]
}

/// Runs `test` against a coordinator and one node for each of `trainers`, then shuts them down.
fn cluster(trainers: &[u32], test: impl AsyncFnOnce(Client)) {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model");
    tiny::write(&model, &tiny::config(), 11).unwrap();
    let system = actix_rt::System::with_tokio_rt(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    });
    system.block_on(async {
        let network = MemoryNetwork::default();
        let (stop, stopped) = watch::channel(false);
        let endpoint = Endpoint::memory(&network, Role::Coordinator, "coordinator").unwrap();
        let address = endpoint.local_address();
        let config = CoordinatorConfig::new(directory.path().join("data"));
        let coordinator = actix_rt::spawn(coordinator::serve(config, endpoint, told(stopped.clone())));
        let nodes: Vec<_> = trainers
            .iter()
            .enumerate()
            .map(|(i, &trainers)| {
                let endpoint = Endpoint::memory(&network, Role::Node, &format!("node-{i}")).unwrap();
                let config = node_config(i, trainers, &address, &model);
                actix_rt::spawn(node::serve(config, endpoint, told(stopped.clone())))
            })
            .collect();

        let client = Client::connect(&network, &address, trainers.iter().sum()).await;
        test(client).await;

        stop.send_replace(true);
        for node in nodes {
            node.await.unwrap().expect("a node ends in peace");
        }
        coordinator.await.unwrap().expect("the coordinator ends in peace");
    });
}

fn node_config(number: usize, trainers: u32, coordinator: &str, model: &Path) -> NodeConfig {
    NodeConfig {
        compute: ComputeOptions::default(),
        cache: None,
        name: format!("node-{number}"),
        coordinator: coordinator.to_owned(),
        advertise: None,
        trainers,
        samplers: 0,
        threads: 2,
        models: vec![ModelSource { name: MODEL.to_owned(), aliases: Vec::new(), path: model.to_owned() }],
    }
}

async fn told(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// A connection of a client, and what a test asks over it.
struct Client {
    connection: Connection,
    session: SessionId,
}

impl Client {
    /// Returns once nodes with `trainers` slots have joined.
    async fn connect(network: &MemoryNetwork, coordinator: &str, trainers: u32) -> Self {
        let endpoint = Endpoint::memory(network, Role::Client, "client").unwrap();
        let connection =
            endpoint.connect(coordinator, Role::Coordinator, Duration::from_secs(10)).await.unwrap();
        let mut client = Self { connection, session: SessionId(0) };
        let ClientResponse::Session(session) = client.ask(ClientRequest::CreateSession).await else {
            panic!("no session");
        };
        client.session = session;
        loop {
            let ClientResponse::Cluster(status) = client.ask(ClientRequest::ClusterStatus).await else {
                panic!("no status");
            };
            if status.nodes.iter().map(|node| node.trainers).sum::<u32>() == trainers {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ten steps on so many ranks.
    async fn train(&self, replicas: u32) -> Trained {
        let run = self.create_run(replicas).await;
        let mut losses = Vec::new();
        let mut logprobs = Vec::new();
        for step in 0..STEPS {
            let output = self.step(run, step).await;
            losses.push(output.loss);
            logprobs.extend(output.loss_fn_outputs.into_iter().map(|mut o| o.remove("logprobs").unwrap()));
        }
        assert_eq!(self.info(run).await.step, STEPS);
        Trained { losses, logprobs, adapter: self.save(run, "trained").await }
    }

    async fn step(&self, run: RunId, step: u64) -> ForwardBackwardOutput {
        let output = self.forward_backward(run, &batch(step)).await.unwrap();
        self.optim_step(run).await.unwrap();
        output
    }

    async fn create_run(&self, replicas: u32) -> RunId {
        let create = CreateRun {
            session: self.session,
            base_model: MODEL.to_owned(),
            lora: LoraConfig::new(4, 7),
            replicas: Some(replicas),
            max_seq_len: None,
            micro_batch_tokens: Some(MICRO_BATCH_TOKENS),
            name: None,
        };
        match self.ask(ClientRequest::CreateRun(create)).await {
            ClientResponse::Run(info) => {
                assert_eq!(info.replicas, replicas);
                info.run
            }
            other => panic!("no run: {other:?}"),
        }
    }

    async fn info(&self, run: RunId) -> RunInfo {
        match self.ask(ClientRequest::RunInfo { run }).await {
            ClientResponse::Run(info) => info,
            other => panic!("no run: {other:?}"),
        }
    }

    async fn forward_backward(
        &self,
        run: RunId,
        data: &[Datum],
    ) -> Result<ForwardBackwardOutput, OperationError> {
        let data = Payload::Inline(encode_compressed(&data.to_vec()));
        let loss = LossSpec::new(LossFn::CrossEntropy);
        match self.run_operation(run, Operation::ForwardBackward { loss, data }).await? {
            OperationResult::ForwardBackward(Payload::Inline(bytes)) => {
                Ok(decode_compressed("output", &bytes).unwrap())
            }
            OperationResult::ForwardBackward(Payload::Blob(blob)) => {
                Ok(decode_compressed("output", &self.blob(blob.digest).await).unwrap())
            }
            other => panic!("not the result of a forward_backward: {other:?}"),
        }
    }

    async fn optim_step(&self, run: RunId) -> Result<OperationResult, OperationError> {
        let adam = AdamParams { learning_rate: 1e-2, ..AdamParams::default() };
        self.run_operation(run, Operation::OptimStep { adam }).await
    }

    /// Saves the adapter and returns the digest of its bytes.
    async fn save(&self, run: RunId, name: &str) -> Digest {
        let save =
            Operation::SaveWeightsForSampler { name: name.to_owned(), publish: false, ttl_seconds: None };
        self.run_operation(run, save).await.unwrap();
        let bytes = self.checkpoint_file(run, name, CheckpointTarget::Sampler, ADAPTER_FILE).await;
        Digest::of(&bytes)
    }

    async fn save_state(&self, run: RunId, name: &str) -> String {
        match self
            .run_operation(run, Operation::SaveState { name: name.to_owned(), ttl_seconds: None })
            .await
            .unwrap()
        {
            OperationResult::SaveState(response) => response.path,
            other => panic!("not the result of a save_state: {other:?}"),
        }
    }

    /// The run's whole state as a checkpoint holds it.
    async fn state(&self, run: RunId) -> Vec<u8> {
        self.save_state(run, "state").await;
        self.checkpoint_file(run, "state", CheckpointTarget::Trainer, STATE_FILE).await
    }

    async fn checkpoint_file(&self, run: RunId, name: &str, target: CheckpointTarget, file: &str) -> Vec<u8> {
        let ClientResponse::Checkpoints(all) =
            self.ask(ClientRequest::ListCheckpoints { run: Some(run) }).await
        else {
            panic!("no checkpoints");
        };
        let is_it = |it: &&Checkpoint| it.checkpoint_id == name && it.target == target;
        let checkpoint = all.iter().find(is_it).unwrap().id;
        let request =
            ClientRequest::CheckpointFiles { checkpoint, page_size: 10, page_token: 0, presigned: false };
        let ClientResponse::CheckpointFiles(files) = self.ask(request).await else { panic!("no files") };
        let found = files.presigned_urls.iter().find(|it| it.relative_file_name == file).unwrap();
        self.blob(found.url.strip_prefix("blob:").unwrap().parse().unwrap()).await
    }

    async fn run_operation(
        &self,
        run: RunId,
        operation: Operation,
    ) -> Result<OperationResult, OperationError> {
        let seq = self.submit(run, operation).await?;
        loop {
            match self.ask(ClientRequest::WaitOperation { run, seq, hold_ms: 30_000 }).await {
                ClientResponse::Operation(OperationStatus::Done(result)) => return Ok(result),
                ClientResponse::Operation(OperationStatus::Failed(error)) => return Err(error),
                ClientResponse::Operation(OperationStatus::Pending) => {}
                other => panic!("no status: {other:?}"),
            }
        }
    }

    async fn submit(&self, run: RunId, operation: Operation) -> Result<OperationSeq, OperationError> {
        static KEYS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let mut key = [0; 16];
        let number = KEYS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        key[..8].copy_from_slice(&number.to_le_bytes());
        let submit = SubmitOperation { run, key: OperationKey(key), operation };
        match self.ask(ClientRequest::Submit(submit)).await {
            ClientResponse::Accepted { seq } => Ok(seq),
            ClientResponse::Error(error) => Err(error),
            other => panic!("not accepted: {other:?}"),
        }
    }

    async fn blob(&self, digest: Digest) -> Vec<u8> {
        let mut stream = self.open(&StreamOpen::GetBlob { digest }).await;
        let reply = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
        match decode("reply", &reply, MAX_MESSAGE).unwrap() {
            BlobReply::Found { size } => stream.recv.recv_bytes(size).await.unwrap(),
            other => panic!("no blob: {other:?}"),
        }
    }

    async fn ask(&self, request: ClientRequest) -> ClientResponse {
        let mut stream = self.open(&StreamOpen::Request { call: Call::default(), request }).await;
        let reply = stream.recv.recv_frame(MAX_MESSAGE).await.unwrap().unwrap();
        decode("reply", &reply, MAX_MESSAGE).unwrap()
    }

    async fn open(&self, open: &StreamOpen) -> Stream {
        let mut stream = self.connection.open_stream().await.unwrap();
        stream.send.send_frame(&encode(open)).await.unwrap();
        stream.send.finish().await.unwrap();
        stream
    }
}

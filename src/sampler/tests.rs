//! A replica with its real threads on a tiny random model.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use actix::Addr;
use bytes::Bytes;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::{
    gpu::DeviceChoice,
    kernels::{Priority, Team},
    model::{
        Adapter, AdapterRows, BaseModel, Batch, BatchSequence, ComputeOptions, LoraLayout, ModelConfig,
        ModelSource, Workspace, forward, head_logits, prepare, run_micro_batch, tiny,
    },
    protocol::RequestId,
    types::{
        Datum, Digest, ErrorKind, LoraConfig, LoraTarget, LossFn, LossSpec, ModelInput, RunId, SampleFlags,
        SampleResult, SamplingParams, Stop, StopReason, TensorData,
    },
};

struct Replica {
    address: Addr<SamplerReplica>,
    reports: mpsc::Receiver<ReplicaReport>,
    model: Arc<BaseModel>,
    cores: CoreBudget,
    deaths: Arc<AtomicUsize>,
    _directory: tempfile::TempDir,
}

impl Replica {
    fn launch(max_batch: usize) -> Self {
        Self::launch_on(DeviceChoice::Cpu, max_batch)
    }

    fn launch_on(device: DeviceChoice, max_batch: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        // Nothing that a tiny random model draws ends a sequence before its length.
        let config = ModelConfig { eos_token_ids: vec![0], ..tiny::config() };
        tiny::write(directory.path(), &config, 3).expect("written");
        let source = ModelSource {
            name: "org/Tiny".into(),
            aliases: vec!["tiny".into()],
            path: directory.path().to_owned(),
        };
        let options = ComputeOptions { device, ..ComputeOptions::default() };
        let library = Arc::new(Library::open(vec![source], options).expect("a model"));
        let deaths = Arc::new(AtomicUsize::new(0));
        let counter = deaths.clone();
        let cores = CoreBudget::new(2);
        let config = ReplicaConfig {
            index: 0,
            library: library.clone(),
            cores: cores.clone(),
            kv_bytes: 64 << 20,
            max_batch,
            prefill_rows: 256,
            on_death: Arc::new(move |_| {
                counter.fetch_add(1, Ordering::SeqCst);
            }),
        };
        let (sender, reports) = mpsc::channel(64);
        let address = SamplerReplica::launch(config, sender).expect("threads");
        let model = library.load("tiny").expect("loads");
        Self { address, reports, model, cores, deaths, _directory: directory }
    }

    fn submit(&self, generate: Generate) -> oneshot::Receiver<GenerateReply> {
        let (reply, answer) = oneshot::channel();
        self.address.try_send(Sample { generate, reply }).expect("there is room");
        answer
    }

    async fn sample(&self, generate: Generate) -> SampleResult {
        done(self.submit(generate).await)
    }

    /// Stages and activates an adapter that differs from the base model.
    async fn publish(&mut self, step: u64) -> (PolicyId, Adapter) {
        let adapter = adapter(&self.model.config, step);
        let policy = policy(step, adapter.digest());
        self.stage(policy, &adapter);
        self.next_report().await;
        self.address.try_send(Activate { policy }).expect("there is room");
        let report = self.next_report().await;
        assert!(matches!(report, ReplicaReport::Activated { policy: p, .. } if p == policy), "{report:?}");
        (policy, adapter)
    }

    fn stage(&self, policy: PolicyId, adapter: &Adapter) {
        let bytes = Bytes::from(adapter.to_bytes());
        let stage = Stage { policy, base_model: "org/Tiny".into(), adapter: bytes };
        self.address.try_send(stage).expect("there is room");
    }

    async fn next_report(&mut self) -> ReplicaReport {
        self.reports.recv().await.expect("the replica lives")
    }
}

fn policy(step: u64, digest: Digest) -> PolicyId {
    PolicyId { run: RunId(1), incarnation: 0, step, digest }
}

/// Every value random, B as well.
fn adapter(config: &ModelConfig, seed: u64) -> Adapter {
    let targets = vec![LoraTarget::QProj, LoraTarget::VProj, LoraTarget::DownProj];
    let lora = LoraConfig { rank: 4, alpha: 8.0, seed, targets };
    let layout = Arc::new(LoraLayout::new(config, &lora).expect("fits"));
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..layout.len()).map(|_| random.next_u32() as f32 / u32::MAX as f32 * 0.6 - 0.3);
    Adapter { values: values.collect::<Vec<_>>().into(), layout }
}

fn done(reply: Result<GenerateReply, oneshot::error::RecvError>) -> SampleResult {
    match reply.expect("every request is answered") {
        GenerateReply::Done(result) => result,
        GenerateReply::Failed(error) => panic!("{error}"),
    }
}

fn failed(reply: Result<GenerateReply, oneshot::error::RecvError>) -> OperationError {
    match reply.expect("every request is answered") {
        GenerateReply::Failed(error) => error,
        GenerateReply::Done(result) => panic!("{result:?}"),
    }
}

fn request(seed: u64, prompt_tokens: usize, num_samples: u32, max_tokens: u32) -> Generate {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    Generate {
        request: RequestId(seed),
        base_model: "tiny".into(),
        policy: None,
        prompt: (0..prompt_tokens).map(|_| 3 + random.next_u32() % 256).collect(),
        num_samples,
        params: SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() },
        seed,
        flags: SampleFlags::default(),
    }
}

/// A result with floats as bits: equality means the same to the bit.
fn bits(result: &SampleResult) -> String {
    let bits = |values: &[f32]| values.iter().map(|v| format!("{:08x}", v.to_bits())).collect::<String>();
    let mut text = format!("v{}", result.policy_version);
    for sequence in &result.sequences {
        let logprobs = sequence.logprobs.as_deref().expect("reported");
        assert_eq!(logprobs.len(), sequence.tokens.len());
        text += &format!(";{:?} {:?} {}", sequence.stop_reason, sequence.tokens, bits(logprobs));
    }
    for scores in result.prompt_logprobs.iter() {
        text += &format!(";{}", bits(&scores.iter().flatten().copied().collect::<Vec<_>>()));
    }
    for alternatives in result.topk_prompt_logprobs.iter().flatten().flatten() {
        text += &format!(";{:?}", alternatives.iter().map(|(t, l)| (t, l.to_bits())).collect::<Vec<_>>());
    }
    text
}

/// What the trainer's forward gives for each token of `tokens` but the first.
fn trainer_logprobs(model: &BaseModel, adapter: &Adapter, tokens: &[u32]) -> Vec<f32> {
    let (input, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
    let targets = TensorData::from_i64(targets.iter().map(|&token| token.into()).collect());
    let datum = Datum {
        model_input: ModelInput::from_ints(input.to_vec()),
        loss_fn_inputs: [("target_tokens".to_owned(), targets)].into(),
    };
    let loss = LossSpec::new(LossFn::CrossEntropy);
    let context = model.config.max_position_embeddings;
    let examples = prepare(&model.config, context, &loss, &[datum]).expect("valid");
    let (mut workspace, team) = (Workspace::default(), Team::solo());
    let rows = AdapterRows::from(adapter);
    let output = run_micro_batch(model, rows, &loss, &examples, None, &mut workspace, &team);
    output.expect("finite").outputs[0]["logprobs"].to_f32_vec()
}

fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        // The specification asks for 1e-4; one forward and one log-sum-exp give the same number.
        assert_eq!(got.to_bits(), expected.to_bits(), "{what}, token {at}: {got} and {expected}");
    }
}

#[actix::test]
async fn the_same_request_gives_the_same_bits_alone_and_in_any_company() {
    let mut replica = Replica::launch(7);
    let (policy, _) = replica.publish(1).await;
    let (other, _) = replica.publish(2).await;
    let mut random = ChaCha8Rng::seed_from_u64(17);
    let mut any = |seed: u64| {
        let roll = random.next_u32();
        let prompt_tokens = if roll.is_multiple_of(8) { 300 } else { 1 + roll as usize % 40 };
        let mut request = request(seed, prompt_tokens, 1 + roll / 8 % 4, 1 + roll / 32 % 24);
        request.policy = [None, Some(policy), Some(other)][roll as usize / 1024 % 3];
        request.params.temperature = [1.0, 0.7, 0.0, 1.5][roll as usize / 4096 % 4];
        request.params.top_k = [-1, -1, 5, 40][roll as usize / 16384 % 4];
        request.params.top_p = [1.0, 0.9][roll as usize / 65536 % 2];
        request.flags.prompt_logprobs = roll / 131_072 % 3 == 0;
        request.flags.topk_prompt_logprobs = roll / 524_288 % 3;
        request
    };
    let requests: Vec<Generate> = (0..24).map(&mut any).collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(bits(&replica.sample(request.clone()).await));
    }
    for round in 0..3 {
        let answers: Vec<_> = (0..requests.len())
            .map(|i| (i * 7 + round * 5) % requests.len())
            .map(|i| (i, replica.submit(requests[i].clone()), replica.submit(any(1000 + i as u64))))
            .collect();
        for (i, answer, company) in answers {
            assert_eq!(bits(&done(answer.await)), alone[i], "request {i} in round {round}");
            done(company.await);
        }
    }
}

#[actix::test]
async fn sampled_and_prompt_logprobs_are_those_of_the_trainers_forward() {
    let mut replica = Replica::launch(16);
    let (policy, adapter) = replica.publish(1).await;
    let requests = (0..40).map(|seed| {
        let mut request = request(seed, 1 + seed as usize * 7 % 60, 2, 20);
        request.policy = Some(policy);
        request.params.temperature = 0.8;
        request.flags.prompt_logprobs = true;
        request
    });
    let answers: Vec<_> = requests.map(|request| (request.clone(), replica.submit(request))).collect();
    let mut far_from_base = 0.0f32;
    for (request, answer) in answers {
        let result = done(answer.await);
        let prompt_logprobs = result.prompt_logprobs.expect("asked for");
        assert_eq!(prompt_logprobs[0], None);
        let prompt_logprobs: Vec<f32> = prompt_logprobs.into_iter().flatten().collect();
        for sequence in &result.sequences {
            let tokens = [&request.prompt[..], &sequence.tokens].concat();
            let expected = trainer_logprobs(&replica.model, &adapter, &tokens);
            let (of_prompt, of_tokens) = expected.split_at(request.prompt.len() - 1);
            assert_same_bits(&prompt_logprobs, of_prompt, "prompt");
            assert_same_bits(sequence.logprobs.as_deref().expect("reported"), of_tokens, "sampled");
            let fresh = Adapter::init(adapter.layout.clone());
            let base = trainer_logprobs(&replica.model, &fresh, &tokens);
            far_from_base = base.iter().zip(&expected).fold(far_from_base, |m, (b, e)| m.max((b - e).abs()));
        }
    }
    assert!(far_from_base > 0.1, "the adapter changes nothing: {far_from_base}");
}

/// Where the model is on a GPU: it draws most rows, and leaves those with a filter to the host.
#[actix::test]
async fn a_gpu_draws_in_any_company_what_it_draws_alone() {
    let mut replica = Replica::launch_on(DeviceChoice::Emulated, 32);
    let published = [replica.publish(1).await, replica.publish(2).await];
    let fresh = Adapter::init(published[0].1.layout.clone());
    let ways = [(1.0, -1, 1.0), (0.0, -1, 1.0), (0.7, -1, 1.0), (1.0, 5, 1.0), (0.9, -1, 0.8)];
    let requests: Vec<Generate> = (0..15)
        .map(|seed| {
            let mut request = request(seed as u64, 1 + seed * 5 % 17, 2, 6);
            request.policy = published.get(seed % 3).map(|(policy, _)| *policy);
            (request.params.temperature, request.params.top_k, request.params.top_p) = ways[seed / 3];
            request
        })
        .collect();
    let mut alone = Vec::new();
    for (request, which) in requests.iter().zip((0..3).cycle()) {
        let result = replica.sample(request.clone()).await;
        for sequence in &result.sequences {
            let tokens = [&request.prompt[..], &sequence.tokens].concat();
            let adapter = published.get(which).map_or(&fresh, |(_, adapter)| adapter);
            let expected = trainer_logprobs(&replica.model, adapter, &tokens);
            let of_tokens = &expected[request.prompt.len() - 1..];
            assert_same_bits(sequence.logprobs.as_deref().expect("reported"), of_tokens, "sampled");
        }
        let [one, other] = &result.sequences[..] else { panic!("two were asked for") };
        assert_eq!(request.params.temperature == 0.0, one.tokens == other.tokens);
        alone.push(bits(&result));
    }
    let answers: Vec<_> = requests.iter().map(|request| replica.submit(request.clone())).collect();
    for (answer, alone) in answers.into_iter().zip(alone) {
        assert_eq!(bits(&done(answer.await)), alone);
    }
}

#[actix::test]
async fn a_publish_never_reaches_a_sequence_that_runs() {
    let mut replica = Replica::launch(4);
    let (first, _) = replica.publish(1).await;
    // Two waves of 400 tokens each.
    let long = Generate { policy: Some(first), ..request(5, 30, 8, 400) };
    let alone = bits(&replica.sample(long.clone()).await);
    let mut answer = replica.submit(long.clone());
    // Once this short one is answered, the long one has drawn a few tokens.
    replica.sample(request(6, 3, 1, 3)).await;
    // Without cores no step begins: what follows happens in the middle of the long one.
    let cores = replica.cores.lease(2, Priority::Training);
    let (second, _) = replica.publish(2).await;
    replica.address.try_send(Retire { policy: first }).expect("there is room");
    let later = replica.submit(Generate { policy: Some(second), ..long.clone() });
    let refused = failed(replica.submit(long).await);
    assert_eq!(refused.kind, ErrorKind::NotFound);
    assert!(answer.try_recv().is_err(), "the first request ended before the publish");
    drop(cores);
    let result = done(answer.await);
    assert_eq!(result.policy_version, 1);
    assert_eq!(bits(&result), alone);
    let later = done(later.await);
    assert_eq!(later.policy_version, 2);
    assert_ne!(later.sequences[0].tokens, result.sequences[0].tokens);
}

#[actix::test]
async fn samples_differ_and_may_come_in_waves() {
    let request = Generate { ..request(9, 70, 11, 6) };
    let wide = Replica::launch(32).sample(request.clone()).await;
    let narrow = Replica::launch(2).sample(request).await;
    assert_eq!(wide.sequences.len(), 11);
    assert_eq!(bits(&wide), bits(&narrow));
    let mut distinct: Vec<_> = wide.sequences.iter().map(|s| &s.tokens).collect();
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() > 8, "{distinct:?}");
    assert_eq!(wide.policy_version, 0);
}

#[actix::test]
async fn generation_ends_with_the_context_or_a_stop() {
    let replica = Replica::launch(4);
    let mut to_the_end = request(4, 500, 1, 1);
    to_the_end.params.max_tokens = None;
    let result = replica.sample(to_the_end).await;
    assert_eq!(result.sequences[0].tokens.len(), 12);
    assert_eq!(result.sequences[0].stop_reason, StopReason::Length);

    let free = request(21, 10, 1, 300);
    let tokens = replica.sample(free.clone()).await.sequences.remove(0).tokens;
    let text =
        |window: &[u32]| window.iter().flat_map(|&t| replica.model.text.token_bytes(t)).collect::<Vec<_>>();
    let is_ascii = |window: &[u32]| text(window).is_ascii();
    let at = tokens.windows(2).position(is_ascii).expect("300 random bytes have two ASCII ones in a row");
    let stop = String::from_utf8(text(&tokens[at..at + 2])).expect("ASCII");
    let mut stopped = free.clone();
    stopped.params.stop = Some(Stop::Texts(vec!["never drawn, for it is long".into(), stop]));
    let sequence = replica.sample(stopped).await.sequences.remove(0);
    assert_eq!(sequence.tokens, tokens[..at + 2]);
    assert_eq!(sequence.stop_reason, StopReason::Stop);

    let mut stopped = free;
    stopped.params.stop = Some(Stop::Tokens(vec![tokens[5]]));
    let sequence = replica.sample(stopped).await.sequences.remove(0);
    let first = tokens.iter().position(|&token| token == tokens[5]).expect("it is there");
    assert_eq!(sequence.tokens, tokens[..=first]);
    assert_eq!(sequence.stop_reason, StopReason::Stop);
}

#[actix::test]
async fn alternatives_are_the_most_likely_tokens_of_each_prompt_position() {
    let replica = Replica::launch(4);
    let mut request = request(2, 270, 1, 1);
    request.flags.topk_prompt_logprobs = 3;
    let result = replica.sample(request.clone()).await;
    assert!(result.prompt_logprobs.is_none());
    let alternatives = result.topk_prompt_logprobs.expect("asked for");
    assert_eq!(alternatives.len(), 270);
    assert_eq!(alternatives[0], None);

    let model = &replica.model;
    let (mut workspace, team) = (Workspace::default(), Team::solo());
    let sequence = BatchSequence { tokens: &request.prompt, kv_cache: None, adapter: None };
    let mut batch = Batch { sequences: vec![sequence] };
    let hidden = forward(model, &mut batch, None, &mut workspace, &team);
    let rows: Vec<_> = (0..269).map(|row| (row, None)).collect();
    let mut logits = Vec::new();
    head_logits(model, &hidden, &rows, &mut logits, &mut workspace, &team);
    for (row_v, found) in logits.chunks(model.config.vocab_size).zip(&alternatives[1..]) {
        let log_sum = row_v.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        let mut ranked: Vec<usize> = (0..row_v.len()).collect();
        ranked.sort_by(|&a, &b| row_v[b].total_cmp(&row_v[a]).then(a.cmp(&b)));
        for (&token, &(found, logprob)) in ranked.iter().zip(found.as_ref().expect("after the first")) {
            assert_eq!(token as u32, found);
            assert!((f64::from(row_v[token]) - log_sum - f64::from(logprob)).abs() < 1e-4);
        }
    }
}

#[actix::test]
async fn weights_that_are_not_those_named_are_never_served() {
    let mut replica = Replica::launch(4);
    let adapter = adapter(&replica.model.config, 1);
    let named = policy(1, Digest::of(b"other weights"));
    replica.stage(named, &adapter);
    let report = replica.next_report().await;
    let ReplicaReport::StageFailed { policy, error, .. } = report else { panic!("{report:?}") };
    assert_eq!(policy, named);
    for digest in [named.digest, adapter.digest()] {
        assert!(error.message.contains(&digest.to_string()), "{error}");
    }
    let answer = replica.submit(Generate { policy: Some(named), ..request(1, 3, 1, 3) });
    assert_eq!(failed(answer.await).kind, ErrorKind::NotFound);

    let truncated = adapter.to_bytes()[..100].to_vec();
    let stage = Stage { policy: named, base_model: "tiny".into(), adapter: truncated.into() };
    replica.address.try_send(stage).expect("there is room");
    let report = replica.next_report().await;
    assert!(matches!(report, ReplicaReport::StageFailed { .. }), "{report:?}");
}

#[actix::test]
async fn weights_that_have_diverged_are_an_error_of_that_request_alone() {
    for device in [DeviceChoice::Cpu, DeviceChoice::Emulated] {
        let mut replica = Replica::launch_on(device, 4);
        let mut huge = adapter(&replica.model.config, 1);
        huge.values = vec![3e38; huge.layout.len()].into();
        let diverged = policy(1, huge.digest());
        replica.stage(diverged, &huge);
        replica.next_report().await;
        replica.address.try_send(Activate { policy: diverged }).expect("there is room");
        let bad = replica.submit(Generate { policy: Some(diverged), ..request(1, 3, 2, 30) });
        let good = replica.submit(request(2, 3, 2, 30));
        assert_eq!(failed(bad.await).kind, ErrorKind::NotFinite);
        done(good.await);
    }
}

#[actix::test]
async fn a_panic_in_a_thread_answers_everybody_and_is_reported() {
    let replica = Replica::launch(4);
    let waiting = replica.submit(request(1, 30, 64, 400));
    let (tasks, receiver) = std::sync::mpsc::sync_channel(1);
    threads::spawn("replica-0-test".into(), receiver, replica.address.clone(), |()| panic!("boom"))
        .expect("a thread");
    tasks.send(()).expect("it listens");
    let error = failed(waiting.await);
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("boom"), "{error}");
    assert_eq!(failed(replica.submit(request(2, 3, 1, 1)).await).kind, ErrorKind::Internal);
    assert_eq!(replica.deaths.load(Ordering::SeqCst), 1);
}

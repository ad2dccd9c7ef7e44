//! The Rust clients against a whole cluster inside this process.

use std::{collections::BTreeMap, path::Path, time::Duration};

use candle_core::Tensor;
use lockstep::{
    client::{ClientError, CustomLoss, LoraOptions, SamplingSource, ServiceClient, TrainingClient},
    kernels::WeightDtype,
    model::{ComputeOptions, ModelSource, tiny},
    service::{Cluster, ClusterConfig},
    types::{
        AdamParams, CheckpointTarget, Datum, ErrorKind, LossFn, LossSpec, ModelInput, OperationError,
        SampleFlags, SamplingParams, Stop, TensorData, TensorValues, WandbConfig,
    },
};

const MODEL: &str = "tests/tiny";

fn cluster(directory: &Path) -> Cluster {
    cluster_in(WeightDtype::F32, directory)
}

fn cluster_in(dtype: WeightDtype, directory: &Path) -> Cluster {
    let path = directory.join("model");
    tiny::write(&path, &tiny::config(), 7).expect("a model directory");
    let model = ModelSource { name: MODEL.into(), aliases: vec!["tiny".into()], path };
    let config = ClusterConfig {
        compute: ComputeOptions { dtype, ..ComputeOptions::default() },
        data_dir: directory.join("data"),
        models: vec![model],
        nodes: 1,
        trainers: 2,
        samplers: 1,
        threads: 2,
    };
    Cluster::local(config).expect("a cluster")
}

fn service(cluster: &Cluster) -> ServiceClient {
    ServiceClient::connect_blocking(cluster.connector()).expect("a client")
}

fn train(service: &ServiceClient) -> TrainingClient {
    let options = LoraOptions { seed: 3, micro_batch_tokens: Some(24), ..LoraOptions::default() };
    service.create_lora_training_client_blocking(MODEL, 4, options).expect("a run")
}

fn tokens(seed: usize, length: usize) -> Vec<u32> {
    (0..length).map(|t| ((3 + seed * 31 + t * 7 + t * t * seed) % 250) as u32).collect()
}

/// A datum that predicts its own next tokens.
fn datum(seed: usize, length: usize) -> Datum {
    let sequence = tokens(seed, length + 1);
    let targets = sequence[1..].iter().map(|&token| i64::from(token)).collect();
    Datum {
        model_input: ModelInput::from_ints(sequence[..length].to_vec()),
        loss_fn_inputs: [("target_tokens".to_owned(), TensorData::from_i64(targets))].into(),
    }
}

fn data() -> Vec<Datum> {
    (0..7).map(|i| datum(i, 5 + 3 * i)).collect()
}

fn cross_entropy() -> LossSpec {
    LossSpec::new(LossFn::CrossEntropy)
}

fn adam() -> AdamParams {
    AdamParams { learning_rate: 1e-2, ..AdamParams::default() }
}

fn logprobs(output: &TensorData) -> Vec<f32> {
    match output.values() {
        TensorValues::F32(values) => values.clone(),
        other => panic!("log-probabilities are float32, not {other:?}"),
    }
}

#[test]
fn operations_submitted_ahead_execute_in_order() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster(directory.path());
    let training = train(&service(&cluster));
    let pending: Vec<_> = (0..5)
        .map(|_| (training.forward_backward(data(), cross_entropy()), training.optim_step(adam())))
        .collect();
    let waited = pending[4].1.result_timeout(Duration::ZERO);
    assert!(waited.is_err(), "five steps take longer than no time at all");
    let mut losses = Vec::new();
    for (i, (pass, step)) in pending.into_iter().enumerate() {
        losses.push(pass.result().expect("a pass").loss);
        assert_eq!(step.result().expect("a step").metrics["step"], (i + 1) as f64);
    }
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "the loss falls: {losses:?}");
    assert_eq!(training.policy_version_blocking().expect("its version"), 5);
    cluster.shutdown().expect("a clean end");
}

/// Each run's steps between those of the other leave what they leave alone, to the bit.
#[test]
fn runs_of_different_ranks_take_turns_on_one_base_model() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster(directory.path());
    let service = service(&cluster);
    let run = |rank: u32| {
        let options = LoraOptions { seed: u64::from(rank), ..LoraOptions::default() };
        service.create_lora_training_client_blocking(MODEL, rank, options).expect("a run")
    };
    let step = |training: &TrainingClient| {
        let pass = training.forward_backward(data(), cross_entropy());
        training.optim_step(adam()).result().expect("a step");
        pass.result().expect("a pass").loss
    };
    let scores = |training: &TrainingClient| {
        let scored = training.forward(data(), cross_entropy()).result().expect("a pass");
        scored.loss_fn_outputs.iter().flat_map(|output| logprobs(&output["logprobs"])).collect::<Vec<f32>>()
    };
    let together = [2, 8].map(run);
    let losses: Vec<[f64; 2]> = (0..3).map(|_| together.each_ref().map(step)).collect();
    for (i, rank) in [2, 8].into_iter().enumerate() {
        let alone = run(rank);
        let of_alone: Vec<f64> = (0..3).map(|_| step(&alone)).collect();
        assert_eq!(losses.iter().map(|both| both[i]).collect::<Vec<_>>(), of_alone, "rank {rank}");
        assert_eq!(scores(&together[i]), scores(&alone), "rank {rank}");
    }
    assert_ne!(scores(&together[0]), scores(&together[1]), "they are two runs");
    cluster.shutdown().expect("a clean end");
}

#[test]
fn samples_report_the_trainers_log_probabilities_and_the_version_that_served() {
    for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
        sampled_and_scored(dtype);
    }
}

fn sampled_and_scored(dtype: WeightDtype) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster_in(dtype, directory.path());
    let service = service(&cluster);
    let status = futures::executor::block_on(service.cluster_status()).expect("its status");
    let numerics = &status.nodes[0].numerics;
    assert!(numerics.ends_with(dtype.name()), "{numerics}");
    let training = train(&service);
    let mut clients = Vec::new();
    for version in 1..=3 {
        training.forward_backward(data(), cross_entropy());
        training.optim_step(adam());
        let sampling = training.save_weights_and_get_sampling_client(&format!("v{version}"));
        let sampling = sampling.result().expect("published");
        assert_eq!(sampling.policy_version(), Some(version));
        clients.push(sampling);
    }
    // The newest version, whose weights the trainer still holds.
    let params = SamplingParams { max_tokens: Some(12), seed: Some(1), ..SamplingParams::default() };
    let prompts: Vec<Vec<u32>> = (0..24).map(|i| tokens(i, 1 + 2 * i)).collect();
    let pending: Vec<_> = prompts
        .iter()
        .map(|p| {
            clients[2].sample(ModelInput::from_ints(p.clone()), 2, params.clone(), SampleFlags::default())
        })
        .collect();
    for (prompt, drawn) in prompts.iter().zip(pending) {
        let drawn = drawn.result().expect("a sample");
        assert_eq!(drawn.policy_version, 3);
        for sequence in &drawn.sequences {
            let whole = [prompt.as_slice(), &sequence.tokens].concat();
            let scored = Datum { model_input: ModelInput::from_ints(whole), loss_fn_inputs: BTreeMap::new() };
            let output = training.forward(vec![scored], cross_entropy()).result().expect("scored");
            let theirs = logprobs(&output.loss_fn_outputs[0]["logprobs"]);
            let ours = sequence.logprobs.as_ref().expect("reported");
            for (i, (ours, theirs)) in ours.iter().zip(&theirs[prompt.len() - 1..]).enumerate() {
                // The promise is 1e-4 in f32; one forward makes it the same bits.
                assert!(
                    (ours - theirs).abs() <= 1e-4,
                    "prompt {}, token {i}: {ours} and {theirs}",
                    prompt.len()
                );
            }
        }
    }
    // An older client is pinned to its own version, and so is what it reports.
    let older = clients[0].sample(ModelInput::from_ints(tokens(1, 4)), 1, params, SampleFlags::default());
    assert_eq!(older.result().expect("version 1 is still held").policy_version, 1);
}

#[test]
fn a_custom_loss_drives_the_same_backward_pass() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster(directory.path());
    let service = service(&cluster);
    let (built_in, custom) = (train(&service), train(&service));
    let summed = LossSpec { skip_token_normalization: true, ..cross_entropy() };
    let expected = built_in.forward_backward(data(), summed).result().expect("a pass");
    let pass = custom.forward_backward_custom(data(), |_, logprobs| {
        let sums = logprobs.iter().map(|lp| lp.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
        let loss = Tensor::stack(&sums, 0)?.sum_all()?.neg()?;
        Ok(CustomLoss { loss, metrics: [("mine".to_owned(), 1.5)].into() })
    });
    let published = |training: &TrainingClient| {
        training.optim_step(adam());
        let client = training.save_weights_and_get_sampling_client("w").result().expect("published");
        client.policy().expect("pinned").digest
    };
    // Submitted while the closure may not have run: it must come after the backward pass.
    assert_eq!(published(&custom), published(&built_in), "equal gradients leave equal bits");
    let output = pass.result().expect("a pass");
    assert_eq!(output.metrics["mine"], 1.5);
    assert!(
        (output.loss - expected.loss).abs() < 1e-3 * expected.loss.abs(),
        "{} {}",
        output.loss,
        expected.loss
    );
}

#[test]
fn state_is_saved_listed_downloaded_and_loaded() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster(directory.path());
    let service = service(&cluster);
    let training = train(&service);
    let step = |training: &TrainingClient| {
        training.forward_backward(data(), cross_entropy());
        training.optim_step(adam()).result().expect("a step");
    };
    let digest = |training: &TrainingClient, name: &str| {
        let client = training.save_weights_and_get_sampling_client(name).result().expect("published");
        client.policy().expect("pinned").digest
    };
    (0..2).for_each(|_| step(&training));
    let saved = training.save_state("two").result().expect("saved");
    (0..2).for_each(|_| step(&training));
    let straight = digest(&training, "straight");

    // Another run goes on from the saved state and ends at the same bits.
    let resumed =
        futures::executor::block_on(service.create_training_client_from_state_with_optimizer(&saved.path))
            .expect("resumed");
    assert_eq!(resumed.policy_version_blocking().expect("its version"), 2);
    // The budget that cuts micro-batches is part of what decides the bits, and a run's own.
    let again = training.load_state_with_optimizer(&saved.path).result().expect("loaded");
    assert_eq!(again.step, 2);
    (0..2).for_each(|_| step(&training));
    assert_eq!(digest(&training, "again"), straight);
    assert_eq!(training.load_state(&saved.path).result().expect("loaded").step, 0);

    let run = training.run();
    let listed = futures::executor::block_on(service.list_checkpoints(Some(run))).expect("a list");
    let names: Vec<_> = listed.iter().map(|c| (c.checkpoint_id.as_str(), c.target)).collect();
    for wanted in [
        ("two", CheckpointTarget::Trainer),
        ("straight", CheckpointTarget::Sampler),
        ("again", CheckpointTarget::Sampler),
    ] {
        assert!(names.contains(&wanted), "{wanted:?} of {names:?}");
    }
    let straight = listed.iter().find(|c| c.checkpoint_id == "straight").expect("listed");
    let out = directory.path().join("peft");
    futures::executor::block_on(service.download_checkpoint(straight.id, &out)).expect("downloaded");
    assert!(out.join("adapter_model.safetensors").exists() && out.join("adapter_config.json").exists());

    // The same weights through the checkpoint's path and through the published policy.
    let source = SamplingSource::ModelPath(straight.path.clone());
    let by_path = futures::executor::block_on(service.create_sampling_client(source)).expect("a client");
    let prompt = ModelInput::from_ints(tokens(2, 6));
    let scored = by_path.compute_logprobs(prompt.clone()).result().expect("scored");
    let live = training.save_weights_and_get_sampling_client("zero").result().expect("published");
    assert_eq!(live.policy_version(), Some(0), "load_state set the step back");
    assert_eq!(scored.len(), 6);
    assert!(scored[0].is_none() && scored[1..].iter().all(|lp| lp.is_some_and(|lp| lp < 0.0)));
    assert_ne!(live.compute_logprobs(prompt).result().expect("scored"), scored, "two steps apart");
}

/// Refused with `kind`, naming `field`; the run stays usable (checked by the caller).
fn refused<T: std::fmt::Debug>(outcome: Result<T, OperationError>, field: &str) {
    let error = outcome.expect_err(field);
    assert_eq!(error.kind, ErrorKind::InvalidInput, "{error}");
    assert!(error.message.contains(field), "{error:?} names {field}");
}

#[test]
fn bad_input_is_refused_by_field_and_the_run_stays_usable() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster(directory.path());
    let service = service(&cluster);
    let training = train(&service);
    let vocabulary = tiny::config().vocab_size as u32;
    let context = tiny::config().max_position_embeddings;
    let with = |name: &str, tensor: TensorData| {
        let mut bad = datum(1, 4);
        bad.loss_fn_inputs.insert(name.into(), tensor);
        vec![datum(0, 4), bad]
    };
    let pass = |data| training.forward_backward(data, cross_entropy()).result();

    refused(pass(vec![]), "data");
    let outside =
        Datum { model_input: ModelInput::from_ints(vec![1, vocabulary]), loss_fn_inputs: BTreeMap::new() };
    refused(pass(vec![outside]), "data[0].model_input");
    refused(
        pass(with("target_tokens", TensorData::from_i64(vec![1, 2, 3]))),
        "data[1].loss_fn_inputs.target_tokens",
    );
    refused(
        pass(with("weights", TensorData::from_f32(vec![1.0, f32::NAN, 1.0, 1.0]))),
        "data[1].loss_fn_inputs.weights",
    );
    refused(pass(with("nonsense", TensorData::from_f32(vec![1.0; 4]))), "nonsense");
    refused(pass(vec![datum(1, context + 1)]), "data[0].model_input");
    let importance = LossSpec::new(LossFn::ImportanceSampling);
    refused(training.forward_backward(data(), importance).result(), "data[0].loss_fn_inputs.logprobs");
    let mut unknown = cross_entropy();
    unknown.config.insert("nonsense".into(), 1.0);
    refused(training.forward_backward(data(), unknown).result(), "nonsense");
    refused(training.optim_step(AdamParams { beta1: 1.5, ..adam() }).result(), "beta1");
    refused(training.save_state("../escape").result().map(|_| ()), "name");
    assert!("sft".parse::<LossFn>().expect_err("no such loss").to_string().contains("sft"));
    let missing =
        training.load_state("bt://loops:run-1/weights/nothing").result().expect_err("no such checkpoint");
    assert_eq!(missing.kind, ErrorKind::NotFound, "{missing}");

    let create =
        |model: &str, rank, options| service.create_lora_training_client_blocking(model, rank, options);
    let error = |created: Result<TrainingClient, ClientError>| created.err().expect("refused").to_string();
    assert!(error(create("no/model", 4, LoraOptions::default())).contains(MODEL), "names what is offered");
    assert!(error(create(MODEL, 0, LoraOptions::default())).contains("rank"));
    let three = LoraOptions { replicas: Some(3), ..LoraOptions::default() };
    let message = error(create(MODEL, 4, three));
    assert!(message.contains('3') && message.contains('2'), "both numbers: {message}");

    // Nothing of all that was kept: one good step equals that of a run that saw no bad input.
    let digest = |training: &TrainingClient| {
        training.forward_backward(data(), cross_entropy()).result().expect("a pass");
        training.optim_step(adam()).result().expect("a step");
        let client = training.save_weights_and_get_sampling_client("good").result().expect("published");
        client.policy().expect("pinned").digest
    };
    assert_eq!(digest(&training), digest(&train(&service)));

    let sampling = training.save_weights_and_get_sampling_client("s").result().expect("published");
    let sample = |prompt: Vec<u32>, n, params| {
        sampling.sample(ModelInput::from_ints(prompt), n, params, SampleFlags::default()).result()
    };
    let params = SamplingParams { max_tokens: Some(2), ..SamplingParams::default() };
    refused(sample(vec![], 1, params.clone()), "prompt");
    refused(sample(vec![vocabulary], 1, params.clone()), "prompt");
    refused(sample(vec![1; context], 1, params.clone()), "prompt");
    refused(sample(vec![1], 0, params.clone()), "num_samples");
    refused(sample(vec![1], 1, SamplingParams { top_p: 0.0, ..params.clone() }), "top_p");
    refused(sample(vec![1], 1, SamplingParams { temperature: -1.0, ..params.clone() }), "temperature");
    let stop = Some(Stop::Text(String::new()));
    refused(sample(vec![1], 1, SamplingParams { stop, ..params.clone() }), "stop");
    assert_eq!(sample(vec![1], 3, params).expect("a sample").sequences.len(), 3);
}

/// Writes where `LOCKSTEP_WANDB` says, for `tests/python/test_wandb.py` to read back; `tests/run` sets it and
/// `WANDB_MODE=offline`.
#[test]
fn metrics_reach_weights_and_biases() {
    let Ok(proof) = std::env::var("LOCKSTEP_WANDB") else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster(directory.path());
    let service = service(&cluster);
    let wandb = WandbConfig { entity: None, project: "lockstep".into(), name: Some("proof".into()) };
    let options = LoraOptions { wandb: Some(wandb), ..LoraOptions::default() };
    let training = service.create_lora_training_client_blocking(MODEL, 4, options).expect("a run");
    let mut losses = Vec::new();
    for _ in 0..3 {
        let pass = training.forward_backward(data(), cross_entropy());
        training.optim_step(adam()).result().expect("a step");
        losses.push(pass.result().expect("a pass").loss);
    }
    let expected = format!("{{\"run\": \"{}\", \"losses\": {losses:?}}}", training.run());
    std::fs::write(Path::new(&proof).join("expected.json"), expected).expect("written");
}

/// The same without the package: one clear error, and no run. `tests/run` sets a `PATH` that has none.
#[test]
fn without_wandb_there_is_one_clear_error_and_no_run() {
    if std::env::var_os("LOCKSTEP_NO_WANDB").is_none() {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cluster = cluster(directory.path());
    let service = service(&cluster);
    let wandb = WandbConfig { entity: None, project: "lockstep".into(), name: None };
    let options = LoraOptions { wandb: Some(wandb), ..LoraOptions::default() };
    let error = service.create_lora_training_client_blocking(MODEL, 4, options).err().expect("refused");
    assert!(error.to_string().contains("Weights & Biases logging can't start"), "{error}");
    assert!(service.cluster_status_blocking().expect("status").runs.is_empty(), "it left a run behind");
}

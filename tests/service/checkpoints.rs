//! Checkpoints: what comes back, what is refused, and what goes out and in.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use lockstep::{
    client::{LoraOptions, SamplingSource, ServiceClient, TrainingClient},
    types::{AdamParams, ErrorKind, LossFn, LossSpec, ModelInput, SampleFlags, SamplingParams},
};

use crate::up::{MODEL, Up, connect, data, lockstep, sample, step, train, wait_until_gone};

#[test]
fn twenty_steps_are_ten_a_restart_and_ten_more() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let up = Up::start(directory, &["--trainers", "2"]);
    let service = connect(directory);
    let (straight, split) = (train_on(&service, 1), train_on(&service, 2));
    (0..20).for_each(|number| step_number(&straight, number));
    (0..10).for_each(|number| step_number(&split, number));
    let expected = straight.save_state("end").result().expect("saved").path;
    let half_way = split.save_state("half-way").result().expect("saved").path;
    let expected = export(directory, &expected, "straight");
    drop((straight, split, service));
    up.signal("-INT");
    assert!(up.ended_well());
    wait_until_gone(directory);

    let _up = Up::start(directory, &["--trainers", "3", "--nodes", "3"]);
    let service = connect(directory);
    let resumed = train_on(&service, 3);
    assert_eq!(resumed.load_state_with_optimizer(&half_way).result().expect("loaded").step, 10);
    (10..20).for_each(|number| step_number(&resumed, number));
    let found = resumed.save_state("end").result().expect("saved").path;
    let found = export(directory, &found, "resumed");
    let state = |directory: &Path| fs::read(directory.join("state.safetensors")).expect("a state");
    assert!(state(&found) == state(&expected), "weights, moments and counts, to the bit");

    let proved = cli(directory, &["checkpoints", "verify", found.to_str().expect("text")]);
    assert!(proved.expect("whole").contains("step 20"));
    let proved = cli(directory, &["checkpoints", "verify", &half_way]);
    assert!(proved.expect("whole").contains("step 10"));
    fs::write(found.join("state.safetensors"), &state(&found)[..5000]).expect("truncated");
    let refused = cli(directory, &["checkpoints", "verify", found.to_str().expect("text")]);
    assert!(refused.expect_err("truncated").contains("`state.safetensors` has 5000 bytes"));
}

#[test]
fn a_checkpoint_that_was_altered_in_the_store_is_refused_by_name() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let up = Up::start(directory, &["--trainers", "1"]);
    let training = train(&connect(directory));
    step(&training);
    let path = training.save_state("mine").result().expect("saved").path;
    let digest = cli(directory, &["checkpoints", "verify", &path]).expect("whole");
    let digest = digest.split(' ').next().expect("a digest").to_owned();
    // So that the state that the run itself goes on from is another blob.
    step(&training);
    let run = training.run();
    drop(training);
    up.signal("-INT");
    assert!(up.ended_well());
    wait_until_gone(directory);
    let blob = directory.join("data/blobs").join(&digest[..2]).join(&digest);
    let mut bytes = fs::read(&blob).expect("the blob");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).expect("altered");

    let _up = Up::start(directory, &["--trainers", "1"]);
    let service = connect(directory);
    let training = futures::executor::block_on(service.attach_training_client(run)).expect("the run");
    let error = training.load_state_with_optimizer(&path).result().expect_err("altered");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    assert!(error.message.contains(&path) && error.message.contains("`state.safetensors`"), "{error}");
    let refused = cli(directory, &["checkpoints", "verify", &path]).expect_err("altered");
    assert!(refused.contains("`state.safetensors`") && refused.contains("damaged"), "{refused}");
    step(&training);
    assert_eq!(training.policy_version_blocking().expect("its version"), 3, "the run is as it was");
}

#[test]
fn an_adapter_goes_out_and_comes_in_again() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let _up = Up::start(directory, &["--trainers", "2"]);
    let service = connect(directory);
    let training = train(&service);
    (0..3).for_each(|_| step(&training));
    let before = sample(&training, "mine");
    let path = training.save_weights_for_sampler("mine").result().expect("saved").path;
    let exported = export(directory, &path, "exported");
    let exported = exported.to_str().expect("text");
    cli(directory, &["checkpoints", "verify", exported]).expect("whole");

    let import = ["checkpoints", "import", exported, "--base-model", MODEL, "--name", "again"];
    let printed = cli(directory, &import).expect("imported");
    let imported = printed.lines().last().expect("a sampler path").to_owned();
    let source = SamplingSource::ModelPath(imported);
    let sampling = futures::executor::block_on(service.create_sampling_client(source)).expect("served");
    let params = SamplingParams { seed: Some(5), max_tokens: Some(12), ..SamplingParams::default() };
    let prompt = ModelInput::from_ints(vec![1, 40, 41, 42]);
    let after = sampling.sample(prompt, 2, params, SampleFlags::default()).result().expect("a sample");
    assert_eq!(after.sequences, before.sequences, "the same weights");

    let model = directory.join("model");
    let (model, merged) = (model.to_str().expect("text"), directory.join("merged"));
    let merge = ["checkpoints", "merge", exported, "--model", model, "--out", merged.to_str().expect("text")];
    cli(directory, &merge).expect("merged");
    assert!(merged.join("model.safetensors").exists() && merged.join("tokenizer.json").exists());
    let refused = cli(directory, &merge).expect_err("it is not written over");
    assert!(refused.contains("not empty"), "{refused}");
}

/// A run on so many ranks.
fn train_on(service: &ServiceClient, ranks: u32) -> TrainingClient {
    let options = LoraOptions {
        seed: 3,
        micro_batch_tokens: Some(16),
        replicas: Some(ranks),
        ..LoraOptions::default()
    };
    service.create_lora_training_client_blocking(MODEL, 4, options).expect("a run")
}

/// Other data each step, so that a step that is missed or done twice shows.
fn step_number(training: &TrainingClient, number: usize) {
    let pass = training.forward_backward(data(7, 9 + number % 5), LossSpec::new(LossFn::CrossEntropy));
    let adam = AdamParams { learning_rate: 1e-2, weight_decay: 0.01, ..AdamParams::default() };
    let update = training.optim_step(adam);
    pass.result().expect("a pass");
    update.result().expect("a step");
}

/// A command of the binary on this directory's service: its output, or what it said on stderr.
fn cli(directory: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = lockstep().args(arguments).env("LOCKSTEP_DATA_DIR", directory.join("data")).output();
    let Output { status, stdout, stderr } = output.expect("the binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    if status.success() { Ok(text(stdout)) } else { Err(text(stderr)) }
}

/// Writes a checkpoint into a directory of this name.
fn export(directory: &Path, path: &str, name: &str) -> PathBuf {
    let to = directory.join(name);
    cli(directory, &["checkpoints", "export", path, to.to_str().expect("text")]).expect("exported");
    to
}

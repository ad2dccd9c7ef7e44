//! A service whose blobs are in a bucket of a real S3 server.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
};

use lockstep::types::{AdamParams, LossFn, LossSpec, PolicyId};

use crate::{
    s3_server::{BUCKET, S3Server},
    up::{Up, command, connect, data, lockstep, refusal_of, sample, step, train, wait_until_gone},
};

fn up(directory: &Path, server: &S3Server, arguments: &[&str]) -> Command {
    let mut command = command(directory, arguments);
    command.envs(server.environment());
    command
}

#[test]
fn a_killed_service_goes_on_from_its_bucket_to_the_same_weights() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let expected = undisturbed(&directory.join("calm"));

    let server = S3Server::start(&directory.join("s3"));
    let location = format!("s3://{BUCKET}/runs");
    let first = Up::spawn(up(directory, &server, &["--trainers", "2", "--store", &location]));
    let training = train(&connect(directory));
    (0..3).for_each(|_| step(&training));
    let before = sample(&training, "before");
    // The gradient of a pass whose step was never asked for.
    training.forward_backward(data(6, 12), LossSpec::new(LossFn::CrossEntropy)).result().expect("a pass");
    let run = training.run();
    first.signal("-KILL");
    drop((training, first));
    wait_until_gone(directory);
    assert!(server.object("runs/owner").exists(), "the prefix is claimed");
    assert!(!directory.join("data/blobs").exists(), "blobs beside a bucket");

    // Without --store: the data directory remembers.
    let again = Up::spawn(up(directory, &server, &["--trainers", "3", "--nodes", "3"]));
    let service = connect(directory);
    let training = futures::executor::block_on(service.attach_training_client(run)).expect("the run");
    assert_eq!(sample(&training, "again"), before);
    let adam = AdamParams { learning_rate: 1e-2, ..AdamParams::default() };
    training.optim_step(adam).result().expect("a step");
    (0..2).for_each(|_| step(&training));
    assert_eq!(sampled_policy(&training), expected);

    files_come_from_the_bucket(&service, &training, &again.http, &server);
    drop(again);
    wait_until_gone(directory);
}

/// Six steps on a local directory.
fn undisturbed(directory: &Path) -> PolicyId {
    std::fs::create_dir_all(directory).expect("a directory");
    let up = Up::start(directory, &["--trainers", "2"]);
    let training = train(&connect(directory));
    (0..6).for_each(|_| step(&training));
    let policy = sampled_policy(&training);
    drop(up);
    wait_until_gone(directory);
    policy
}

/// Names the weights by their digest; the run's number is the same in each data directory.
fn sampled_policy(training: &lockstep::client::TrainingClient) -> PolicyId {
    training.save_weights_and_get_sampling_client("end").result().expect("published").policy().expect("one")
}

/// Over HTTP a file of a checkpoint has a URL of the bucket, which needs no key and serves the file.
fn files_come_from_the_bucket(
    service: &lockstep::client::ServiceClient,
    training: &lockstep::client::TrainingClient,
    http: &str,
    server: &S3Server,
) {
    training.save_state("mine").result().expect("saved");
    let listed = futures::executor::block_on(service.list_checkpoints(Some(training.run()))).expect("a list");
    let checkpoint = listed.iter().find(|c| c.checkpoint_id == "mine").expect("it is listed");
    let id = checkpoint.id;
    let answer = http_get(&format!("{http}/v1/loops/checkpoints/{id}/files"));
    let page: serde_json::Value = serde_json::from_slice(body_of(&answer)).expect("JSON");
    let files = page["presigned_urls"].as_array().expect("files");
    assert!(!files.is_empty());
    let exported = tempfile::tempdir().expect("a temporary directory");
    futures::executor::block_on(service.download_checkpoint(id, exported.path())).expect("downloaded");
    for file in files {
        let url = file["url"].as_str().expect("a URL");
        assert!(url.starts_with(&format!("http://{}/{BUCKET}/runs/", server.address)), "{url}");
        let answer = http_get(url);
        let name = file["relative_file_name"].as_str().expect("a name");
        let expected = std::fs::read(exported.path().join(name)).expect("the file over QUIC");
        assert!(body_of(&answer) == expected, "{name} is the same over both ways");
    }
}

fn http_get(url: &str) -> Vec<u8> {
    let (host, path) = url.strip_prefix("http://").expect("a URL").split_once('/').expect("a path");
    let mut stream = TcpStream::connect(host).expect("HTTP is served");
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    answer
}

fn body_of(answer: &[u8]) -> &[u8] {
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(answer));
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("headers end");
    &answer[end + 4..]
}

#[test]
fn a_bucket_that_can_not_be_used_is_one_clear_error_at_the_start() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let server = S3Server::start(&directory.join("s3"));
    let location = format!("s3://{BUCKET}/runs");

    let stderr = refusal_of(up(directory, &server, &["--store", "s3://no-such-bucket/runs"]));
    assert!(stderr.contains("s3://no-such-bucket/runs: this bucket does not exist"), "{stderr}");

    let mut wrong = up(directory, &server, &["--store", &location]);
    wrong.env("AWS_SECRET_ACCESS_KEY", "wrong");
    let stderr = refusal_of(wrong);
    assert!(stderr.contains("AWS_SECRET_ACCESS_KEY") && stderr.contains("SignatureDoesNotMatch"), "{stderr}");

    let mut closed = up(directory, &server, &["--store", &location]);
    closed.env("AWS_ENDPOINT_URL", "http://127.0.0.1:9");
    let stderr = refusal_of(closed);
    assert!(stderr.contains("can't be reached") && stderr.contains("refused"), "{stderr}");
    assert_eq!(stderr.matches("can't be reached").count(), 1, "said once: {stderr}");

    let stderr = refusal_of(up(directory, &server, &["--store", "/var/blobs"]));
    assert!(stderr.contains("s3://BUCKET/PREFIX"), "{stderr}");
    wait_until_gone(directory);
}

#[test]
fn the_doctor_looks_at_the_bucket() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let server = S3Server::start(&directory.join("s3"));
    let doctor = |bucket: &str| {
        let mut doctor = lockstep();
        doctor.arg("doctor").envs(server.environment()).arg("--data-dir").arg(directory.join("data"));
        let ended = doctor.args(["--store", &format!("s3://{bucket}/runs")]).output().expect("it runs");
        (ended.status.success(), String::from_utf8_lossy(&ended.stdout).into_owned())
    };
    let (_, said) = doctor(BUCKET);
    assert!(said.contains(&format!("s3://{BUCKET}/runs can be read, written and swept")), "{said}");
    let (well, said) = doctor("no-such-bucket");
    assert!(!well && said.contains("this bucket does not exist"), "{said}");
}

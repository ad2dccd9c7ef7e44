//! Starting, stopping, refusing, and what a user sees of it.

use std::{fs, io::Read, net::TcpListener, time::Duration};

use lockstep::{
    model::tiny,
    types::{AdamParams, LossFn, LossSpec},
};

use crate::up::{MODEL, Up, connect, data, refused, sample, send_signal, step, train, wait_until_gone};

#[test]
fn a_restart_finds_the_runs_and_goes_on() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let up = Up::start(directory, &["--trainers", "2"]);
    let training = train(&connect(directory));
    (0..3).for_each(|_| step(&training));
    let before = sample(&training, "before");
    assert_eq!(before.policy_version, 3);
    let run = training.run();
    drop(training);
    up.signal("-INT");
    assert!(up.ended_well(), "Ctrl-C ends it cleanly");
    wait_until_gone(directory);

    // With another number of ranks: bits do not depend on them.
    let up = Up::start(directory, &["--trainers", "3", "--nodes", "3"]);
    let service = connect(directory);
    let training =
        futures::executor::block_on(service.attach_training_client(run)).expect("the run is there");
    assert_eq!(training.policy_version_blocking().expect("its version"), 3);
    assert_eq!(sample(&training, "again"), before, "the same weights, seed and request");
    step(&training);
    assert_eq!(sample(&training, "after").policy_version, 4);
    drop(up);
    wait_until_gone(directory);
}

#[test]
fn a_killed_node_costs_time_alone_and_nothing_outlives_up() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let up = Up::start(directory, &["--trainers", "2"]);
    let service = connect(directory);
    let training = train(&service);
    step(&training);
    let before = sample(&training, "before");

    // Long enough to be hit: a second or more in the dev profile.
    let pass = training.forward_backward(data(512, 256), LossSpec::new(LossFn::CrossEntropy));
    std::thread::sleep(Duration::from_millis(300));
    let node = futures::executor::block_on(service.cluster_status()).expect("status").nodes.remove(0);
    assert!(!pass.is_done(), "the pass ended before the node could be killed");
    send_signal("-KILL", node.pid);
    let loss = pass.result().expect("another life of the node does it again").loss;
    assert!(loss.is_finite());

    // The run is restored from the journal: the same weights, and the gradient of one pass.
    assert_eq!(sample(&training, "restored"), before);
    training.optim_step(AdamParams::default()).result().expect("a step");
    assert_eq!(sample(&training, "after").policy_version, 2);

    up.signal("-KILL");
    wait_until_gone(directory);
}

#[test]
fn what_can_not_start_says_why_in_one_sentence() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();

    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound").to_string();
    let stderr = refused(directory, &["--http", &address]);
    assert!(stderr.contains(&address) && stderr.contains("--http"), "{stderr}");

    let stderr = refused(directory, &["--http", "0.0.0.0:0"]);
    assert!(stderr.contains("--insecure"), "{stderr}");

    let stderr = refused(directory, &["--model", "other=/nowhere/at/all"]);
    assert!(stderr.contains("/nowhere/at/all"), "{stderr}");

    let truncated = directory.join("truncated");
    tiny::write(&truncated, &tiny::config(), 1).expect("a model directory");
    let weights = truncated.join("model.safetensors");
    let length = fs::metadata(&weights).expect("weights").len();
    fs::File::options().write(true).open(&weights).and_then(|f| f.set_len(length / 2)).expect("truncated");
    let stderr = refused(directory, &["--model", &format!("broken={}", truncated.display())]);
    assert!(stderr.contains("model.safetensors"), "{stderr}");
    wait_until_gone(directory);
}

#[test]
fn a_data_directory_in_use_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let up = Up::start(directory, &[]);
    let stderr = refused(directory, &[]);
    assert!(stderr.contains("data"), "{stderr}");
    // The first still serves, over QUIC and HTTP.
    let capabilities = futures::executor::block_on(connect(directory).get_server_capabilities());
    assert_eq!(capabilities.expect("it answers").supported_models[0].model_name, MODEL);
    let body = http_get(&up.http, "/health");
    assert!(body.starts_with("HTTP/1.1 200") && body.contains("\"ok\""), "{body}");
    let body = http_get(&up.http, "/v1/loops/capabilities");
    assert!(body.contains(MODEL), "{body}");
    let body = http_get(&up.http, "/nothing");
    assert!(body.starts_with("HTTP/1.1 404"), "{body}");
}

pub fn http_get(base: &str, path: &str) -> String {
    use std::io::Write;
    let address = base.strip_prefix("http://").expect("a URL");
    let mut stream = std::net::TcpStream::connect(address).expect("HTTP is served");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

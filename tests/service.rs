//! `lockstep up` as a user runs it: real processes on loopback, a model of a few kilobytes.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use lockstep::{
    client::{LoraOptions, ServiceClient, TrainingClient},
    model::tiny,
    types::{
        AdamParams, Datum, ErrorKind, LossFn, LossSpec, ModelInput, SampleFlags, SampleResult, SamplingParams,
    },
};

const MODEL: &str = "tests/tiny";

/// Generous: a shared machine may be slow, and a test that waits for nothing ends at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `lockstep up`; killed with the test.
struct Up {
    process: Child,
    http: String,
}

impl Up {
    /// Starts on any free ports and waits for the `ready` line.
    fn start(directory: &Path, arguments: &[&str]) -> Self {
        let mut process =
            command(directory, arguments).stdout(Stdio::piped()).spawn().expect("the binary starts");
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let ready = lines.next().expect("`up` says when it is ready, or dies").expect("text");
        let http = ready.strip_prefix("ready ").unwrap_or_else(|| panic!("{ready:?}")).to_owned();
        Self { process, http }
    }

    fn signal(&self, signal: &str) {
        send_signal(signal, self.process.id());
    }

    /// Waits for its end; true if it was a clean one.
    fn ended_well(mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.process.try_wait().expect("waited for") {
                Some(status) => return status.success(),
                None if Instant::now() > deadline => panic!("`up` did not end within {PATIENCE:?}"),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn command(directory: &Path, arguments: &[&str]) -> Command {
    let model = directory.join("model");
    if !model.exists() {
        tiny::write(&model, &tiny::config(), 7).expect("a model directory");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command
        .args(["up", "--http", "127.0.0.1:0", "--threads", "2", "--data-dir"])
        .arg(directory.join("data"))
        .arg("--model")
        .arg(format!("{MODEL}={}", model.display()))
        .args(arguments);
    command
}

/// Runs `up` where it must refuse to start.
fn refused(directory: &Path, arguments: &[&str]) -> String {
    let process = command(directory, arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut process = process.expect("the binary starts");
    let deadline = Instant::now() + PATIENCE;
    while process.try_wait().expect("waited for").is_none() {
        assert!(Instant::now() < deadline, "`up {arguments:?}` neither refused nor ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    let Output { status, stdout, stderr } = process.wait_with_output().expect("its output");
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!status.success(), "{stderr}");
    assert!(!String::from_utf8_lossy(&stdout).contains("ready"), "it said it was ready");
    stderr
}

fn send_signal(signal: &str, pid: u32) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill");
    assert!(status.success(), "kill {signal} {pid}");
}

/// Processes whose command line names this test's directory.
fn processes_of(directory: &Path) -> Vec<u32> {
    let name = directory.to_string_lossy().into_owned();
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_string_lossy().parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&line).contains(&name).then_some(pid)
        })
        .collect()
}

fn wait_until_gone(directory: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !processes_of(directory).is_empty() {
        assert!(Instant::now() < deadline, "still running: {:?}", processes_of(directory));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn connect(directory: &Path) -> ServiceClient {
    ServiceClient::connect_blocking(&directory.join("data")).expect("the service is up")
}

fn train(service: &ServiceClient) -> TrainingClient {
    let options = LoraOptions { seed: 3, micro_batch_tokens: Some(16), ..LoraOptions::default() };
    service.create_lora_training_client_blocking(MODEL, 4, options).expect("a run")
}

fn data(datums: usize, length: usize) -> Vec<Datum> {
    let datum = |i: usize| Datum {
        model_input: ModelInput::from_ints(
            (0..length).map(|t| ((3 + i * 31 + t * 7) % 250) as u32).collect(),
        ),
        loss_fn_inputs: Default::default(),
    };
    (0..datums).map(datum).collect()
}

fn step(training: &TrainingClient) {
    let pass = training.forward_backward(data(6, 12), LossSpec::new(LossFn::CrossEntropy));
    let update = training.optim_step(AdamParams { learning_rate: 1e-2, ..AdamParams::default() });
    pass.result().expect("a pass");
    update.result().expect("a step");
}

fn sample(training: &TrainingClient, name: &str) -> SampleResult {
    let sampling = training.save_weights_and_get_sampling_client(name).result().expect("published");
    let params = SamplingParams { seed: Some(5), max_tokens: Some(12), ..SamplingParams::default() };
    let prompt = ModelInput::from_ints(vec![1, 40, 41, 42]);
    sampling.sample(prompt, 2, params, SampleFlags::default()).result().expect("a sample")
}

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
fn a_killed_node_costs_one_operation_and_nothing_outlives_up() {
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
    let error = pass.result().expect_err("its node is gone");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    assert!(error.message.contains(&node.name), "{error} names {}", node.name);

    // The node comes back, the run is restored from the journal, nothing of the pass is left.
    assert_eq!(sample(&training, "restored"), before);
    step(&training);
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

fn http_get(base: &str, path: &str) -> String {
    use std::io::Write;
    let address = base.strip_prefix("http://").expect("a URL");
    let mut stream = std::net::TcpStream::connect(address).expect("HTTP is served");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

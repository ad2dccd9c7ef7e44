//! `lockstep up` as a process, its relatives, and small runs on it.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use lockstep::{
    client::{LoraOptions, ServiceClient, TrainingClient},
    model::tiny,
    types::{AdamParams, Datum, LossFn, LossSpec, ModelInput, SampleFlags, SampleResult, SamplingParams},
};

pub const MODEL: &str = "tests/tiny";

/// Generous: a shared machine may be slow, and a test that waits for nothing ends at once.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running `lockstep up`; killed with the test.
pub struct Up {
    process: Child,
    pub http: String,
}

impl Up {
    /// Starts on any free ports and waits for the `ready` line.
    pub fn start(directory: &Path, arguments: &[&str]) -> Self {
        Self::spawn(command(directory, arguments))
    }

    /// The same of a command that the test has added to.
    pub fn spawn(mut command: Command) -> Self {
        let mut process = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let ready = lines.next().expect("`up` says when it is ready, or dies").expect("text");
        let http = ready.strip_prefix("ready ").unwrap_or_else(|| panic!("{ready:?}")).to_owned();
        Self { process, http }
    }

    pub fn signal(&self, signal: &str) {
        send_signal(signal, self.process.id());
    }

    /// Waits for its end; true if it was a clean one.
    pub fn ended_well(mut self) -> bool {
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

pub fn lockstep() -> Command {
    Command::new(env!("CARGO_BIN_EXE_lockstep"))
}

/// The test's model, made if it is missing.
pub fn model_of(directory: &Path) -> PathBuf {
    let model = directory.join("model");
    if !model.exists() {
        tiny::write(&model, &tiny::config(), 7).expect("a model directory");
    }
    model
}

pub fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = lockstep();
    command
        .args(["up", "--http", "127.0.0.1:0", "--threads", "2", "--data-dir"])
        .arg(directory.join("data"))
        .arg("--model")
        .arg(format!("{MODEL}={}", model_of(directory).display()))
        .args(arguments);
    command
}

/// Runs `up` where it must refuse to start.
pub fn refused(directory: &Path, arguments: &[&str]) -> String {
    refusal_of(command(directory, arguments))
}

/// The same of a command that the test has added to.
pub fn refusal_of(mut command: Command) -> String {
    let process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut process = process.expect("the binary starts");
    let deadline = Instant::now() + PATIENCE;
    while process.try_wait().expect("waited for").is_none() {
        assert!(Instant::now() < deadline, "{command:?} neither refused nor ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    let Output { status, stdout, stderr } = process.wait_with_output().expect("its output");
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!status.success(), "{stderr}");
    assert!(!String::from_utf8_lossy(&stdout).contains("ready"), "it said it was ready");
    stderr
}

pub fn send_signal(signal: &str, pid: u32) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill");
    assert!(status.success(), "kill {signal} {pid}");
}

/// Processes whose command line names this test's directory, of one subcommand or of all.
pub fn processes_of(directory: &Path, kind: Option<&str>) -> Vec<u32> {
    let name = directory.to_string_lossy().into_owned();
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let mut processes: Vec<u32> = entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_string_lossy().parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let of_kind = kind.is_none_or(|kind| line.split('\0').nth(1) == Some(kind));
            (of_kind && line.contains(&name)).then_some(pid)
        })
        .collect();
    processes.sort_unstable();
    processes
}

pub fn wait_until_gone(directory: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !processes_of(directory, None).is_empty() {
        assert!(Instant::now() < deadline, "still running: {:?}", processes_of(directory, None));
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn connect(directory: &Path) -> ServiceClient {
    ServiceClient::connect_blocking(&directory.join("data")).expect("the service is up")
}

pub fn train(service: &ServiceClient) -> TrainingClient {
    let options = LoraOptions { seed: 3, micro_batch_tokens: Some(16), ..LoraOptions::default() };
    service.create_lora_training_client_blocking(MODEL, 4, options).expect("a run")
}

pub fn data(datums: usize, length: usize) -> Vec<Datum> {
    let datum = |i: usize| Datum {
        model_input: ModelInput::from_ints(
            (0..length).map(|t| ((3 + i * 31 + t * 7) % 250) as u32).collect(),
        ),
        loss_fn_inputs: Default::default(),
    };
    (0..datums).map(datum).collect()
}

pub fn step(training: &TrainingClient) {
    let pass = training.forward_backward(data(6, 12), LossSpec::new(LossFn::CrossEntropy));
    let update = training.optim_step(AdamParams { learning_rate: 1e-2, ..AdamParams::default() });
    pass.result().expect("a pass");
    update.result().expect("a step");
}

pub fn sample(training: &TrainingClient, name: &str) -> SampleResult {
    let sampling = training.save_weights_and_get_sampling_client(name).result().expect("published");
    let params = SamplingParams { seed: Some(5), max_tokens: Some(12), ..SamplingParams::default() };
    let prompt = ModelInput::from_ints(vec![1, 40, 41, 42]);
    sampling.sample(prompt, 2, params, SampleFlags::default()).result().expect("a sample")
}

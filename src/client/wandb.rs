//! Streams a run's metrics to Weights & Biases through its official Python package, run as a
//! child process: its file and network protocol has no maintained Rust client.
//!
//! The child reads one JSON object a line: first what the run is called, then figures to log or
//! facts about the run. `WANDB_MODE=offline` works as it does in Python, since it is Python.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Error, Write},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        mpsc::{SyncSender, channel, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    protocol::RunInfo,
    types::{ErrorKind, LoraConfig, OperationError, WandbConfig},
};

use super::ClientError;

/// Lines that may wait for the child; beyond it they are dropped with a warning, since metrics
/// must never hold up training.
const MAX_WAITING_LINES: usize = 1024;

/// From starting Python to a run that is known to the server: an import of seconds and a login.
const START_DEADLINE: Duration = Duration::from_secs(90);

/// For uploading what is left when the client is dropped; then the child is killed.
const FINISH_DEADLINE: Duration = Duration::from_secs(60);

/// What to do about a child that can't start.
const HINT: &str = "is the Python package `wandb` installed (pip install wandb), and logged in?";

/// The child: initialises the run, says `ready`, logs each line, finishes at end of file.
const CHILD: &str = r#"
import json, sys
settings = json.loads(sys.stdin.readline())
import wandb
run = wandb.init(**settings)
print("ready", flush=True)
sys.stdout = sys.stderr
for line in sys.stdin:
    line = json.loads(line)
    run.config.update(line["config"]) if "config" in line else run.log(line["log"])
run.finish()
"#;

/// Sends metrics to the child; gives it a minute to finish when dropped.
pub struct WandbLogger {
    lines: Option<SyncSender<String>>,
    writer: JoinHandle<()>,
    /// When the last optimiser step was logged.
    stepped: Mutex<Instant>,
}

impl WandbLogger {
    /// Starts `python3` with the `wandb` package and a run of its own; an error says what is
    /// missing. Blocks for seconds.
    pub fn start(config: &WandbConfig, base_model: &str, lora: &LoraConfig) -> Result<Self, ClientError> {
        Self::spawn(settings(config, base_model, lora))
    }

    /// The same for a run of theirs that may be there already under this id: it goes on.
    pub fn resume(
        config: &WandbConfig,
        id: &str,
        base_model: &str,
        lora: &LoraConfig,
    ) -> Result<Self, ClientError> {
        let mut settings = settings(config, base_model, lora);
        (settings["id"], settings["resume"]) = (id.into(), "allow".into());
        Self::spawn(settings)
    }

    /// Refuses if Python or its package is missing. Blocks for seconds.
    pub fn require_package() -> Result<(), ClientError> {
        let import = Command::new("python3").args(["-c", "import wandb"]).stdin(Stdio::null()).output();
        let output = import.map_err(|e| failed(format!("can't start `python3` ({e})")))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(failed(format!("`python3` can't import `wandb`; {HINT}"))),
        }
    }

    fn spawn(settings: Value) -> Result<Self, ClientError> {
        let mut child = Command::new("python3")
            .args(["-c", CHILD])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| failed(format!("can't start `python3` ({e})")))?;
        let mut input = child.stdin.take().ok_or_else(|| failed("its input is closed".into()))?;
        let greeted = writeln!(input, "{settings}").and_then(|()| wait_until_ready(&mut child));
        if let Err(error) = greeted {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(format!("{error}; {HINT}")));
        }
        let (lines, queue) = sync_channel::<String>(MAX_WAITING_LINES);
        let writer = std::thread::spawn(move || {
            for line in queue {
                if writeln!(input, "{line}").is_err() {
                    tracing::warn!("the wandb process has died; metrics are no longer streamed");
                    break;
                }
            }
            drop(input);
            finish(child);
        });
        Ok(Self { lines: Some(lines), writer, stepped: Mutex::new(Instant::now()) })
    }

    /// Says which run of Lockstep it is.
    pub fn describe(&self, run: &RunInfo) {
        self.send(json!({ "config": { "run": run.run, "replicas": run.replicas } }).to_string());
    }

    /// Logs one set of figures.
    pub fn log(&self, metrics: &BTreeMap<String, f64>) {
        self.send(json!({ "log": metrics }).to_string());
    }

    /// Logs an optimiser step, with the policy version that it made and how fast its tokens were trained.
    pub fn log_step(&self, metrics: &BTreeMap<String, f64>) {
        let mut metrics = metrics.clone();
        // Nothing panics while it holds the lock.
        let mut stepped = self.stepped.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = std::mem::replace(&mut *stepped, Instant::now()).elapsed().as_secs_f64();
        if let Some(tokens) = metrics.get("tokens") {
            metrics.insert("tokens_per_second".to_owned(), tokens / seconds.max(1e-9));
        }
        metrics.extend(metrics.get("step").map(|step| ("policy_version".to_owned(), *step)));
        self.log(&metrics);
    }

    fn send(&self, line: String) {
        if self.lines.as_ref().is_some_and(|lines| lines.try_send(line).is_err()) {
            tracing::warn!("wandb falls behind by more than {MAX_WAITING_LINES} lines; one is dropped");
        }
    }
}

impl Drop for WandbLogger {
    fn drop(&mut self) {
        drop(self.lines.take());
        // A child that takes no more lines is left to its own end, and to the end of its input.
        let deadline = Instant::now() + FINISH_DEADLINE;
        while !self.writer.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Lets the child upload what it has, for as long as it may take.
fn finish(mut child: Child) {
    let deadline = Instant::now() + FINISH_DEADLINE;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            tracing::warn!("wandb did not finish within {FINISH_DEADLINE:?} and is killed");
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Reads the child's output until it says `ready`.
fn wait_until_ready(child: &mut Child) -> std::io::Result<()> {
    let output = child.stdout.take().ok_or_else(|| Error::other("its output is closed"))?;
    let (said, hears) = channel();
    // A read can't be given a deadline; the thread ends with the child at the latest.
    std::thread::spawn(move || {
        let ready = BufReader::new(output).lines().any(|line| line.is_ok_and(|line| line.trim() == "ready"));
        let _ = said.send(ready);
    });
    match hears.recv_timeout(START_DEADLINE) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::other("the wandb process ended before it was ready")),
        Err(_) => Err(Error::other(format!("wandb was not ready within {START_DEADLINE:?}"))),
    }
}

/// What `wandb.init` is called with.
fn settings(config: &WandbConfig, base_model: &str, lora: &LoraConfig) -> Value {
    json!({
        "entity": config.entity,
        "project": config.project,
        "name": config.name,
        "config": { "base_model": base_model, "lora": lora },
    })
}

fn failed(reason: String) -> ClientError {
    OperationError::new(ErrorKind::Unavailable, format!("Weights & Biases logging can't start: {reason}"))
        .into()
}

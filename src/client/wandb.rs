//! Streams a run's metrics to Weights & Biases through its official Python package, run as a
//! child process: its file and network protocol has no maintained Rust client.
//!
//! The child reads one JSON object a line and logs it. `WANDB_MODE=offline` works as it does
//! in Python, since it is Python.

use std::{
    collections::BTreeMap,
    io::Write,
    process::{Child, Command, Stdio},
    sync::mpsc::{SyncSender, sync_channel},
    thread::JoinHandle,
};

use serde_json::json;

use crate::{
    protocol::RunInfo,
    types::{ErrorKind, OperationError, WandbConfig},
};

use super::ClientError;

/// Lines that may wait for the child; beyond it they are dropped with a warning, since metrics
/// must never hold up training.
const MAX_WAITING_LINES: usize = 1024;

/// The child: initialises the run, says `ready`, logs each line, finishes at end of file.
const CHILD: &str = r#"
import json, sys
settings = json.loads(sys.stdin.readline())
import wandb
run = wandb.init(project=settings["project"], name=settings["name"], config=settings["config"])
print("ready", flush=True)
sys.stdout = sys.stderr
for line in sys.stdin:
    run.log(json.loads(line))
run.finish()
"#;

/// Sends metrics to the child; waits for it to finish when dropped.
pub struct WandbLogger {
    lines: Option<SyncSender<String>>,
    writer: Option<JoinHandle<()>>,
}

impl WandbLogger {
    /// Starts `python3` with the `wandb` package; an error says what is missing.
    pub fn start(config: &WandbConfig, run: &RunInfo) -> Result<Self, ClientError> {
        let mut child = Command::new("python3")
            .args(["-c", CHILD])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| failed(format!("can't start `python3` ({e})")))?;
        let settings = json!({
            "project": config.project,
            "name": config.name,
            "config": {
                "run": run.run, "base_model": run.base_model, "lora": run.lora, "replicas": run.replicas,
            },
        });
        let mut input = child.stdin.take().ok_or_else(|| failed("its input is closed".into()))?;
        let greeted = writeln!(input, "{settings}").and_then(|()| wait_until_ready(&mut child));
        if let Err(error) = greeted {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(format!(
                "{error}; is the Python package `wandb` installed (pip install wandb)?"
            )));
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
            let _ = child.wait();
        });
        Ok(Self { lines: Some(lines), writer: Some(writer) })
    }

    /// Logs one set of figures.
    pub fn log(&self, metrics: &BTreeMap<String, f64>) {
        let line = json!(metrics).to_string();
        if self.lines.as_ref().is_some_and(|lines| lines.try_send(line).is_err()) {
            tracing::warn!("wandb falls behind by more than {MAX_WAITING_LINES} lines; one is dropped");
        }
    }
}

impl Drop for WandbLogger {
    fn drop(&mut self) {
        drop(self.lines.take());
        if let Some(writer) = self.writer.take() {
            // The child uploads what it has; a panic there has been reported already.
            let _ = writer.join();
        }
    }
}

/// Reads the child's output until it says `ready`.
fn wait_until_ready(child: &mut Child) -> std::io::Result<()> {
    use std::io::{BufRead, BufReader, Error};
    let output = child.stdout.take().ok_or_else(|| Error::other("its output is closed"))?;
    for line in BufReader::new(output).lines() {
        if line?.trim() == "ready" {
            return Ok(());
        }
    }
    Err(Error::other("the wandb process ended before it was ready"))
}

fn failed(reason: String) -> ClientError {
    OperationError::new(ErrorKind::Unavailable, format!("Weights & Biases logging can't start: {reason}"))
        .into()
}

//! How long it takes from `lockstep up` to the first step done, as whoever types it sees it: real processes, on
//! a data directory that is new, and once more on the same one.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;
use tokio::sync::oneshot;

use super::{
    BenchError, Machine,
    figures::median,
    folder::TemporaryFolder,
    local::{random_tokens, source},
    machine::round,
};
use crate::{
    client::{LoraOptions, ServiceClient},
    model::{ComputeOptions, ModelSource},
    service::{CACHE, DataDirectory, run_here},
    types::{AdamParams, Datum, LossFn, LossSpec, ModelInput},
};

/// What is started.
#[derive(Debug, Clone)]
pub struct StartConfig {
    /// This program, which `lockstep up` is started from.
    pub program: PathBuf,
    /// A Hugging Face directory or a GGUF file.
    pub model: PathBuf,
    pub nodes: u32,
    pub trainers: u32,
    pub samplers: u32,
    /// Over all nodes.
    pub threads: usize,
    pub compute: ComputeOptions,
    /// Tokens of the one sequence of the first step.
    pub tokens: usize,
    /// Of the LoRA, on all seven linear layers.
    pub rank: u32,
    pub repeats: u32,
    /// Whether the model and what is cached of it are to be read from the disk, not from the system's memory.
    pub cold: bool,
}

/// Everything that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StartReport {
    pub bench: &'static str,
    pub dtype: String,
    pub nodes: u32,
    pub trainers: u32,
    pub samplers: u32,
    pub threads: usize,
    pub tokens: usize,
    pub rank: u32,
    pub repeats: u32,
    pub cold: bool,
    /// On a data directory that is not there yet.
    pub fresh: StartTimes,
    /// On one where another start has been before, with one run of one step.
    pub used: StartTimes,
    pub machine: Machine,
}

/// Medians; times are seconds since the process was started.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StartTimes {
    /// The coordinator listens.
    pub coordinator_s: f64,
    /// `up` says `ready`: every node has described its models and joined.
    pub ready_s: f64,
    /// A client has its training run.
    pub run_s: f64,
    /// The gradient of the first sequence is there, for which the ranks have loaded the model.
    pub forward_backward_s: f64,
    /// The first step is done, and durable.
    pub step_s: f64,
    pub step_s_min: f64,
    pub step_s_max: f64,
    /// Of the node processes after another pass in which every rank has a sequence, pages that several of them share
    /// counted in each; MiB.
    pub nodes_rss_mib: f64,
    /// The same with shared pages divided among those that share them.
    pub nodes_pss_mib: f64,
}

/// What one start took, in the order of [`StartTimes`].
struct Start {
    times_s: [f64; 5],
    memory_mib: [f64; 2],
}

/// For `up` to get ready, and to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two looks whether the coordinator's address is there: the error of that time.
const LOOK: Duration = Duration::from_millis(5);

/// Runs it all. Each repeat is a start on a new directory and one on the same directory again, so that every
/// used one has the same past.
pub fn start(config: &StartConfig) -> Result<StartReport, BenchError> {
    if config.repeats == 0 {
        return Err(BenchError::Refused { flag: "--repeats", problem: "a median takes at least one".into() });
    }
    let machine = Machine::here();
    let model = source(&config.model)?;
    let described =
        model.check().map_err(|e| BenchError::Refused { flag: "--model", problem: e.to_string() })?;
    let folder = TemporaryFolder::new("start");
    let (mut fresh, mut used) = (Vec::new(), Vec::new());
    for repeat in 0..config.repeats {
        let data = DataDirectory::open(folder.path().join(format!("data-{repeat}")))?;
        for starts in [&mut fresh, &mut used] {
            if config.cold {
                forget_pages(&config.model)?;
                forget_pages(&data.path().join(CACHE))?;
            }
            let tokens = random_tokens(described.vocab_size as u32, u64::from(repeat), config.tokens);
            starts.push(run_here("bench", one(config, &model, &data, tokens))?);
        }
        // An error would only leave files in the system's folder for them.
        let _ = fs::remove_dir_all(data.path());
    }
    Ok(StartReport {
        bench: "start",
        dtype: config.compute.dtype.to_string(),
        nodes: config.nodes,
        trainers: config.trainers,
        samplers: config.samplers,
        threads: config.threads,
        tokens: config.tokens,
        rank: config.rank,
        repeats: config.repeats,
        cold: config.cold,
        fresh: StartTimes::of(&fresh),
        used: StartTimes::of(&used),
        machine,
    })
}

impl StartTimes {
    fn of(starts: &[Start]) -> Self {
        let time = |i: usize| round(median(starts.iter().map(|start| start.times_s[i])), 3);
        let memory = |i: usize| round(median(starts.iter().map(|start| start.memory_mib[i])), 1);
        let steps = || starts.iter().map(|start| start.times_s[4]);
        Self {
            coordinator_s: time(0),
            ready_s: time(1),
            run_s: time(2),
            forward_backward_s: time(3),
            step_s: time(4),
            step_s_min: round(steps().fold(f64::INFINITY, f64::min), 3),
            step_s_max: round(steps().fold(0.0, f64::max), 3),
            nodes_rss_mib: memory(0),
            nodes_pss_mib: memory(1),
        }
    }
}

/// One start, one step, one end.
async fn one(
    config: &StartConfig,
    model: &ModelSource,
    data: &DataDirectory,
    tokens: Vec<u32>,
) -> Result<Start, BenchError> {
    let endpoint = data.endpoint_file();
    let before = modified(&endpoint);
    let begun = Instant::now();
    let since = || begun.elapsed().as_secs_f64();
    let mut up = Up::start(config, model, data)?;
    while modified(&endpoint) == before {
        if begun.elapsed() > PATIENCE || up.has_ended() {
            return Err(up.failed("its coordinator did not listen"));
        }
        tokio::time::sleep(LOOK).await;
    }
    let coordinator = since();
    match tokio::time::timeout(PATIENCE, &mut up.ready).await {
        Ok(Ok(true)) => {}
        _ => return Err(up.failed("it did not get ready")),
    }
    let ready = since();
    let service = ServiceClient::connect(data.path()).await?;
    let options = LoraOptions { micro_batch_tokens: Some(config.tokens as u32), ..LoraOptions::default() };
    let training = service.create_lora_training_client(&model.name, config.rank, options).await?;
    let run = since();
    let datum = Datum { model_input: ModelInput::from_ints(tokens), loss_fn_inputs: Default::default() };
    let pass = |sequences: u32| {
        let data = vec![datum.clone(); sequences as usize];
        training.forward_backward(data, LossSpec::new(LossFn::CrossEntropy))
    };
    let first = pass(1);
    let step = training.optim_step(AdamParams::default());
    first.await?;
    let forward_backward = since();
    step.await?;
    let step = since();
    // So that what each node holds is there.
    pass(config.trainers).await?;
    let mut memory_mib = [0.0; 2];
    for node in &service.cluster_status().await?.nodes {
        for (sum, name) in memory_mib.iter_mut().zip(["Rss", "Pss"]) {
            *sum += rollup_mib(node.pid, name)
                .map_err(|source| BenchError::File { what: "a node's smaps_rollup".into(), source })?;
        }
    }
    drop((training, service));
    up.end().await?;
    Ok(Start { times_s: [coordinator, ready, run, forward_backward, step], memory_mib })
}

/// A running `lockstep up`; killed with this value, and its parts with it.
struct Up {
    process: Child,
    /// Whether it said so, once it says anything or nothing more.
    ready: oneshot::Receiver<bool>,
    /// What it and its parts log.
    log: PathBuf,
}

impl Up {
    fn start(config: &StartConfig, model: &ModelSource, data: &DataDirectory) -> Result<Self, BenchError> {
        let log = data.path().with_extension("log");
        let failed = |source| BenchError::Start { what: "lockstep up".into(), source };
        let mut process = Command::new(&config.program)
            .args(["up", "--http", "127.0.0.1:0"])
            .args(["--nodes", &config.nodes.to_string(), "--trainers", &config.trainers.to_string()])
            .args(["--samplers", &config.samplers.to_string(), "--threads", &config.threads.to_string()])
            .args(["--device", &config.compute.device.to_string()])
            .args(["--dtype", &config.compute.dtype.to_string()])
            .args(config.compute.activation_checkpointing.then_some("--activation-checkpointing"))
            .args(config.compute.plain_decoding.then_some("--plain-decoding"))
            .arg(format!("--model={}={}", model.name, model.path.display()))
            .arg("--data-dir")
            .arg(data.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).map_err(failed)?)
            .spawn()
            .map_err(failed)?;
        let (said, ready) = oneshot::channel();
        if let Some(stdout) = process.stdout.take() {
            std::thread::spawn(move || {
                let mut line = String::new();
                // What cannot be read is not `ready` either; nobody listens once the measurement has failed.
                let _ = BufReader::new(stdout).read_line(&mut line);
                let _ = said.send(line.starts_with("ready "));
            });
        }
        Ok(Self { process, ready, log })
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }

    fn failed(&self, problem: &str) -> BenchError {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it logged nothing");
        BenchError::worker("lockstep up", format!("{problem}: {last}"))
    }

    /// Ends it as Ctrl-C does.
    async fn end(mut self) -> Result<(), BenchError> {
        // SAFETY: sends a signal to a child that has not been waited for; touches no memory.
        unsafe { libc::kill(self.process.id() as libc::pid_t, libc::SIGINT) };
        let begun = Instant::now();
        while !self.has_ended() {
            if begun.elapsed() > PATIENCE {
                return Err(self.failed("it did not end"));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.log);
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

/// A sum over all mappings of a process.
fn rollup_mib(pid: u32, name: &str) -> std::io::Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let of_name =
        |line: &str| line.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse().ok();
    let kib: Option<f64> = rollup.lines().find_map(of_name);
    kib.map(|kib| kib / 1024.0).ok_or_else(|| std::io::Error::other(format!("it says no {name}")))
}

/// Asks the system to drop what it holds in memory of a file, or of the files of a directory.
fn forget_pages(path: &Path) -> Result<(), BenchError> {
    let failed =
        |source| BenchError::File { what: format!("dropping {} from memory", path.display()), source };
    if !path.exists() {
        return Ok(());
    }
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(failed)? {
            forget_pages(&entry.map_err(failed)?.path())?;
        }
        return Ok(());
    }
    let file = File::open(path).map_err(failed)?;
    // Only pages that are on the disk are dropped.
    file.sync_all().map_err(failed)?;
    // SAFETY: advice about a file that is open; touches no memory of this process.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        code => Err(failed(std::io::Error::from_raw_os_error(code))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_says_what_it_holds() {
        let (rss, pss) = (rollup_mib(std::process::id(), "Rss"), rollup_mib(std::process::id(), "Pss"));
        let (rss, pss) = (rss.unwrap(), pss.unwrap());
        assert!(0.0 < pss && pss <= rss && rss < 1e6, "{pss} of {rss}");
        assert!(rollup_mib(std::process::id(), "Rs").is_err());
    }
}

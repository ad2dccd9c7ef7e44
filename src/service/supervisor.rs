//! The parent of a local cluster's processes.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
};

use crate::{
    collective::{NCCL_IN_ONE_ORDER, Reduction},
    kernels,
    model::{ComputeOptions, ModelSource},
    store::BucketLocation,
};

use super::{
    DataDirectory, ServiceError,
    process::{EXIT_REFUSED, LISTENING, PARENT_PIPE},
    share::Share,
    watchdog::Watchdog,
};

/// Pause before a part that died is started again: doubled each time, from the first to the
/// last, and back to the first once it has lived for a while.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Life after which a part counts as healthy again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// Longest that a coordinator may take from its start to its address: recovery reads the
/// journal, it computes nothing.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Longest that a drain may take (an operation's end, a snapshot a run) before parts are killed.
const DRAIN_DEADLINE: Duration = Duration::from_secs(60);

/// Tells the parts which kernels this process was told to use.
const KERNELS: &str = "LOCKSTEP_KERNELS";

/// Exit status of a part that said why it can't go on.
const EXIT_FAILED: i32 = 1;

/// Tells the parts the form of their logs.
const LOG_FORMAT: &str = "LOCKSTEP_LOG_FORMAT";

/// Name and subcommand of the part that decides.
const COORDINATOR: &str = "coordinator";

/// A local cluster's processes.
#[derive(Debug, Clone)]
pub struct SupervisorConfig {
    /// The `lockstep` binary.
    pub program: PathBuf,
    pub data: DataDirectory,
    /// Where the coordinator listens (QUIC); port 0 is any, kept over restarts.
    pub listen: SocketAddr,
    /// Where processes of other machines join; absent: none can.
    pub join: Option<SocketAddr>,
    /// Snapshots of each run that are kept, at least 1.
    pub history: u32,
    /// Holds the blobs; absent: the bucket of an earlier start, or else the data directory.
    pub store: Option<BucketLocation>,
    /// How long certificates are good.
    pub certificate_life: Duration,
    pub nodes: u32,
    pub trainers: u32,
    pub samplers: u32,
    /// Cores to compute on, over all nodes.
    pub threads: usize,
    pub models: Vec<ModelSource>,
    pub compute: ComputeOptions,
    /// Logs of the parts go to `DATA/logs` instead of stderr.
    pub logs_to_files: bool,
    /// Form of the parts' logs, as LOCKSTEP_LOG_FORMAT says it.
    pub log_format: String,
}

/// Starts the parts, starts them again when they die, and stops them.
pub struct Supervisor {
    lives: Vec<Arc<Life>>,
    stop: watch::Sender<bool>,
    coordinator: JoinHandle<()>,
    nodes: Vec<JoinHandle<()>>,
    fatal: mpsc::Receiver<ServiceError>,
    address: String,
}

/// The present life of one part.
#[derive(Default)]
pub(super) struct Life {
    /// 0 while it has none.
    pub pid: AtomicU32,
    /// Ends it.
    pub kill: Notify,
}

/// One kind of process and how to start it.
struct Part {
    name: String,
    life: Arc<Life>,
    config: SupervisorConfig,
    arguments: Vec<String>,
    /// Whether it has listened once. Until then a person waits who can mend what keeps it from it.
    started_well: bool,
}

impl Supervisor {
    /// Starts the coordinator, waits until it listens, then starts the nodes. They die with the
    /// runtime of this process.
    pub async fn start(config: SupervisorConfig) -> Result<Self, ServiceError> {
        config.data.prepare_identities()?;
        (0..config.nodes.max(1)).try_for_each(|index| config.data.prepare_node(&node_name(index)))?;
        let (stop, stopping) = watch::channel(false);
        let (failed, mut fatal) = mpsc::channel(8);
        let (listening, mut addresses) = mpsc::channel(8);

        let config = SupervisorConfig { listen: former_address(&config), ..config };
        let coordinator = Part::coordinator(&config);
        let coordinator =
            tokio::spawn(coordinator.keep_running(stopping.clone(), failed.clone(), Some(listening)));
        let address = tokio::select! {
            Some(address) = addresses.recv() => address,
            Some(error) = fatal.recv() => return Err(error),
            () = tokio::time::sleep(START_DEADLINE) => return Err(not_ready("coordinator", &config)),
        };
        // Later addresses are the same one; the channel only has to be read.
        tokio::spawn(async move { while addresses.recv().await.is_some() {} });
        let parts: Vec<Part> =
            (0..config.nodes.max(1)).map(|index| Part::node(&config, index, &address)).collect();
        let lives = parts.iter().map(|part| part.life.clone()).collect();
        let keep = |part: Part| tokio::spawn(part.keep_running(stopping.clone(), failed.clone(), None));
        let nodes = parts.into_iter().map(keep).collect();
        Ok(Self { lives, stop, coordinator, nodes, fatal, address })
    }

    /// The coordinator's QUIC address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What finds nodes that live and do nothing.
    pub(super) fn watchdog(&self) -> Watchdog {
        Watchdog::new(self.lives.clone())
    }

    /// Resolves when a part can't run at all; never while they all can.
    pub async fn failed(&mut self) -> ServiceError {
        match self.fatal.recv().await {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }

    /// Drains: the coordinator finishes what runs, takes snapshots, tells the nodes to end,
    /// and ends itself. What is left after a minute is killed.
    pub async fn shutdown(self) {
        let _ = self.stop.send(true);
        // Dropping a `Child` kills it, so an aborted task leaves nothing behind.
        let drained = async {
            for part in self.nodes.into_iter().chain([self.coordinator]) {
                let _ = part.await;
            }
        };
        if tokio::time::timeout(2 * DRAIN_DEADLINE, drained).await.is_err() {
            tracing::error!("parts of the cluster did not end; they are killed with this process");
        }
    }
}

/// Where the coordinator of an earlier start listened, if any port will do and that one is free: clients
/// that are still there find the new one at once.
fn former_address(config: &SupervisorConfig) -> SocketAddr {
    let written = std::fs::read_to_string(config.data.endpoint_file()).unwrap_or_default();
    let former = written.lines().next().and_then(|line| line.parse::<SocketAddr>().ok());
    let usable = former.filter(|former| config.listen.port() == 0 && former.ip() == config.listen.ip());
    usable.filter(|former| UdpSocket::bind(former).is_ok()).unwrap_or(config.listen)
}

/// Nodes of this machine are called so, in every life.
fn node_name(index: u32) -> String {
    format!("node-{index}")
}

fn not_ready(part: &str, config: &SupervisorConfig) -> ServiceError {
    let hint = match config.logs_to_files {
        true => format!(" ({})", config.data.logs().display()),
        false => String::new(),
    };
    ServiceError::NotReady { part: part.into(), seconds: START_DEADLINE.as_secs(), hint }
}

impl Part {
    fn coordinator(config: &SupervisorConfig) -> Self {
        let mut arguments = vec![COORDINATOR.into(), "--listen".into(), config.listen.to_string()];
        arguments.extend(config.join.iter().flat_map(|join| ["--join-listen".to_owned(), join.to_string()]));
        arguments.extend(["--history".to_owned(), config.history.to_string()]);
        let life = format!("{}s", config.certificate_life.as_secs());
        arguments.extend(["--certificate-life".to_owned(), life]);
        arguments.extend(config.store.iter().flat_map(|store| ["--store".to_owned(), store.to_string()]));
        Self {
            name: COORDINATOR.into(),
            life: Arc::default(),
            config: config.clone(),
            arguments,
            started_well: false,
        }
    }

    /// Node `index` with its share of ranks, replicas and cores.
    fn node(config: &SupervisorConfig, index: u32, coordinator: &str) -> Self {
        let share = Share::of(index, config.nodes, config.trainers, config.samplers, config.threads);
        let name = node_name(index);
        let mut arguments: Vec<String> = vec!["node".into()];
        let mut flag = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
        flag("--name", name.clone());
        flag("--coordinator", coordinator.into());
        flag("--listen", SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).to_string());
        flag("--trainers", share.trainers.to_string());
        flag("--samplers", share.samplers.to_string());
        flag("--threads", share.threads.to_string());
        flag("--device", config.compute.device.of_node(index).to_string());
        flag("--dtype", config.compute.dtype.to_string());
        flag("--reduce", config.compute.reduction.to_string());
        if config.compute.activation_checkpointing {
            arguments.push("--activation-checkpointing".into());
        }
        if config.compute.plain_decoding {
            arguments.push("--plain-decoding".into());
        }
        let mut flag = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
        for model in &config.models {
            flag("--model", format!("{}={}", model.name, model.path.display()));
        }
        Self { name, life: Arc::default(), config: config.clone(), arguments, started_well: true }
    }

    /// Runs the part until the supervisor stops, again and again.
    async fn keep_running(
        mut self,
        mut stopping: watch::Receiver<bool>,
        fatal: mpsc::Sender<ServiceError>,
        listening: Option<mpsc::Sender<String>>,
    ) {
        let mut pause = BACK_OFF.0;
        while !*stopping.borrow() {
            let started = Instant::now();
            let status = match self.run_once(&mut stopping, listening.as_ref()).await {
                Ok(status) => status,
                Err(error) => {
                    let _ = fatal.send(error).await;
                    return;
                }
            };
            if *stopping.borrow() {
                return;
            }
            if status == Some(EXIT_REFUSED.into()) || (status == Some(EXIT_FAILED) && !self.started_well) {
                let reason = self.last_words();
                let _ = fatal.send(ServiceError::Refused { part: self.name.clone(), reason }).await;
                return;
            }
            if started.elapsed() > HEALTHY_AFTER {
                pause = BACK_OFF.0;
            }
            tracing::warn!("{} ended (status {status:?}); starting it again in {pause:?}", self.name);
            let _ = tokio::time::timeout(pause, stopping.wait_for(|stop| *stop)).await;
            pause = (pause * 2).min(BACK_OFF.1);
        }
    }

    /// One life of the process; its exit status.
    async fn run_once(
        &mut self,
        stopping: &mut watch::Receiver<bool>,
        listening: Option<&mpsc::Sender<String>>,
    ) -> Result<Option<i32>, ServiceError> {
        let mut child = self.spawn()?;
        self.life.pid.store(child.id().unwrap_or(0), Ordering::Relaxed);
        // `wait` would close it, and its end tells the part that its supervisor is gone.
        let _pipe = child.stdin.take();
        if let (Some(listening), Some(output)) = (listening, child.stdout.take()) {
            let mut lines = BufReader::new(output).lines();
            if let Ok(Some(line)) = lines.next_line().await
                && let Some(address) = line.strip_prefix(LISTENING)
            {
                let address = address.trim().to_owned();
                self.keep_port(&address);
                self.started_well = true;
                let _ = listening.send(address).await;
            }
        }
        let hangs = tokio::select! {
            status = child.wait() => return Ok(status.ok().and_then(|status| status.code())),
            () = self.life.kill.notified() => true,
            _ = stopping.wait_for(|stop| *stop) => false,
        };
        match hangs {
            // Fails only if it has just ended.
            true => drop(child.kill().await),
            false => self.end(child).await,
        }
        Ok(None)
    }

    /// Nodes and clients find a coordinator that comes back at the port it had.
    fn keep_port(&mut self, address: &str) {
        if let Some(listen) = self.arguments.iter().position(|argument| argument == "--listen")
            && let Some(value) = self.arguments.get_mut(listen + 1)
        {
            *value = address.to_owned();
        }
    }

    /// Lets the process end by itself; the coordinator is asked, nodes hear it from the
    /// coordinator.
    async fn end(&self, mut child: Child) {
        if self.name == COORDINATOR
            && let Some(pid) = child.id()
        {
            // SAFETY: kill(2) takes two integers and touches no memory; the child has not been
            // waited for, so the pid is still its own.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
        }
        if tokio::time::timeout(DRAIN_DEADLINE, child.wait()).await.is_err() {
            tracing::error!("{} did not end within {DRAIN_DEADLINE:?}; killing it", self.name);
            let _ = child.kill().await;
        }
    }

    fn spawn(&self) -> Result<Child, ServiceError> {
        let mut command = Command::new(&self.config.program);
        command
            .args(&self.arguments)
            .arg("--data-dir")
            .arg(self.config.data.path())
            .env(PARENT_PIPE, "1")
            .env(KERNELS, kernels::path())
            .env(LOG_FORMAT, &self.config.log_format)
            // Candle's own thread pools would fight the node's leased cores.
            .envs([("CANDLE_NUM_THREADS", "1"), ("RAYON_NUM_THREADS", "1")])
            .stdin(Stdio::piped())
            .stdout(if self.name == COORDINATOR { Stdio::piped() } else { Stdio::null() })
            // A terminal's Ctrl-C goes to the supervisor alone, which then drains in order.
            .process_group(0)
            .kill_on_drop(true);
        if self.config.compute.reduction == Reduction::Fast {
            command.envs(NCCL_IN_ONE_ORDER);
        }
        if self.config.logs_to_files {
            command.stderr(self.log_file()?);
        }
        // A part whose supervisor was killed is killed: what it had not made durable was told to
        // nobody, and the next `up` needs its locks and ports at once.
        // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe and
        // takes integers.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        command.spawn().map_err(|source| ServiceError::Start { what: self.name.clone(), source })
    }

    fn log_path(&self) -> PathBuf {
        self.config.data.logs().join(format!("{}.log", self.name))
    }

    /// Why it ended, as far as it said.
    fn last_words(&self) -> String {
        if !self.config.logs_to_files {
            return "it said why above".to_owned();
        }
        let path = self.log_path();
        let log = std::fs::read(&path).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        format!("{} ({})", last.trim_start_matches("lockstep: "), path.display())
    }

    /// `DATA/logs/<part>.log`, appended to over restarts.
    fn log_file(&self) -> Result<std::fs::File, ServiceError> {
        let path = self.log_path();
        let file = |source| ServiceError::File { path: path.clone(), source };
        std::fs::create_dir_all(self.config.data.logs()).map_err(file)?;
        let mut log = std::fs::OpenOptions::new().create(true).append(true).open(&path).map_err(file)?;
        writeln!(log, "--- {} starts", self.name).map_err(file)?;
        Ok(log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::DeviceChoice;

    /// What the command line of node `index` says after `flag`.
    fn said(config: &SupervisorConfig, index: u32, flag: &str) -> String {
        let arguments = Part::node(config, index, "127.0.0.1:1").arguments;
        let at = arguments.iter().position(|argument| argument == flag).unwrap();
        arguments[at + 1].clone()
    }

    #[test]
    fn nodes_take_a_gpu_each_and_add_up_as_they_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = SupervisorConfig {
            program: "lockstep".into(),
            data: DataDirectory::open(directory.path()).unwrap(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            join: None,
            history: 1,
            store: None,
            certificate_life: Duration::from_secs(60),
            nodes: 2,
            trainers: 2,
            samplers: 0,
            threads: 2,
            models: Vec::new(),
            compute: ComputeOptions {
                device: DeviceChoice::Cuda(2),
                reduction: Reduction::Fast,
                ..ComputeOptions::default()
            },
            logs_to_files: false,
            log_format: "text".into(),
        };
        assert_eq!([0, 1].map(|index| said(&config, index, "--device")), ["cuda:2", "cuda:3"]);
        assert_eq!(said(&config, 1, "--reduce"), "fast");
        let decodes_plainly = |config: &SupervisorConfig| {
            let arguments = Part::node(config, 0, "127.0.0.1:1").arguments;
            arguments.iter().any(|argument| argument == "--plain-decoding")
        };
        assert!(!decodes_plainly(&config));
        config.compute.plain_decoding = true;
        assert!(decodes_plainly(&config));
        config.compute.device = DeviceChoice::Auto;
        assert_eq!(said(&config, 1, "--device"), "auto");
    }
}

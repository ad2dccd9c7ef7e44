//! Processes of this program that take part in a measurement.
//!
//! ```text
//!   parent ── starts ──► lockstep bench worker KIND
//!     ◄── {"address": …}            where it listens
//!     ──► one line of JSON          what to do
//!     ◄── one line of JSON          how that went                      … until end of file
//! ```

use std::{
    io::{self, BufRead, BufReader, Write},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::runtime::Builder;

use super::{BenchError, allreduce, limits};
use crate::{
    protocol::ALPN,
    transport::{ClusterCa, Endpoint, Identity, Role},
};

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerKind {
    /// Is a rank of all-reduces.
    Rank,
    /// Sends or receives by quinn alone.
    Bulk,
}

/// Longest that a worker may take for one line: an all-reduce of gigabytes on a machine that is busy.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

/// As many as a node's control threads.
const THREADS: usize = 2;

/// Lines of a worker that nobody has read yet; it says one for each that it is told.
const UNREAD: usize = 16;

/// First line of a worker.
#[derive(Serialize, Deserialize)]
struct Hello {
    address: String,
}

/// A worker, seen from its parent. It ends with this value.
pub(super) struct Worker {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<io::Result<String>>,
    who: String,
    /// Where it listens.
    pub address: String,
}

/// The certificates of a measurement's processes, in a folder that goes with this value.
pub(super) struct Trust {
    directory: PathBuf,
    ca: ClusterCa,
}

impl Trust {
    pub fn new() -> Result<Self, BenchError> {
        let directory = std::env::temp_dir().join(format!("lockstep-bench-{}", std::process::id()));
        let ca = ClusterCa::open_or_create(&directory)?;
        Ok(Self { directory, ca })
    }
}

impl Drop for Trust {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Worker {
    /// Starts worker `index` with these variables and waits until it listens.
    pub fn start(
        program: &Path,
        kind: WorkerKind,
        trust: &Trust,
        index: u32,
        variables: &[(&str, &str)],
    ) -> Result<Self, BenchError> {
        let (who, kind) = match kind {
            WorkerKind::Rank => (format!("rank-{index}"), "rank"),
            WorkerKind::Bulk => (format!("bulk-{index}"), "bulk"),
        };
        trust.ca.issue(Role::Node, &who)?.save(&trust.directory, &who)?;
        let mut child = Command::new(program)
            .args(["bench", "worker", kind, &who])
            .arg(&trust.directory)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| BenchError::Start { what: who.clone(), source })?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(BenchError::worker(who, "it has no pipes"));
        };
        let (said, lines) = sync_channel(UNREAD);
        // Ends with the worker's output, or with whoever listens.
        thread::spawn(move || BufReader::new(stdout).lines().try_for_each(|line| said.send(line)));
        let mut worker = Self { child, stdin, lines, who, address: String::new() };
        worker.address = worker.hear::<Hello>()?.address;
        Ok(worker)
    }

    pub fn tell(&mut self, what: &impl Serialize) -> Result<(), BenchError> {
        say(&mut self.stdin, what).map_err(|e| BenchError::worker(&self.who, e))
    }

    /// Its next line.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T, BenchError> {
        let line = match self.lines.recv_timeout(PATIENCE) {
            Ok(Ok(line)) => line,
            Ok(Err(e)) => return Err(BenchError::worker(&self.who, e)),
            Err(RecvTimeoutError::Timeout) => {
                return Err(BenchError::worker(&self.who, format!("it said nothing for {PATIENCE:?}")));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(BenchError::worker(&self.who, "it ended; stderr says why"));
            }
        };
        serde_json::from_str(&line).map_err(|e| BenchError::worker(&self.who, format!("{e} in {line}")))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process behind `lockstep bench worker`: does what its standard input says, until that ends.
pub fn run_worker(kind: WorkerKind, name: &str, directory: &Path) -> Result<(), BenchError> {
    let identity = Identity::load(directory, name)?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .map_err(|source| BenchError::Start { what: "the runtime".into(), source })?;
    let endpoint = {
        let _inside = runtime.enter();
        Endpoint::quic((Ipv4Addr::LOCALHOST, 0).into(), identity, ALPN)?
    };
    let mut parent = Parent { who: name.to_owned() };
    parent.tell(&Hello { address: endpoint.local_address() })?;
    match kind {
        WorkerKind::Rank => allreduce::serve_rank(&mut parent, endpoint, &runtime),
        WorkerKind::Bulk => limits::serve_bulk(&mut parent, endpoint, &runtime),
    }
}

/// The parent, seen from a worker.
pub(super) struct Parent {
    who: String,
}

impl Parent {
    pub fn tell(&mut self, what: &impl Serialize) -> Result<(), BenchError> {
        say(&mut io::stdout().lock(), what).map_err(|e| BenchError::worker(&self.who, e))
    }

    /// What to do next; `None` when nothing is left to do.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<Option<T>, BenchError> {
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line);
        match read.map_err(|e| BenchError::worker(&self.who, e))? {
            0 => Ok(None),
            _ => serde_json::from_str(&line).map(Some).map_err(|e| BenchError::worker(&self.who, e)),
        }
    }

    /// A failure of this worker.
    pub fn failed(&self, problem: impl ToString) -> BenchError {
        BenchError::worker(&self.who, problem)
    }
}

fn say(to: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Tells each worker something of its own, and hears what all of them answer.
pub(super) fn tell_all<T: DeserializeOwned, S: Serialize>(
    workers: &mut [Worker],
    what: impl Fn(usize) -> S,
) -> Result<Vec<T>, BenchError> {
    for (i, worker) in workers.iter_mut().enumerate() {
        worker.tell(&what(i))?;
    }
    workers.iter_mut().map(Worker::hear).collect()
}

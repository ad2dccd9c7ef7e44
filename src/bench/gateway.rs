//! What a request costs at the gateway: real processes, HTTP on kept connections, nothing computed.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{BenchError, Machine, machine::round};
use crate::model::tiny;

/// What is measured.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// This program, which `lockstep up` is started from.
    pub program: PathBuf,
    /// Connections at once.
    pub connections: Vec<u32>,
    /// On each connection.
    pub requests: u32,
}

/// Everything that one run measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GatewayReport {
    pub bench: &'static str,
    pub machine: Machine,
    pub results: Vec<GatewayResult>,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GatewayResult {
    /// `/health` is the gateway's own answer; `/v1/loops/capabilities` is asked of the coordinator.
    pub path: &'static str,
    pub connections: u32,
    pub requests: usize,
    pub requests_per_s: f64,
    pub median_ms: f64,
    pub p99_ms: f64,
}

const PATHS: [&str; 2] = ["/health", "/v1/loops/capabilities"];

/// For one answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Largest answer that is read.
const MAX_ANSWER: usize = 1 << 20;

/// Runs it all; `each` gets every row as it is there.
pub fn gateway(
    config: &GatewayConfig,
    mut each: impl FnMut(&GatewayResult),
) -> Result<GatewayReport, BenchError> {
    let refused = |flag, problem: &str| Err(BenchError::Refused { flag, problem: problem.into() });
    if config.requests == 0 {
        return refused("--requests", "at least one");
    }
    if config.connections.iter().any(|n| !(1..=256).contains(n)) {
        return refused("--connections", "1 to 256");
    }
    let machine = Machine::here();
    let up = Up::start(&config.program)?;
    let mut results = Vec::new();
    for path in PATHS {
        for &connections in &config.connections {
            let row = measure(&up.address, path, connections, config.requests)?;
            each(&row);
            results.push(row);
        }
    }
    Ok(GatewayReport { bench: "gateway", machine, results })
}

/// A running `lockstep up`; it ends with this value, and its folder goes.
struct Up {
    process: Child,
    address: String,
    folder: PathBuf,
}

impl Up {
    fn start(program: &Path) -> Result<Self, BenchError> {
        let folder = std::env::temp_dir().join(format!("lockstep-bench-{}-gateway", std::process::id()));
        let model = folder.join("model");
        tiny::write(&model, &tiny::config(), 0)
            .map_err(|source| BenchError::File { what: format!("writing {}", model.display()), source })?;
        let process = Command::new(program)
            .args(["up", "--http", "127.0.0.1:0", "--trainers", "1", "--samplers", "1", "--data-dir"])
            .arg(folder.join("data"))
            .arg(format!("--model=bench/tiny={}", model.display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|source| BenchError::Start { what: "lockstep up".into(), source })?;
        let mut up = Self { process, address: String::new(), folder };
        let mut line = String::new();
        if let Some(stdout) = up.process.stdout.take() {
            // What cannot be read is not `ready` either.
            let _ = BufReader::new(stdout).read_line(&mut line);
        }
        match line.trim().strip_prefix("ready http://") {
            Some(address) => up.address = address.to_owned(),
            None => return Err(BenchError::worker("lockstep up", "it did not get ready")),
        }
        Ok(up)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Its parts end with it.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn measure(
    address: &str,
    path: &'static str,
    connections: u32,
    requests: u32,
) -> Result<GatewayResult, BenchError> {
    let failed = |e: io::Error| BenchError::worker(format!("GET {path}"), e);
    let begun = Instant::now();
    let answered: Vec<io::Result<Vec<Duration>>> = thread::scope(|scope| {
        let asking = || scope.spawn(|| ask(address, path, requests));
        let asking: Vec<_> = (0..connections).map(|_| asking()).collect();
        let panicked = || Err(io::Error::other("its thread panicked"));
        asking.into_iter().map(|a| a.join().unwrap_or_else(|_| panicked())).collect()
    });
    let seconds = begun.elapsed().as_secs_f64();
    let mut took = Vec::new();
    for times in answered {
        took.extend(times.map_err(failed)?);
    }
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    Ok(GatewayResult {
        path,
        connections,
        requests: took.len(),
        requests_per_s: round(took.len() as f64 / seconds, 1),
        median_ms: round(at(0.5), 3),
        p99_ms: round(at(0.99), 3),
    })
}

/// One connection, one request after another.
fn ask(address: &str, path: &str, requests: u32) -> io::Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    (0..requests)
        .map(|_| {
            let begun = Instant::now();
            stream.write_all(request.as_bytes())?;
            read_answer(&mut answers)?;
            Ok(begun.elapsed())
        })
        .collect()
}

/// Reads one answer of the status 200 with a `content-length`, as the gateway gives them.
fn read_answer(from: &mut impl BufRead) -> io::Result<()> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 200") {
        return Err(io::Error::other(format!("it answered {:?}", line.trim())));
    }
    let mut length = 0;
    loop {
        line.clear();
        from.read_line(&mut line)?;
        match line.trim().split_once(':') {
            None => break,
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
            Some(_) => {}
        }
    }
    if length > MAX_ANSWER {
        return Err(io::Error::other(format!("an answer of {length} bytes is over {MAX_ANSWER}")));
    }
    from.read_exact(&mut vec![0; length])
}

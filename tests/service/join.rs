//! A node on a machine of its own: it comes with a token, gets a certificate, and needs no token after.

use std::{
    io::{BufRead, BufReader, Read},
    net::UdpSocket,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lockstep::client::ServiceClient;

use crate::up::{MODEL, PATIENCE, connect, lockstep, model_of, sample, send_signal, step, train};

/// A coordinator process; killed with the test.
pub struct Coordinator {
    process: Child,
    pub address: String,
    doorway: String,
    arguments: Vec<String>,
}

impl Coordinator {
    /// Listens on any ports of this address of ours.
    pub fn start(directory: &Path, host: &str) -> Self {
        Self::start_with(directory, host, &[])
    }

    /// The same with more arguments.
    pub fn start_with(directory: &Path, host: &str, arguments: &[&str]) -> Self {
        // Free a moment ago; whoever takes it in between fails the test loudly.
        let any = format!("{host}:0");
        let doorway = UdpSocket::bind(&any).and_then(|s| s.local_addr()).expect("a port").to_string();
        Self::spawn(
            directory,
            &any,
            doorway,
            arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        )
    }

    /// Kills it, and starts it again where it was.
    pub fn restarted(mut self, directory: &Path) -> Self {
        let _ = self.process.kill();
        let _ = self.process.wait();
        Self::spawn(directory, &self.address.clone(), self.doorway.clone(), self.arguments.clone())
    }

    fn spawn(directory: &Path, listen: &str, doorway: String, arguments: Vec<String>) -> Self {
        let mut process = lockstep()
            .args(["coordinator", "--listen", listen, "--join-listen", &doorway, "--data-dir"])
            .arg(directory.join("data"))
            .args(&arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let line = lines.next().expect("it says where it listens, or dies").expect("text");
        let address = line.strip_prefix("listening ").unwrap_or_else(|| panic!("{line:?}")).to_owned();
        Self { process, address, doorway, arguments }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn token(directory: &Path, arguments: &[&str]) -> String {
    let output = lockstep()
        .args(["token", "create", "--data-dir"])
        .arg(directory.join("data"))
        .args(arguments)
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

/// A node with a disk of its own.
pub fn node(coordinator: &Coordinator, directory: &Path, name: &str, token: Option<&str>) -> Command {
    node_of(lockstep(), coordinator, directory, name, token)
}

/// The same behind the words that begin `command`.
pub fn node_of(
    mut command: Command,
    coordinator: &Coordinator,
    directory: &Path,
    name: &str,
    token: Option<&str>,
) -> Command {
    command
        .args(["node", "--name", name, "--coordinator", &coordinator.address, "--threads", "1"])
        .args(["--model", &format!("{MODEL}={}", model_of(directory).display())])
        .arg("--data-dir")
        .arg(directory.join(name))
        .env("LOCKSTEP_LOG", "warn,lockstep=info")
        .stderr(Stdio::piped());
    if let Some(token) = token {
        command.args(["--join", &coordinator.doorway, "--token", token]);
    }
    command
}

pub fn wait_for_nodes(service: &ServiceClient, count: usize) {
    let deadline = Instant::now() + PATIENCE;
    while service.cluster_status_blocking().expect("status").nodes.len() != count {
        assert!(Instant::now() < deadline, "not {count} nodes");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What a node says that must refuse to run.
pub fn refused(mut command: Command) -> String {
    let mut process = command.spawn().expect("the binary starts");
    let deadline = Instant::now() + PATIENCE;
    while process.try_wait().expect("waited for").is_none() {
        assert!(Instant::now() < deadline, "the node neither refused nor ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut said = String::new();
    process.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    assert_eq!(process.wait().expect("ended").code(), Some(78), "a restart would change nothing: {said}");
    said
}

/// A gateway that is a process of its own.
pub struct Gateway(Child);

impl Gateway {
    pub fn start(directory: &Path) -> Self {
        let gateway = lockstep()
            .args(["gateway", "--http", "127.0.0.1:0", "--data-dir"])
            .arg(directory.join("data"))
            .stdout(Stdio::piped())
            .spawn();
        Self(gateway.expect("the binary starts"))
    }

    /// Its URL, once it serves.
    pub fn url(&mut self) -> String {
        let mut lines = BufReader::new(self.0.stdout.take().expect("piped")).lines();
        let line = lines.next().expect("it serves, or dies").expect("text");
        line.strip_prefix("ready ").unwrap_or_else(|| panic!("{line:?}")).to_owned()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As launchers start them: the gateway may be first, and the coordinator listens on every address.
#[test]
fn a_gateway_waits_for_its_coordinator() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let mut gateway = Gateway::start(directory);
    std::thread::sleep(Duration::from_millis(500));
    let _coordinator = Coordinator::start(directory, "0.0.0.0");
    let url = gateway.url();
    assert!(url.starts_with("http://127.0.0.1:"), "{url:?}");
}

#[test]
fn a_node_joins_with_a_token_and_comes_back_without() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let coordinator = Coordinator::start(directory, "127.0.0.1");
    let service = connect(directory);
    let once = token(directory, &[]);
    let mut process = node(&coordinator, directory, "far-1", Some(&once)).spawn().expect("a node");
    wait_for_nodes(&service, 1);
    let training = train(&service);
    step(&training);
    let before = sample(&training, "before");

    send_signal("-KILL", process.id());
    process.wait().expect("killed");
    let process = node(&coordinator, directory, "far-1", None).spawn().expect("a node");
    assert_eq!(sample(&training, "again"), before, "it is back under its certificate");

    let said = refused(node(&coordinator, directory, "far-2", Some(&once)));
    assert!(said.contains("used up"), "{said}");
    let expired = token(directory, &["--valid", "0s"]);
    let said = refused(node(&coordinator, directory, "far-2", Some(&expired)));
    assert!(said.contains("expired"), "{said}");
    let forged = token(directory, &[]).replacen(['0', '1', '2', '3', '4', '5'], "f", 64);
    let said = refused(node(&coordinator, directory, "far-2", Some(&forged)));
    assert!(said.contains("no such token") || said.contains("not the expected coordinator"), "{said}");
    let said = refused(node(&coordinator, directory, "far-2", None));
    assert!(said.contains("far-2"), "there is no certificate: {said}");

    // A client's token makes no node.
    let client = token(directory, &["--role", "client"]);
    let said = refused(node(&coordinator, directory, "far-2", Some(&client)));
    assert!(said.contains("node"), "{said}");

    let several = token(directory, &["--uses", "2"]);
    let second = node(&coordinator, directory, "far-3", Some(&several)).spawn().expect("a node");
    wait_for_nodes(&service, 2);
    step(&training);
    for id in [process.id(), second.id()] {
        send_signal("-KILL", id);
    }
    for mut process in [process, second] {
        process.wait().expect("killed");
    }
}

//! Certificates come to an end, are revoked and are replaced by those of another CA, and a run goes on over it.

use std::{
    io::Read,
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use futures::executor::block_on;
use lockstep::client::ServiceClient;

use crate::{
    history::cli,
    join::{Coordinator, Gateway, node, refused, token, wait_for_nodes},
    lifecycle::http_get,
    up::{MODEL, PATIENCE, connect, sample, send_signal, step, train},
};

/// Two thirds of it are over several times in a test.
const LIFE: &str = "30s";
const LIFE_S: u64 = 30;
const RENEWALS_SEEN: Duration = Duration::from_secs(45);

/// A node whose log is read at its end.
struct Logged(Child);

impl Logged {
    fn start(mut command: Command) -> Self {
        Self(command.spawn().expect("a node"))
    }

    /// Kills it, and returns what it said.
    fn end(mut self) -> String {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let (mut said, mut log) = (String::new(), self.0.stderr.take().expect("piped"));
        log.read_to_string(&mut said).expect("text");
        said
    }

    /// Waits until it ends by itself: its exit status, and what it said.
    fn ended(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait().expect("waited for").is_none() {
            assert!(Instant::now() < deadline, "it goes on: {}", self.end());
            thread::sleep(Duration::from_millis(20));
        }
        let code = self.0.try_wait().expect("waited for").and_then(|status| status.code());
        (code, self.end())
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn certified_until(service: &ServiceClient, name: &str) -> u64 {
    let nodes = block_on(service.cluster_status()).expect("status").nodes;
    nodes
        .into_iter()
        .find(|node| node.name == name)
        .and_then(|node| node.certified_until)
        .expect("its certificate")
}

fn forget(directory: &Path, name: &str) {
    std::fs::remove_dir_all(directory.join(name).join("identity")).expect("an identity");
}

#[test]
fn certificates_are_renewed_under_a_run_and_a_revoked_node_stays_out() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let coordinator = Coordinator::start_with(directory, "127.0.0.1", &["--certificate-life", LIFE]);
    let service = connect(directory);
    let mut gateway = Gateway::start(directory);
    let http = gateway.url();
    let several = token(directory, &["--uses", "2"]);
    let first = Logged::start(node(&coordinator, directory, "far-1", Some(&several)));
    let second = Logged::start(node(&coordinator, directory, "far-2", Some(&several)));
    wait_for_nodes(&service, 2);
    let training = train(&service);
    let (begun, at_first) = (Instant::now(), certified_until(&service, "far-1"));
    while begun.elapsed() < RENEWALS_SEEN {
        step(&training);
        thread::sleep(Duration::from_millis(100));
    }
    let lives = (certified_until(&service, "far-1") - at_first) / LIFE_S;
    assert!(lives >= 1, "it has had {lives} new ones");
    let before = sample(&training, "before");

    let shown = cli(directory, &["cluster", "revoke", "far-2"]).expect("revoked");
    assert!(shown.contains("node far-2  revoked"), "{shown}");
    let (code, said) = second.ended();
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("the certificate of node far-2 was revoked"), "{said}");
    assert_eq!(sample(&training, "without-it"), before);
    step(&training);
    let said = refused(node(&coordinator, directory, "far-2", None));
    assert!(said.contains("the certificate of node far-2 was revoked"), "{said}");

    let coordinator = coordinator.restarted(directory);
    step(&training);
    // The gateway connects anew, and its first certificate is over.
    let models = http_get(&http, "/v1/loops/capabilities");
    assert!(models.contains(MODEL), "{models}");
    let said = refused(node(&coordinator, directory, "far-2", None));
    assert!(said.contains("the certificate of node far-2 was revoked"), "after a restart: {said}");
    assert!(cli(directory, &["cluster"]).expect("shown").contains("node far-2  revoked"));
    // Whoever keeps the cluster may let it in again.
    forget(directory, "far-2");
    let again = Logged::start(node(&coordinator, directory, "far-2", Some(&token(directory, &[]))));
    wait_for_nodes(&service, 2);
    step(&training);
    again.end();

    let said = first.end();
    let count = |what: &str| said.matches(what).count();
    assert!(count("is renewed for") >= 2, "{said}");
    assert_eq!(count("joined the coordinator"), 2, "once for each life of the coordinator: {said}");
}

#[test]
fn a_client_can_be_revoked_and_this_machines_own_goes_on() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let _coordinator = Coordinator::start(directory, "127.0.0.1");
    // The key of this machine's client may have leaked: it gets a new one, and the old one is refused.
    let leaked = directory.join("leaked");
    std::fs::create_dir(&leaked).expect("a directory");
    for file in std::fs::read_dir(directory.join("data/identity")).expect("identities").flatten() {
        std::fs::copy(file.path(), leaked.join(file.file_name())).expect("copied");
    }
    let address = std::fs::read_to_string(directory.join("data/endpoint")).expect("an address");
    let target =
        format!("lockstep://{}?identity={}", address.lines().next().expect("a line"), leaked.display());
    let thief = ServiceClient::connect_blocking(target.as_str()).expect("not yet revoked");
    cli(directory, &["cluster", "revoke", "client"]).expect("revoked");
    let shown = cli(directory, &["cluster"]).expect("with the new one");
    assert!(shown.contains("client client  revoked"), "{shown}");
    let said = cli(directory, &["doctor"]).expect("nothing is broken");
    assert!(said.contains("certificates of") && said.contains("the cluster's CA until 20"), "{said}");
    let until = Instant::now() + PATIENCE;
    let error = loop {
        match block_on(thief.cluster_status()) {
            Ok(_) => assert!(Instant::now() < until, "it is served on"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("client client was revoked"), "{error}");
    let error = cli(directory, &["cluster", "revoke", "nobody"]).expect_err("unknown");
    assert!(error.contains("nobody"), "{error}");
}

#[test]
fn the_ca_is_changed_under_a_run() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let coordinator = Coordinator::start(directory, "127.0.0.1");
    let service = connect(directory);
    let old_token = token(directory, &["--uses", "9"]);
    let first = Logged::start(node(&coordinator, directory, "far-1", Some(&old_token)));
    wait_for_nodes(&service, 1);
    let training = train(&service);
    step(&training);

    let shown = cli(directory, &["cluster", "rotate-ca"]).expect("rotated");
    assert!(shown.contains("a new CA signs") && shown.contains("node far-1"), "{shown}");
    let error = cli(directory, &["cluster", "rotate-ca"]).expect_err("one after the other");
    assert!(error.contains("under way"), "{error}");
    // Tokens of before and of now are good.
    let second = Logged::start(node(&coordinator, directory, "far-2", Some(&old_token)));
    wait_for_nodes(&service, 2);
    let third = Logged::start(node(&coordinator, directory, "far-3", Some(&token(directory, &[]))));
    wait_for_nodes(&service, 3);
    let until = Instant::now() + PATIENCE;
    while block_on(service.cluster_status()).expect("status").trust.rotation.is_some() {
        assert!(Instant::now() < until, "{}", cli(directory, &["cluster"]).expect("shown"));
        step(&training);
        thread::sleep(Duration::from_millis(100));
    }
    step(&training);
    let said = refused(node(&coordinator, directory, "far-4", Some(&old_token)));
    assert!(said.contains("older than a change of the CA"), "{said}");
    let said = third.end() + &second.end();
    assert_eq!(said.matches("joined the coordinator").count(), 2, "{said}");

    // It comes back with what it was given, whatever token its launcher still shows.
    let said = first.end();
    assert!(said.contains("is renewed for") && said.matches("joined the coordinator").count() == 1, "{said}");
    let again = Logged::start(node(&coordinator, directory, "far-1", Some(&old_token)));
    wait_for_nodes(&service, 1);
    step(&training);
    send_signal("-KILL", again.0.id());
    again.end();
}

//! Two hosts: a network namespace with an address and a `/dev/shm` of its own is one, this machine the
//! other. Needs root and iproute2, and says so where they are missing.

use std::{
    path::Path,
    process::{Child, Command},
};

use lockstep::{client::LoraOptions, types::PolicyId};

use crate::{
    join::{Coordinator, node_of, token, wait_for_nodes},
    up::{MODEL, connect, lockstep, sample, step},
};

const HERE: &str = "10.213.77.1";
const THERE: &str = "10.213.77.2";

/// A namespace behind a cable; gone with the test.
struct Host {
    name: String,
}

impl Host {
    /// `None` where this user or machine can't have one.
    fn new() -> Option<Self> {
        let host = Self { name: format!("lockstep-{}", std::process::id()) };
        let (name, near, far) = (host.name.as_str(), "lsnear", "lsfar");
        let made = [
            &["netns", "add", name][..],
            &["link", "add", near, "type", "veth", "peer", "name", far, "netns", name],
            &["addr", "add", &format!("{HERE}/24"), "dev", near],
            &["link", "set", near, "up"],
            &["-n", name, "addr", "add", &format!("{THERE}/24"), "dev", far],
            &["-n", name, "link", "set", far, "up"],
            &["-n", name, "link", "set", "lo", "up"],
        ];
        let ip =
            |arguments: &&[&str]| Command::new("ip").args(*arguments).status().is_ok_and(|s| s.success());
        made.iter().all(ip).then_some(host)
    }

    /// What is put before a program that runs there.
    fn prefix(&self) -> Command {
        let own_shm = "mount -t tmpfs none /dev/shm && exec \"$@\"";
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "unshare", "-m", "sh", "-c", own_shm, "sh"]);
        command.arg(env!("CARGO_BIN_EXE_lockstep"));
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The cable goes with it.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The policy after three steps on as many ranks as there are nodes.
fn train(directory: &Path, nodes: Vec<Command>) -> PolicyId {
    let nodes: Vec<Killed> =
        nodes.into_iter().map(|mut node| Killed(node.spawn().expect("a node"))).collect();
    let service = connect(directory);
    wait_for_nodes(&service, nodes.len());
    let options = LoraOptions { seed: 3, micro_batch_tokens: Some(16), ..LoraOptions::default() };
    let training = service.create_lora_training_client_blocking(MODEL, 4, options).expect("a run");
    (0..3).for_each(|_| step(&training));
    assert_eq!(sample(&training, "third").policy_version, 3);
    let status = service.cluster_status_blocking().expect("status");
    let run = &status.runs[0];
    assert!(run.phase.contains(&format!("{} rank", nodes.len())), "{}", run.phase);
    run.live.expect("a live policy")
}

#[test]
fn ranks_on_two_hosts_give_the_bits_of_one() {
    let Some(host) = Host::new() else {
        eprintln!("skipped: needs root and `ip netns`");
        return;
    };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let (one, two) = (directory.join("one"), directory.join("two"));

    let coordinator = Coordinator::start(&one, HERE);
    let alone = node_of(lockstep(), &coordinator, &one, "near", Some(&token(&one, &[])));
    let expected = train(&one, vec![alone]);

    let coordinator = Coordinator::start(&two, HERE);
    let near = node_of(lockstep(), &coordinator, &two, "near", Some(&token(&two, &[])));
    let far = node_of(host.prefix(), &coordinator, &two, "far", Some(&token(&two, &[])));
    assert_eq!(train(&two, vec![near, far]), expected);
}

//! Three ranks on three hosts with a bad network between them and the coordinator: loss, delay, packets out of
//! order, and a partition. The weights are those of a run on one node, to the bit.
//!
//! A host is a process with a `/dev/shm` of its own, which takes root; without it the tests say that they are
//! skipped. `LOCKSTEP_SEED=N` sets the weather's dice.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use lockstep::{client::TrainingClient, types::PolicyId};

use crate::{
    join::{Coordinator, node_of, token, wait_for_nodes},
    up::{connect, lockstep, sample, step, train},
    weather::{CALM, Network, Proxy, Weather},
};

const STEPS: u64 = 20;

/// Longer than the 15 s after which a silent node counts as lost.
const PARTITION: Duration = Duration::from_secs(20);

/// The step after which one host is cut off.
const CUT_AT: u64 = 5;

/// Less than that was not felt: what is in flight waits until the node counts as lost.
const FELT: Duration = Duration::from_secs(5);

/// Three rank sets at 15 s, should each report name the wrong one of a pair first, and a busy machine.
const LEFT_OUT: Duration = Duration::from_secs(75);

/// For a run of some seconds, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(240);

const STORM: Weather = Weather { lost: 20, delay: Duration::from_millis(20), late: 50 };

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What begins the command of a node that shares no memory with others; `None` where that can't be had.
fn own_host() -> Option<Command> {
    let with_own_memory = || {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", "mount -t tmpfs none /dev/shm && exec \"$@\"", "sh"]);
        command
    };
    let possible = with_own_memory().arg("true").status().is_ok_and(|status| status.success());
    possible.then(|| {
        let mut command = with_own_memory();
        command.arg(env!("CARGO_BIN_EXE_lockstep"));
        command
    })
}

fn seed() -> u64 {
    std::env::var("LOCKSTEP_SEED").map_or(1, |seed| seed.parse().expect("LOCKSTEP_SEED"))
}

/// A cluster of three hosts. Whatever they say to one another and to the coordinator passes a proxy.
struct Hosts {
    /// In front of the coordinator for each node, then in front of each node.
    to_coordinator: Vec<Proxy>,
    to_node: Vec<Proxy>,
    listens: Vec<SocketAddr>,
    // In this order: nodes end before the coordinator, and that before the network.
    _nodes: Vec<Killed>,
    _coordinator: Coordinator,
    _network: Network,
}

impl Hosts {
    fn start(directory: &Path, weather: Weather) -> Self {
        let coordinator = Coordinator::start(directory, "127.0.0.1");
        let address: SocketAddr = coordinator.address.parse().expect("an address");
        let mut network = Network::new(seed() * 100);
        let (mut to_coordinator, mut to_node, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
        let mut listening = Vec::new();
        for i in 0..3 {
            // Free a moment ago; whoever takes it in between fails the test loudly.
            let listens =
                UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|s| s.local_addr()).expect("a port");
            listening.push(listens);
            to_coordinator.push(network.proxy(address, weather));
            to_node.push(network.proxy(listens, weather));
            let begin = own_host().expect("it was possible before");
            let mut node =
                node_of(begin, &coordinator, directory, &format!("n{i}"), Some(&token(directory, &[])));
            node.args(["--coordinator", &to_coordinator[i].address.to_string()])
                .args(["--listen", &listens.to_string(), "--advertise", &to_node[i].address.to_string()])
                .stderr(std::process::Stdio::inherit());
            nodes.push(Killed(node.spawn().expect("a node")));
        }
        Self {
            to_coordinator,
            to_node,
            listens: listening,
            _nodes: nodes,
            _coordinator: coordinator,
            _network: network,
        }
    }

    /// Nobody hears of this node any more, nor it of anybody; or all is well again.
    fn cut(&self, node: usize, cut: bool) {
        self.to_coordinator[node].cut(cut);
        self.to_node[node].cut(cut);
        // What it opened towards others comes from where it listens.
        self.to_node.iter().for_each(|proxy| proxy.cut_client(self.listens[node], cut));
    }

    /// The other nodes don't hear of this one any more, nor it of them; the coordinator does.
    fn cut_from_peers(&self, node: usize) {
        self.to_node[node].cut(true);
        self.to_node.iter().for_each(|proxy| proxy.cut_client(self.listens[node], true));
    }

    fn counts(&self) -> [u64; 3] {
        let all = self.to_coordinator.iter().chain(&self.to_node).map(Proxy::counts);
        all.fold([0; 3], |sum, count| [0, 1, 2].map(|i| sum[i] + count[i]))
    }
}

/// So many steps, from the first.
fn steps(training: &TrainingClient, count: u64) -> PolicyId {
    (0..count).for_each(|_| step(training));
    last(training, count)
}

/// What the run serves after so many steps.
fn last(training: &TrainingClient, count: u64) -> PolicyId {
    assert_eq!(sample(training, "last").policy_version, count);
    training.refresh_blocking().expect("its state").live.expect("a live policy")
}

/// What one node alone ends with.
fn undisturbed(directory: &Path, count: u64) -> PolicyId {
    let coordinator = Coordinator::start(directory, "127.0.0.1");
    let node = node_of(lockstep(), &coordinator, directory, "alone", Some(&token(directory, &[]))).spawn();
    let _node = Killed(node.expect("a node"));
    let service = connect(directory);
    wait_for_nodes(&service, 1);
    steps(&train(&service), count)
}

#[test]
fn loss_delay_and_disorder_cost_time_and_nothing_else() {
    if own_host().is_none() {
        eprintln!("skipped: a `/dev/shm` of its own needs root and `unshare`");
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (calm, stormy) = (directory.path().join("calm"), directory.path().join("stormy"));
    let expected = undisturbed(&calm, STEPS);

    let hosts = Hosts::start(&stormy, STORM);
    let service = connect(&stormy);
    wait_for_nodes(&service, 3);
    let begun = Instant::now();
    let got = steps(&train(&service), STEPS);
    let [passed, dropped, late] = hosts.counts();
    let said = format!(
        "{passed} packets passed, {late} of them late, {dropped} were lost (LOCKSTEP_SEED={})",
        seed()
    );
    assert_eq!(got, expected, "other weights than in calm weather: {said}");
    // In a thousand 20 are lost and 50 late: fewer than a quarter of that, and nothing was tested.
    assert!(dropped * 200 > passed && late * 80 > passed, "{said}");
    eprintln!("{STEPS} steps on 3 hosts in {:.1?}: {said}", begun.elapsed());
}

#[test]
fn a_partition_delays_and_harms_nothing() {
    if own_host().is_none() {
        eprintln!("skipped: a `/dev/shm` of its own needs root and `unshare`");
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (calm, cut) = (directory.path().join("calm"), directory.path().join("cut"));
    let expected = undisturbed(&calm, STEPS);

    let hosts = Hosts::start(&cut, CALM);
    let service = connect(&cut);
    wait_for_nodes(&service, 3);
    let training = train(&service);
    let begun = Instant::now();
    (0..CUT_AT).for_each(|_| step(&training));
    let (got, took) = thread::scope(|scope| {
        scope.spawn(|| {
            // In the middle of a step, or between two: both must do.
            thread::sleep(Duration::from_millis(seed() * 7 % 30));
            hosts.cut(1, true);
            thread::sleep(PARTITION);
            hosts.cut(1, false);
        });
        (CUT_AT..STEPS).for_each(|_| step(&training));
        (last(&training, STEPS), begun.elapsed())
    });
    assert_eq!(got, expected, "other weights than without a partition (LOCKSTEP_SEED={})", seed());
    assert!((FELT..PATIENCE).contains(&took), "{STEPS} steps took {took:?} (LOCKSTEP_SEED={})", seed());
    eprintln!("{STEPS} steps on 3 hosts, one cut off for {PARTITION:?}: {took:.1?}");
    // The node that was away is one of the cluster again.
    wait_for_nodes(&service, 3);
}

/// Both while its ranks compute and while they are formed, silence between two nodes is noticed in the time in
/// which the coordinator would notice it, and not at the deadline of forming (400 s) or of an operation (600 s).
#[test]
fn a_node_that_its_peers_do_not_hear_is_left_out_in_the_time_of_a_heartbeat() {
    if own_host().is_none() {
        eprintln!("skipped: a `/dev/shm` of its own needs root and `unshare`");
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (calm, cut) = (directory.path().join("calm"), directory.path().join("cut"));
    let expected = undisturbed(&calm, STEPS);

    let hosts = Hosts::start(&cut, CALM);
    let service = connect(&cut);
    wait_for_nodes(&service, 3);
    let training = train(&service);
    (0..CUT_AT).for_each(|_| step(&training));
    let begun = Instant::now();
    hosts.cut_from_peers(1);
    step(&training);
    let computing = begun.elapsed();
    (CUT_AT + 1..STEPS).for_each(|_| step(&training));
    assert_eq!(last(&training, STEPS), expected, "other weights than without a cut");
    assert!((FELT..LEFT_OUT).contains(&computing), "a step took {computing:?}");

    // Its peers are kept from it, and those two from each other now: one node after the other is left.
    let begun = Instant::now();
    hosts.cut_from_peers(0);
    let second = train(&service);
    step(&second);
    let forming = begun.elapsed();
    assert!((FELT..LEFT_OUT).contains(&forming), "ranks took {forming:?}");
    wait_for_nodes(&service, 3);
    eprintln!(
        "cut off from its peers: {computing:.1?} in an operation, {forming:.1?} while ranks are formed"
    );
}

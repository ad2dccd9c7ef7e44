//! Every implementation against the reference, to the bit; then what goes wrong, on each of them.

mod quic;

use std::{
    collections::HashSet,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{exchange::Exchanged, shared_memory::SharedMemory, *};
use crate::{
    protocol::{Epoch, Generation, NodeId, OperationSeq, RankSeat, StreamOpen, decode},
    transport::{ClusterCa, Connection, Endpoint, MemoryNetwork, Role},
    types::RunId,
};

/// For what must happen, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);

/// For what must not.
const SHORT: Duration = Duration::from_millis(150);

const RUN: RunId = RunId(7);

fn token(seq: u64) -> OpToken {
    let (epoch, generation) = (Epoch(2), Generation(3));
    OpToken { run: RUN, epoch, generation, seq: OperationSeq(seq), incarnation: 1 }
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Carrier {
    SharedMemory,
    Memory,
    Quic,
    Nccl,
}

const CARRIERS: [Carrier; 4] = [Carrier::SharedMemory, Carrier::Memory, Carrier::Quic, Carrier::Nccl];

/// A rank set, and what keeps it up.
struct Ranks {
    ranks: Vec<Box<dyn Collective>>,
    _runtime: tokio::runtime::Runtime,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A name that nobody else has, for a cluster of shared memory.
fn unique(what: &str) -> String {
    format!("test{}{what}{:?}", std::process::id(), thread::current().id())
}

fn roster(hosts: &[&str], addresses: &[String]) -> Vec<RankSeat> {
    let seat = |(i, address): (usize, &String)| RankSeat {
        rank: RankIndex(i as u32),
        node: NodeId(i as u32),
        slot: 0,
        host: hosts[i % hosts.len()].into(),
        address: address.clone(),
    };
    addresses.iter().enumerate().map(seat).collect()
}

/// What a node does with the connections of other nodes.
async fn serve(endpoint: Endpoint, inbox: CollectiveInbox) {
    while let Some(connection) = endpoint.accept().await {
        tokio::spawn(take_streams(connection, inbox.clone()));
    }
}

async fn take_streams(connection: Connection, inbox: CollectiveInbox) {
    while let Ok(mut stream) = connection.accept_stream().await {
        let first = stream.recv.recv_frame(1 << 10).await.unwrap().unwrap();
        match decode("stream open", &first, 1 << 10).unwrap() {
            StreamOpen::Collective { run, epoch, generation, from, to } => {
                inbox.deliver(StreamKey { run, epoch, generation, from, to }, stream);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// `world_size` ranks that have met through [`join`], each on a node of its own.
fn meet(carrier: Carrier, world_size: u32) -> Ranks {
    let runtime = runtime();
    let _inside = runtime.enter();
    let (network, directory) = (MemoryNetwork::default(), tempfile::tempdir().unwrap());
    let ca = ClusterCa::open_or_create(directory.path()).unwrap();
    let endpoint = |i: u32| match carrier {
        Carrier::Quic => {
            let identity = ca.issue(Role::Node, &format!("n{i}")).unwrap();
            Endpoint::quic(([127, 0, 0, 1], 0).into(), identity, b"test").unwrap()
        }
        _ => Endpoint::memory(&network, Role::Node, &format!("n{i}")).unwrap(),
    };
    let endpoints: Vec<Endpoint> = (0..world_size).map(endpoint).collect();
    let addresses: Vec<String> = endpoints.iter().map(Endpoint::local_address).collect();
    let roster = match carrier {
        Carrier::SharedMemory => roster(&["here"], &addresses),
        _ => roster(&["here", "there"], &addresses),
    };
    let handle = runtime.handle();
    let name = unique("met");
    let ranks = thread::scope(|scope| {
        let joining = endpoints.iter().zip(0..).map(|(endpoint, me)| {
            let (roster, name) = (&roster, &name);
            scope.spawn(move || {
                if carrier == Carrier::Nccl {
                    return over_host_link(name, me, world_size, Reduction::Tree);
                }
                let inbox = CollectiveInbox::default();
                handle.spawn(serve(endpoint.clone(), inbox.clone()));
                let cluster = endpoint.cluster();
                let (epoch, generation, me) = (Epoch(2), Generation(3), RankIndex(me));
                let set = RankSet { cluster, run: RUN, epoch, generation, roster, me, gpu: None };
                join(set, endpoint, &inbox, handle.clone(), soon()).unwrap()
            })
        });
        joining.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    Ranks { ranks, _runtime: runtime }
}

/// Runs `body` on every rank at once.
fn on_each<T: Send>(
    ranks: &mut [Box<dyn Collective>],
    body: impl Fn(&mut dyn Collective) -> T + Sync,
) -> Vec<T> {
    thread::scope(|scope| {
        let running: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(|| body(&mut **rank))).collect();
        running.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

fn leaf(i: u32, len: usize) -> Vec<f32> {
    (0..len as u32)
        .map(|j| ((i * 31 + j * 17) % 97) as f32 * 10f32.powi((i * 7 + j) as i32 % 9 - 4))
        .collect()
}

/// What `rank` holds when leaves of these costs are shared out.
fn share(costs: &[u64], world_size: u32, rank: RankIndex, len: usize) -> Vec<Partial> {
    let mine = assign_leaves(costs, world_size)[rank.0 as usize].clone();
    let mut sums = TreeAccumulator::new(mine.start, len);
    mine.for_each(|i| sums.push(leaf(i, len)));
    sums.finish(costs.len() as u32)
}

fn reference(leaves: u32, len: usize) -> Vec<u32> {
    let all: Vec<_> =
        (0..leaves).map(|index| Partial { level: 0, index, values: leaf(index, len) }).collect();
    bits(&reduce_tree(leaves, len, &all).unwrap())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// One operation as a trainer does it: a gather, then a reduction, under one token.
fn operation(rank: &mut dyn Collective, seq: u64, costs: &[u64], len: usize) -> (Vec<Vec<u8>>, Vec<u32>) {
    let (me, world_size) = (rank.rank(), rank.world_size());
    let said = vec![me.0 as u8; seq as usize * (me.0 as usize + 1)];
    let gathered = rank.all_gather(token(seq), said, soon()).unwrap();
    let mut out = vec![f32::NAN; len];
    let partials = share(costs, world_size, me, len);
    rank.all_reduce(token(seq), costs.len() as u32, partials, &mut out, soon()).unwrap();
    (gathered, bits(&out))
}

#[test]
fn every_carrier_equals_the_reference_to_the_bit() {
    for carrier in CARRIERS {
        for world_size in 1..=4 {
            let mut set = meet(carrier, world_size);
            for (seq, leaves, len) in [
                (1, 6, 1000),
                (2, 13, 33),
                (3, 2, 7),
                (4, 0, 5),
                (5, 1, 70_000),
                (6, 7, 0),
                (7, 5, 1_100_007),
            ] {
                let costs: Vec<u64> = (0..leaves).map(|i| 100 + 900 * (i % 3)).collect();
                let expected = reference(leaves as u32, len);
                let said = |r: u32| vec![r as u8; seq as usize * (r as usize + 1)];
                for (gathered, sum) in on_each(&mut set.ranks, |rank| operation(rank, seq, &costs, len)) {
                    assert_eq!(gathered, (0..world_size).map(said).collect::<Vec<_>>());
                    assert!(sum == expected, "{carrier:?}, {world_size} ranks, {leaves} leaves of {len}");
                }
            }
        }
    }
}

#[test]
fn subtrees_may_be_anywhere() {
    // (2, 0) at rank 2, the rest torn apart, one rank without any.
    let held = [&[(1, 2), (0, 8)][..], &[(0, 7)], &[(2, 0), (0, 6)], &[]];
    let leaves = 9;
    let node = |&(level, index): &(u32, u32)| {
        let mut sums = TreeAccumulator::new(index << level, 50);
        (index << level..(index + 1) << level).for_each(|i| sums.push(leaf(i, 50)));
        sums.finish(u32::MAX).pop().unwrap()
    };
    for carrier in CARRIERS {
        let mut set = meet(carrier, 4);
        let sums = on_each(&mut set.ranks, |rank| {
            let partials = held[rank.rank().0 as usize].iter().map(node).collect();
            let mut out = vec![0.0; 50];
            rank.all_reduce(token(1), leaves, partials, &mut out, soon()).unwrap();
            bits(&out)
        });
        assert!(sums.iter().all(|sum| *sum == reference(leaves, 50)), "{carrier:?}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    for carrier in CARRIERS {
        let mut set = meet(carrier, 3);
        let results = on_each(&mut set.ranks, |rank| match rank.rank() {
            RankIndex(1) => None,
            _ => {
                let deadline = Instant::now() + SHORT;
                let failed = rank.all_reduce(token(1), 0, vec![], &mut [0.0; 8], deadline).unwrap_err();
                let after = rank.all_gather(token(1), vec![], soon()).unwrap_err();
                Some((failed, after))
            }
        });
        let (failed, after): (Vec<_>, Vec<_>) = results.into_iter().flatten().unzip();
        // One may hear of the other's deadline before its own.
        assert!(failed.iter().all(|e| e.missing() == Some(RankIndex(1))), "{carrier:?}: {failed:?}");
        assert!(
            failed.iter().any(|e| matches!(e, CollectiveError::Deadline { .. })),
            "{carrier:?}: {failed:?}"
        );
        assert!(after.iter().all(|e| matches!(e, CollectiveError::UsedUp { .. })), "{after:?}");
    }
}

#[test]
fn a_rank_that_is_gone_is_noticed_at_once() {
    for carrier in CARRIERS {
        let mut set = meet(carrier, 3);
        drop(set.ranks.remove(2));
        for error in on_each(&mut set.ranks, |rank| rank.all_gather(token(1), vec![1], soon()).unwrap_err()) {
            assert!(
                matches!(error, CollectiveError::Lost { missing: RankIndex(2), .. }),
                "{carrier:?}: {error}"
            );
        }
    }
}

#[test]
fn an_abort_breaks_calls_in_progress_and_later_ones() {
    for carrier in CARRIERS {
        let mut set = meet(carrier, 2);
        let abort = set.ranks[0].abort_handle();
        let (waiting, entered) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let rank = &mut set.ranks[0];
            let call = scope.spawn(move || {
                waiting.send(()).unwrap();
                let first = rank.all_gather(token(1), vec![], soon()).unwrap_err();
                (first, rank.all_gather(token(2), vec![], soon()).unwrap_err())
            });
            entered.recv().unwrap();
            thread::sleep(Duration::from_millis(30));
            abort();
            let (first, second) = call.join().unwrap();
            assert!(matches!(first, CollectiveError::Aborted { .. }), "{carrier:?}: {first}");
            assert!(matches!(second, CollectiveError::Aborted { .. }), "{carrier:?}: {second}");
        });
        // It had said its part of call 1 before it was called off; of call 2 nothing comes.
        let other = &mut set.ranks[1];
        let error = match other.all_gather(token(1), vec![], soon()) {
            Ok(_) => other.all_gather(token(2), vec![], soon()).unwrap_err(),
            Err(error) => error,
        };
        assert!(matches!(error, CollectiveError::Lost { missing: RankIndex(0), .. }), "{carrier:?}: {error}");
    }
}

#[test]
fn contributions_that_do_not_fit_are_never_added() {
    type Body = fn(&mut dyn Collective) -> Result<(), CollectiveError>;
    fn reduce(
        rank: &mut dyn Collective,
        seq: u64,
        leaves: u32,
        held: Option<u32>,
        len: usize,
    ) -> Result<(), CollectiveError> {
        let partial = held.map(|index| Partial { level: 0, index, values: vec![1.0; len] });
        rank.all_reduce(token(seq), leaves, partial.into_iter().collect(), &mut vec![0.0; len], soon())
    }
    let cases: [(&str, Body, Body); 6] = [
        ("length", |r| reduce(r, 1, 2, Some(0), 40), |r| reduce(r, 1, 2, Some(1), 41)),
        ("leaves", |r| reduce(r, 1, 2, Some(0), 40), |r| reduce(r, 1, 3, Some(1), 40)),
        ("stale token", |r| reduce(r, 2, 2, Some(0), 40), |r| reduce(r, 1, 2, Some(1), 40)),
        (
            "another method",
            |r| reduce(r, 1, 2, Some(0), 40),
            |r| r.all_gather(token(1), vec![1; 40], soon()).map(drop),
        ),
        ("a leaf twice", |r| reduce(r, 1, 2, Some(0), 40), |r| reduce(r, 1, 2, Some(0), 40)),
        ("a leaf missing", |r| reduce(r, 1, 2, Some(0), 40), |r| reduce(r, 1, 2, None, 40)),
    ];
    for carrier in CARRIERS {
        for (what, first, second) in cases {
            let mut set = meet(carrier, 2);
            let errors = on_each(&mut set.ranks, |rank| match rank.rank() {
                RankIndex(0) => first(rank).unwrap_err(),
                _ => second(rank).unwrap_err(),
            });
            // One may hear of the other's refusal before it sees the reason itself.
            let refused = |e: &CollectiveError| {
                matches!(e, CollectiveError::Mismatch { .. } | CollectiveError::NoTree { .. })
            };
            let informed = |e: &CollectiveError| refused(e) || matches!(e, CollectiveError::Lost { .. });
            assert!(
                errors.iter().any(refused) && errors.iter().all(informed),
                "{carrier:?}, {what}: {errors:?}"
            );
        }
    }
}

#[test]
fn own_sums_of_the_wrong_length_are_refused() {
    let mut set = meet(Carrier::SharedMemory, 1);
    let short = Partial { level: 0, index: 0, values: vec![1.0; 3] };
    let error = set.ranks[0].all_reduce(token(1), 1, vec![short], &mut [0.0; 4], soon()).unwrap_err();
    assert!(matches!(error, CollectiveError::Mismatch { .. }), "{error}");
    set.ranks[0].abort_handle()();
    let error = set.ranks[0].all_gather(token(1), vec![], soon()).unwrap_err();
    assert!(matches!(error, CollectiveError::Aborted { .. }), "{error}");
}

#[test]
fn a_rank_that_does_not_join_is_named() {
    let runtime = runtime();
    let network = MemoryNetwork::default();
    let endpoint = Endpoint::memory(&network, Role::Node, "n0").unwrap();
    let addresses: Vec<String> = (0..3).map(|i| format!("memory:n{i}")).collect();
    let inbox = CollectiveInbox::default();
    let joined = |hosts: &[&str], me| {
        let (cluster, roster) = (endpoint.cluster(), roster(hosts, &addresses));
        let (run, epoch, generation, me) = (RUN, Epoch(2), Generation(3), RankIndex(me));
        let set = RankSet { cluster, run, epoch, generation, roster: &roster, me, gpu: None };
        join(set, &endpoint, &inbox, runtime.handle().clone(), Instant::now() + SHORT).err().unwrap()
    };
    assert_eq!(joined(&["here"], 0), JoinError::Deadline { missing: RankIndex(1) });
    assert_eq!(joined(&["here"], 2), JoinError::Deadline { missing: RankIndex(0) });
    for me in [0, 2] {
        match joined(&["here", "there"], me) {
            JoinError::Deadline { missing } => assert_ne!(missing, RankIndex(me)),
            // Its own connect timed out first.
            JoinError::Lost { reason, .. } => assert!(reason.contains("did not answer"), "{reason}"),
            other => panic!("{other}"),
        }
    }
    assert!(matches!(joined(&["here"], 3), JoinError::Roster { .. }));
}

const HELPER_SET: &str = "LOCKSTEP_TEST_RANK_SET";
const HELPER_RANK: &str = "LOCKSTEP_TEST_RANK";

fn shared(name: &str, rank: u32, world_size: u32) -> Box<dyn Collective> {
    let places = shared_memory::Places::of_this_host();
    let memory = SharedMemory::join(places, name, RankIndex(rank), world_size, soon()).unwrap();
    Box::new(Exchanged::new(memory))
}

/// This program again, as another rank of the set: runs [`rank_process`].
fn spawn_rank(name: &str, rank: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "collective::tests::rank_process", "--ignored", "--nocapture"])
        .envs([(HELPER_SET, name), (HELPER_RANK, &rank.to_string())])
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

const PROCESS_COSTS: [u64; 7] = [512, 1024, 100, 1024, 900, 1024, 30];

#[test]
#[ignore = "not a test: what the processes of the tests below run"]
fn rank_process() {
    let name = std::env::var(HELPER_SET).unwrap();
    let me: u32 = std::env::var(HELPER_RANK).unwrap().parse().unwrap();
    let mut rank = shared(&name, me, 3);
    for seq in 1..=4 {
        let (_, sum) = operation(&mut *rank, seq, &PROCESS_COSTS, 10_000);
        assert!(sum == reference(PROCESS_COSTS.len() as u32, 10_000));
    }
    // Then it waits for calls that do not come.
    let _ = rank.all_gather(token(5), vec![], soon());
}

/// Names in shared memory that belong to a rank set.
fn left_behind(name: &str) -> HashSet<String> {
    let entries = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|n| n.contains(name)).collect()
}

#[test]
fn real_processes_agree_and_a_killed_one_is_noticed() {
    let name = unique("processes");
    let mut children = [spawn_rank(&name, 1), spawn_rank(&name, 2)];
    let mut rank = shared(&name, 0, 3);
    let expected = reference(PROCESS_COSTS.len() as u32, 10_000);
    for seq in 1..=4 {
        let (gathered, sum) = operation(&mut *rank, seq, &PROCESS_COSTS, 10_000);
        assert_eq!(gathered[2], vec![2; seq as usize * 3]);
        assert!(sum == expected);
    }
    // Rank 2 is in call 5 or about to be; rank 1 goes on.
    children[1].kill().unwrap();
    children[1].wait().unwrap();
    let error = loop {
        // It may have said its part of this call before it died.
        if let Err(error) = rank.all_gather(token(5), vec![], soon()) {
            break error;
        }
    };
    assert!(matches!(error, CollectiveError::Lost { missing: RankIndex(1 | 2), .. }), "{error}");
    drop(rank);
    assert!(children[0].wait().unwrap().success());
    // The next rank set of the host takes what the killed one left.
    thread::scope(|scope| {
        let next = unique("sweep");
        scope.spawn({
            let next = next.clone();
            move || shared(&next, 1, 2)
        });
        shared(&next, 0, 2);
    });
    assert_eq!(left_behind(&name), HashSet::new());
}

#[test]
fn nothing_stays_in_shared_memory() {
    let name = unique("clean");
    let mut ranks: Vec<_> = thread::scope(|scope| {
        let joining: Vec<_> = (0..2)
            .map(|r| {
                scope.spawn({
                    let name = &name;
                    move || shared(name, r, 2)
                })
            })
            .collect();
        joining.into_iter().map(|r| r.join().unwrap()).collect()
    });
    on_each(&mut ranks, |rank| operation(rank, 1, &[1, 2, 3], 100));
    assert_eq!(left_behind(&name), HashSet::new(), "while the rank set lives");
}

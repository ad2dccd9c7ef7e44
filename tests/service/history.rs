//! What a run did can be computed again, gone on from, copied away and brought back.

use std::{path::Path, process::Output, thread, time::Instant};

use futures::executor::block_on;
use lockstep::{
    client::{ServiceClient, TrainingClient},
    types::{Digest, RunId},
};

use crate::up::{
    MODEL, PATIENCE, Up, connect, lockstep, model_of, processes_of, send_signal, step, train, wait_until_gone,
};

/// Runs a subcommand on the service of `directory`; what it prints, or its error.
pub fn cli(directory: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = lockstep();
    let Output { status, stdout, stderr } =
        command.args(arguments).arg("--data-dir").arg(directory.join("data")).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if status.success() { Ok(text(&stdout)) } else { Err(text(&stderr)) }
}

/// Names the weights as they are now.
fn weights(training: &TrainingClient) -> Digest {
    let sampling = training.save_weights_and_get_sampling_client("now").result().expect("published");
    sampling.policy().expect("a policy").digest
}

fn attach(service: &ServiceClient, run: RunId) -> TrainingClient {
    block_on(service.attach_training_client(run)).expect("the run is there")
}

#[test]
fn a_run_is_computed_again_and_forked_as_far_back_as_history_goes() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let _up = Up::start(directory, &["--trainers", "2"]);
    let service = connect(directory);
    let training = train(&service);
    (0..12).for_each(|_| step(&training));
    let twelve = weights(&training);
    (12..18).for_each(|_| step(&training));
    let eighteen = weights(&training);
    let run = training.run().to_string();

    for (to, from) in [("12", "8"), ("18", "16"), ("16", "8")] {
        let said = cli(directory, &["runs", "replay", &run, "--to", to]).expect("equal");
        assert!(said.contains(&format!("from step {from} to step {to} came out equal")), "{said}");
    }
    let forked = cli(directory, &["runs", "fork", &run, "--at", "12", "--name", "again"]).expect("forked");
    let fork = attach(&service, forked.trim().parse().expect("a run's number"));
    assert_eq!(fork.policy_version_blocking().expect("its version"), 12);
    assert_eq!(weights(&fork), twelve);
    (12..18).for_each(|_| step(&fork));
    assert_eq!(weights(&fork), eighteen, "with moments and counts, to the bit");
    assert_eq!(weights(&training), eighteen, "the first is as it was");
    assert!(cli(directory, &["runs"]).expect("listed").contains("again"));

    for arguments in [["runs", "fork", &run, "--at", "3"], ["runs", "replay", &run, "--to", "3"]] {
        let error = cli(directory, &arguments).expect_err("beyond history");
        assert!(error.contains("the oldest step that it reaches is"), "{error}");
    }
    let error = cli(directory, &["runs", "fork", &run, "--at", "19"]).expect_err("not yet");
    assert!(error.contains("newest 18"), "{error}");
}

#[test]
fn a_backup_of_a_run_under_way_goes_on_to_the_same_weights() {
    const STEPS: u64 = 14;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (here, there) = (directory.path().join("here"), directory.path().join("there"));
    [&here, &there].into_iter().for_each(|path| std::fs::create_dir(path).expect("a directory"));
    let up = Up::start(&here, &["--trainers", "2"]);
    let training = train(&connect(&here));
    (0..3).for_each(|_| step(&training));
    let run = training.run();
    let going = thread::spawn(move || {
        (3..STEPS).for_each(|_| step(&training));
        weights(&training)
    });
    let path = there.join("data");
    let said = cli(&here, &["backup", path.to_str().expect("text")]).expect("backed up");
    assert!(said.contains("blobs and a journal of"), "{said}");
    let error = cli(&here, &["backup", path.to_str().expect("text")]).expect_err("there is one");
    assert!(error.contains("is not empty"), "{error}");
    let expected = going.join().expect("the run goes on");
    up.signal("-KILL");
    drop(up);
    wait_until_gone(&here);
    std::fs::remove_dir_all(&here).expect("the first is gone");

    let _up = Up::start(&there, &["--trainers", "1"]);
    let training = attach(&connect(&there), run);
    let done = training.policy_version_blocking().expect("its version");
    assert!((3..=STEPS).contains(&done), "{done}");
    // One that was accepted and not finished is done by now: nothing is in flight after a restart and a wait.
    let done = settled(&training);
    (done..STEPS).for_each(|_| step(&training));
    assert_eq!(weights(&training), expected);
}

/// Steps once what was accepted has ended.
fn settled(training: &TrainingClient) -> u64 {
    training.save_state("settled").result().expect("behind all that was accepted");
    training.policy_version_blocking().expect("its version")
}

#[test]
fn a_drained_node_stops_and_nothing_fails() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let _up = Up::start(directory, &["--trainers", "3", "--samplers", "3", "--nodes", "3"]);
    let service = connect(directory);
    let training = train(&service);
    (0..2).for_each(|_| step(&training));
    let shown = cli(directory, &["cluster", "drain", "node-1"]).expect("it is there");
    assert!(shown.contains("drain"), "{shown}");
    let until = Instant::now() + PATIENCE;
    while !cli(directory, &["cluster"]).expect("shown").contains("drained: it can stop") {
        assert!(Instant::now() < until, "{}", cli(directory, &["cluster"]).expect("shown"));
        thread::sleep(std::time::Duration::from_millis(50));
    }
    let on = || {
        step(&training);
        let status = block_on(service.cluster_status()).expect("status");
        status.runs[0].phase.clone()
    };
    assert_eq!(on(), "ready on 2 ranks");
    // A coordinator that starts again knows it.
    for coordinator in processes_of(directory, Some("coordinator")) {
        send_signal("-KILL", coordinator);
    }
    let until = Instant::now() + PATIENCE;
    loop {
        // The nodes come back one by one.
        match on().as_str() {
            "ready on 2 ranks" => break,
            "ready on 3 ranks" => panic!("it is drained no more"),
            _ => assert!(Instant::now() < until, "{}", on()),
        }
    }
    while !cli(directory, &["cluster"]).expect("shown").contains("drained: it can stop") {
        assert!(Instant::now() < until, "{}", cli(directory, &["cluster"]).expect("shown"));
        thread::sleep(std::time::Duration::from_millis(50));
    }
    // The operations that follow don't notice its end: no rank set is lost, and none is formed.
    let node = block_on(service.cluster_status()).expect("status").nodes;
    let node = node.iter().find(|node| node.name == "node-1").expect("it is shown");
    send_signal("-KILL", node.pid);
    (0..3).for_each(|_| assert_eq!(on(), "ready on 2 ranks"));
    assert!(!processes_of(directory, None).is_empty());
    weights(&training);

    let until = Instant::now() + PATIENCE;
    while cli(directory, &["cluster", "drain", "node-1", "--undo"]).is_err() {
        assert!(Instant::now() < until, "it does not come back");
        thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(on(), "ready on 3 ranks");
    let error = cli(directory, &["cluster", "drain", "node-9"]).expect_err("no such node");
    assert!(error.contains("node-9") && error.contains("node-0"), "{error}");
}

#[test]
fn a_node_that_joins_takes_ranks_from_the_next_operation() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let _up = Up::start(directory, &["--trainers", "1", "--nodes", "1"]);
    let service = connect(directory);
    let training = train(&service);
    step(&training);
    let data = lockstep::service::DataDirectory::open(directory.join("data")).expect("there");
    data.prepare_node("late").expect("a certificate");
    let address = std::fs::read_to_string(data.endpoint_file()).expect("an address");
    let mut late = lockstep()
        .args(["node", "--name", "late", "--trainers", "1", "--samplers", "0", "--threads", "1"])
        .args(["--coordinator", address.lines().next().expect("a line"), "--listen", "127.0.0.1:0"])
        .arg("--data-dir")
        .arg(data.path())
        .arg("--model")
        .arg(format!("{MODEL}={}", model_of(directory).display()))
        .spawn()
        .expect("it starts");
    let until = Instant::now() + PATIENCE;
    while block_on(service.cluster_status()).expect("status").nodes.len() < 2 {
        assert!(Instant::now() < until, "it does not join");
        thread::sleep(std::time::Duration::from_millis(20));
    }
    step(&training);
    let status = block_on(service.cluster_status()).expect("status");
    late.kill().and_then(|()| late.wait()).expect("it ends");
    assert_eq!(status.runs[0].phase, "ready on 2 ranks");
}

/// Prints how journal and recovery grow with a run's steps: `cargo test --test service -- --ignored --nocapture recovery`.
#[test]
#[ignore = "a measurement of minutes, not a test"]
fn recovery_and_journal_by_number_of_steps() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let _up = Up::start(directory, &["--trainers", "1"]);
    let service = connect(directory);
    let training = train(&service);
    let mut done = 0;
    for steps in [125, 500, 2_000] {
        (done..steps).for_each(|_| step(&training));
        done = steps;
        // History is tended every ten seconds, a piece at a time.
        thread::sleep(std::time::Duration::from_secs(31));
        let size =
            |name: &str| std::fs::metadata(directory.join("data").join(name)).map_or(0, |file| file.len());
        let journal = (size("journal.sqlite") + size("journal.sqlite-wal")) >> 10;
        for coordinator in processes_of(directory, Some("coordinator")) {
            send_signal("-KILL", coordinator);
        }
        let killed = Instant::now();
        block_on(service.run_info(training.run())).expect("it answers again");
        let answers = killed.elapsed();
        step(&training);
        done += 1;
        eprintln!(
            "{steps} steps: journal {journal} KiB, answers after {answers:.2?}, next step done after {:.2?}",
            killed.elapsed()
        );
    }
}

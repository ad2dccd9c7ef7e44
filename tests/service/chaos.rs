//! Processes are killed and stopped in the middle of a run, and nothing is lost: every operation
//! succeeds, every sample is served, and the final weights are those of an undisturbed run, to
//! the bit.
//!
//! A failure names its seed: `LOCKSTEP_SEED=N cargo test --test service chaos` repeats the order of
//! accidents (not their exact moments). For ten minutes, or as long as `LOCKSTEP_CHAOS_STEPS` and
//! `LOCKSTEP_CHAOS_ACCIDENTS` say: `cargo test --test service -- --ignored --nocapture long_chaos`.

use std::{
    collections::VecDeque,
    path::Path,
    process::{Command, Stdio},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use lockstep::{
    client::{LoraOptions, SamplingClient, TrainingClient},
    types::{
        AdamParams, LossFn, LossSpec, ModelInput, OperationFuture, OptimStepResponse, PolicyId, SampleFlags,
        SamplingParams,
    },
};
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::up::{MODEL, Up, connect, data, processes_of, send_signal, wait_until_gone};

/// Optimiser steps; every fourth is published.
const STEPS: usize = 40;
const PUBLISH_EVERY: usize = 4;

/// Operations that the client has sent ahead.
const AHEAD: usize = 3;

/// Longer than the 15 s after which a silent node counts as lost.
const STOPPED_FOR: Duration = Duration::from_secs(18);

/// What befalls the cluster.
#[derive(Debug, Clone, Copy)]
enum Accident {
    KillNode,
    KillTwoNodes,
    KillCoordinator,
    /// The supervisor and gateway too; a user types `lockstep up` again.
    KillEverything,
    /// Stopped and continued: not dead, but taken for it, and wrong about the time.
    StopNode,
}

const ACCIDENTS: [Accident; 5] = [
    Accident::KillNode,
    Accident::KillCoordinator,
    Accident::KillTwoNodes,
    Accident::StopNode,
    Accident::KillEverything,
];

/// Of the long run, if nobody says otherwise.
const LONG_STEPS: usize = 400;
const LONG_ACCIDENTS: usize = 40;

#[test]
fn accidents_cost_time_and_nothing_else() {
    weather(STEPS, ACCIDENTS.len());
}

#[test]
#[ignore = "takes ten minutes"]
fn a_long_chaos_costs_time_and_nothing_else() {
    weather(setting("LOCKSTEP_CHAOS_STEPS", LONG_STEPS), setting("LOCKSTEP_CHAOS_ACCIDENTS", LONG_ACCIDENTS));
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// The same run twice: undisturbed, and with so many accidents.
fn weather(steps: usize, accidents: usize) {
    let seed = setting("LOCKSTEP_SEED", 1) as u64;
    let (calm, calm_took) = run(steps, None);
    let (stormy, took) = run(steps, Some((seed, accidents)));
    assert_eq!(stormy, calm, "LOCKSTEP_SEED={seed}: other weights than without accidents");
    eprintln!(
        "{steps} steps: {calm_took:.1?} undisturbed, {took:.1?} with {accidents} accidents (seed {seed}), and both end with {}",
        calm.digest.short()
    );
}

/// Trains on three ranks on three nodes; returns the policy that it ends with.
fn run(steps: usize, storm: Option<(u64, usize)>) -> (PolicyId, Duration) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    let mut up = start(directory);
    let service = connect(directory);
    let options = LoraOptions { seed: 3, micro_batch_tokens: Some(16), ..LoraOptions::default() };
    let training = service.create_lora_training_client_blocking(MODEL, 4, options).expect("a run");

    let begun = Instant::now();
    let finished = AtomicUsize::new(0);
    let (published, policies) = mpsc::channel();
    thread::scope(|scope| {
        let sampler = scope.spawn(|| sample_all_along(policies));
        if let Some((seed, count)) = storm {
            let (up, finished) = (&mut up, &finished);
            scope.spawn(move || accidents(directory, up, seed, (steps, count), finished));
        }
        train(&training, steps, &finished, published);
        assert!(sampler.join().expect("samples are served") >= steps / PUBLISH_EVERY);
    });
    let took = begun.elapsed();

    let service = connect(directory);
    let status = futures::executor::block_on(service.cluster_status()).expect("status");
    let policy = status.runs[0].live.expect("a live policy");
    assert_eq!(policy.step, steps as u64);
    drop((training, service, up));
    wait_until_gone(directory);
    (policy, took)
}

fn start(directory: &Path) -> Up {
    Up::start(directory, &["--trainers", "3", "--samplers", "2", "--nodes", "3"])
}

/// The loop of a user who submits ahead: nothing in it knows of accidents.
fn train(training: &TrainingClient, steps: usize, finished: &AtomicUsize, published: Sender<SamplingClient>) {
    let mut ahead: VecDeque<(usize, OperationFuture<OptimStepResponse>)> = VecDeque::new();
    let settle = |ahead: &mut VecDeque<(usize, OperationFuture<_>)>, at_most: usize| {
        while ahead.len() > at_most {
            let Some((step, update)) = ahead.pop_front() else { break };
            let OptimStepResponse { .. } = update.result().expect("a step");
            finished.store(step, Ordering::Relaxed);
        }
    };
    for step in 1..=steps {
        // The passes are not waited for; a step behind a failed one would give other weights.
        drop(training.forward_backward(data(4 + step % 3, 12), LossSpec::new(LossFn::CrossEntropy)));
        let adam = AdamParams { learning_rate: 1e-2, ..AdamParams::default() };
        ahead.push_back((step, training.optim_step(adam)));
        settle(&mut ahead, AHEAD);
        if step % PUBLISH_EVERY == 0 {
            settle(&mut ahead, 0);
            let name = format!("step{step}");
            let sampling = training.save_weights_and_get_sampling_client(&name).result().expect("published");
            assert_eq!(sampling.policy_version(), Some(step as u64));
            published.send(sampling).expect("the sampler lives");
        }
    }
}

/// Samples the newest policy until there is no newer; returns how many samples it got.
fn sample_all_along(policies: Receiver<SamplingClient>) -> usize {
    let mut count = 0;
    let Ok(mut sampling) = policies.recv() else { return 0 };
    loop {
        let prompt = ModelInput::from_ints(vec![1, 40, 41, 42]);
        let params = SamplingParams { seed: Some(5), max_tokens: Some(8), ..SamplingParams::default() };
        let sample = sampling.sample(prompt, 2, params, SampleFlags::default()).result().expect("a sample");
        assert_eq!(Some(sample.policy_version), sampling.policy_version(), "it keeps to its policy");
        count += 1;
        match policies.try_recv() {
            Ok(newer) => sampling = newer,
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return count,
        }
    }
}

/// `count` accidents over the steps, each kind once before any comes again, in an order and at steps that the
/// seed chooses.
fn accidents(
    directory: &Path,
    up: &mut Up,
    seed: u64,
    (steps, count): (usize, usize),
    finished: &AtomicUsize,
) {
    let mut dice = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut left = Vec::new();
    for number in 0..count {
        if left.is_empty() {
            left = ACCIDENTS.to_vec();
        }
        let accident = left.swap_remove(dice.next_u32() as usize % left.len());
        let at = number * steps / count + dice.next_u32() as usize % (steps / count / 2).max(1);
        let moment = Duration::from_millis(u64::from(dice.next_u32() % 100));
        while finished.load(Ordering::Relaxed) < at {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(moment);
        eprintln!("after step {}: {accident:?}", finished.load(Ordering::Relaxed));
        befall(directory, up, accident, dice.next_u32() as usize);
    }
}

fn befall(directory: &Path, up: &mut Up, accident: Accident, pick: usize) {
    match accident {
        Accident::KillNode => kill(directory, "node", pick, 1),
        Accident::KillTwoNodes => kill(directory, "node", pick, 2),
        Accident::KillCoordinator => kill(directory, "coordinator", pick, 1),
        Accident::StopNode => {
            let nodes = processes_of(directory, Some("node"));
            let Some(&node) = nodes.get(pick % nodes.len().max(1)) else { return };
            send_signal("-STOP", node);
            thread::sleep(STOPPED_FOR);
            send_signal("-CONT", node);
        }
        Accident::KillEverything => {
            up.signal("-KILL");
            for process in processes_of(directory, None) {
                // It may have died with its parent in the meantime.
                let _ =
                    Command::new("kill").args(["-KILL", &process.to_string()]).stderr(Stdio::null()).status();
            }
            wait_until_gone(directory);
            *up = start(directory);
        }
    }
}

/// Kills `count` processes of a kind; those that have just died are not looked for again.
fn kill(directory: &Path, kind: &str, pick: usize, count: usize) {
    let processes = processes_of(directory, Some(kind));
    for i in 0..count.min(processes.len()) {
        send_signal("-KILL", processes[(pick + i) % processes.len()]);
    }
}

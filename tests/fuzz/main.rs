//! The fuzz targets on stable, for a bounded time: seeds that are taken, changed at random.
//!
//! libFuzzer finds more, as it sees which branches an input reaches (`Cargo.toml` beside this file); this
//! keeps the targets alive and finds what is shallow. `LOCKSTEP_FUZZ_SECONDS=600 cargo test --release
//! --test fuzz` goes on for ten minutes a target. A failure prints its input; `LOCKSTEP_FUZZ_SEED` repeats
//! an order of inputs.

mod memory;
mod mutate;
mod seeds;
mod targets;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use lockstep::protocol::MAX_MESSAGE;

use mutate::Mutator;

/// A target's share of a test run.
const SECONDS: u64 = 2;

/// Largest single allocation that any of these inputs may cause: a message's limit, with room for a
/// buffer that doubles beyond it. Inputs have some kilobytes.
const ALLOCATION_MAX: usize = 4 * MAX_MESSAGE;

/// Feeds a target with its seeds and what comes of them, until its time is up.
fn drive(name: &str, target: fn(&[u8]), seeds: Vec<Vec<u8>>) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seed = number("LOCKSTEP_FUZZ_SEED").unwrap_or(1);
    let time = Duration::from_secs(number("LOCKSTEP_FUZZ_SECONDS").unwrap_or(SECONDS));
    let mut mutator = Mutator::new(seed, seeds);
    let started = Instant::now();
    let mut inputs: u64 = 0;
    for seed in mutator.seeds().to_vec() {
        feed(name, target, &seed);
    }
    while started.elapsed() < time {
        let input = mutator.next();
        feed(name, target, &input);
        inputs += 1;
    }
    // Fewer would mean that one of them took seconds.
    assert!(inputs >= time.as_secs(), "{name}: {inputs} inputs in {time:?}");
    eprintln!("{name}: {inputs} inputs in {time:?} (LOCKSTEP_FUZZ_SEED={seed})");
}

fn feed(name: &str, target: fn(&[u8]), input: &[u8]) {
    memory::forget();
    let outcome = catch_unwind(AssertUnwindSafe(|| target(input)));
    assert!(outcome.is_ok(), "{name} panicked over {}", hex::encode(input));
    let largest = memory::largest();
    assert!(
        largest <= ALLOCATION_MAX,
        "{name} allocated {largest} bytes at once over {}",
        hex::encode(input)
    );
}

#[test]
fn messages() {
    drive("decode_message", targets::decode_message, seeds::messages());
}

#[test]
fn payloads() {
    drive("decode_payload", targets::decode_payload, seeds::payloads());
}

#[test]
fn datums() {
    drive("datum_json", targets::datum_json, seeds::datums());
}

#[test]
fn gguf_files() {
    drive("gguf", targets::gguf, seeds::gguf());
}

#[test]
fn adapters() {
    drive("adapter_files", targets::adapter_files, seeds::adapters());
}

#[test]
fn train_states() {
    drive("train_state", targets::train_state, seeds::train_states());
}

#[test]
fn tokens_and_keys() {
    drive("join", targets::join, seeds::join());
}

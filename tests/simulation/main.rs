//! The coordinator's state machine in a world of accidents: nodes die, hang and lose each other, the coordinator
//! dies with what it had not written, appends fail, streams break, time slips, clients ask twice.
//!
//! What must hold, checked all along by the parts that see it:
//!
//! - every rank's state at every commit is what the journal alone gives: no operation ran twice,
//!   none was lost, the order was kept (`node`, `journal`);
//! - a commit, an acceptance and an outcome are heard of only after they are durable
//!   (`node`, `client`);
//! - an outcome never changes, whoever asks and however often the coordinator died (`client`);
//! - what is forgotten, and swept from the store, is never missed (`journal`, `world`);
//! - a sample's version is that of its weights, pinned weights are kept, a publish is reported
//!   only when a node serves it (`client`);
//! - once the accidents end, every operation of every client ends (`main`).
//!
//! A failure names its seed: `LOCKSTEP_SEED=N cargo test --test simulation` repeats it.

mod blobs;
mod client;
mod dice;
mod journal;
mod node;
mod rank;
mod tally;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use tally::Tally;
use world::World;

/// Histories that a run of the tests goes through.
const SEEDS: u64 = 400;

#[test]
fn survives_accidents() {
    if let Ok(seed) = std::env::var("LOCKSTEP_SEED") {
        eprintln!("{:?}", live_through(seed.parse().expect("LOCKSTEP_SEED is a number")));
        return;
    }
    let mut tally = Tally::default();
    for seed in 0..SEEDS {
        match catch_unwind(AssertUnwindSafe(|| live_through(seed))) {
            Ok(happened) => tally.add(happened),
            Err(panic) => {
                eprintln!("the simulation failed with LOCKSTEP_SEED={seed}");
                resume_unwind(panic);
            }
        }
    }
    // A simulation in which nothing goes wrong shows nothing.
    let Tally { crashes, nodes_lost, stalls, appends_refused, replayed, restored, tried_again, .. } = tally;
    let rarest = [crashes, nodes_lost, stalls, appends_refused, replayed, restored, tried_again];
    let rarest = [&rarest[..], &[tally.cut_off, tally.pruned, tally.swept, tally.unpublished * 20]].concat();
    assert!(rarest.iter().all(|count| *count >= SEEDS / 2), "{tally:?}");
}

fn live_through(seed: u64) -> Tally {
    let nodes: &[(u32, u32)] = match seed % 4 {
        0 => &[(2, 1)],
        1 => &[(1, 1), (1, 1), (1, 0)],
        2 => &[(2, 0), (0, 2), (1, 1)],
        _ => &[(1, 2), (2, 1)],
    };
    let mut world = World::new(seed, nodes, 2, 40);
    let stormy_ms = 20_000 + 1_000 * (seed % 40);
    let calm_at = world.now_ms + stormy_ms;
    world.run_until(u64::MAX / 2, "the end of the storm", |world| world.now_ms >= calm_at);
    world.calm();
    world.run_until(600_000, "every operation has ended", |world| {
        world.clients.iter().all(client::ModelClient::is_done)
    });
    world.drain();
    world.run_until(60_000, "the drain has ended", |world| world.stopped);
    // Everything is as it was, and goes on.
    world.crash();
    let samples = world.clients.iter().map(|client| client.samples).sum::<usize>();
    world.run_until(60_000, "samples after a restart", |world| {
        world.clients.iter().map(|client| client.samples).sum::<usize>() > samples
    });
    world.tally.pruned = world.journal.pruned;
    world.tally.unpublished = world.journal.unpublished;
    world.tally
}

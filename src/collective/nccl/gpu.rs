//! What needs a GPU, or NVIDIA's own library; `tests/gpu/run` runs these.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{
    device::Gpu,
    failures::StartFailures,
    rounds::{IDENTIFIER, tell},
    start::{Opening, start},
    tests::{LEN, PATIENCE, as_each, bits, call, control, linked, reduce, reference, unique},
    *,
};
use crate::{
    collective::{
        Collective, CollectiveError,
        contribution::Method,
        exchange::{Exchange, Exchanged},
        shared_memory::SharedMemory,
    },
    nvidia,
    protocol::RankIndex,
};

/// Making a communicator takes seconds, the first one of a process more.
const INIT: Duration = Duration::from_secs(120);

fn on_gpu(
    control: SharedMemory,
    ordinal: u32,
    reduction: Reduction,
    patience: Duration,
) -> Result<Nccl<SharedMemory, Gpu>, CollectiveError> {
    let (me, world_size) = (control.rank(), control.world_size());
    let open = |id: &[u8]| Gpu::start(ordinal, id, me, world_size, reduction);
    let failures = &StartFailures::new();
    let opening = Opening { failures, patience, make_id: Gpu::unique_id, open };
    linked(start(control, &call(Method::AllGather, 0, PATIENCE), None, opening)?, reduction)
}

/// Sums over so many GPUs, twice, so that what the first left in memory would show.
fn sums(world_size: u32, reduction: Reduction) -> Vec<Vec<f32>> {
    let name = unique("gpus");
    as_each(world_size, |rank| {
        let nccl = on_gpu(control(&name, rank, world_size), rank, reduction, INIT).unwrap();
        let mut rank: Box<dyn Collective> = Box::new(Exchanged::new(nccl));
        reduce(&mut *rank, 1, 100, PATIENCE).unwrap();
        reduce(&mut *rank, 2, LEN, PATIENCE).unwrap()
    })
}

fn check(world_size: u32) {
    let expected = reference(world_size + 1, LEN);
    let tree = sums(world_size, Reduction::Tree);
    assert!(tree.iter().all(|sum| bits(sum) == bits(&expected)), "the bits of the CPU's tree");
    let fast = sums(world_size, Reduction::Fast);
    assert!(fast.iter().all(|sum| bits(sum) == bits(&fast[0])), "the same on each rank");
    for (sum, expected) in fast[0].iter().zip(&expected) {
        // As many roundings to 2^-24 as there are ranks, all addends being positive.
        assert!((sum - expected).abs() <= expected * 1e-6, "{sum} for {expected}");
    }
}

#[test]
#[ignore = "needs a GPU: tests/gpu/run"]
fn one_gpu_adds_up_as_the_cpu_does() {
    check(1);
}

#[test]
#[ignore = "needs two GPUs: tests/gpu/run"]
fn several_gpus_add_up_as_the_cpu_does() {
    let gpus = nvidia::gpus().unwrap().len() as u32;
    assert!(gpus >= 2, "{gpus} GPU");
    (2..=gpus).for_each(check);
}

#[test]
#[ignore = "needs a GPU: tests/gpu/run"]
fn a_peer_that_does_not_come_ends_at_the_deadline() {
    let name = unique("peer");
    let patience = Duration::from_secs(5);
    let errors = as_each(2, |rank| {
        let mut control = control(&name, rank, 2);
        if rank == 0 {
            let begun = Instant::now();
            let error = on_gpu(control, 0, Reduction::Tree, patience).err();
            assert!(begun.elapsed() < patience + Duration::from_secs(25), "{:?}", begun.elapsed());
            return error;
        }
        // It hears the identifier, and is gone when rank 0 has waited for NCCL and aborted.
        let (call, nothing) = (call(Method::AllGather, 0, PATIENCE), Ok::<Vec<u8>, ()>(Vec::new()));
        tell(&mut control, &call, IDENTIFIER, &nothing).unwrap();
        thread::sleep(patience + Duration::from_secs(10));
        None
    });
    let error = errors[0].as_ref().unwrap();
    assert!(matches!(error, CollectiveError::Lost { missing: RankIndex(1), .. }), "{error}");
}

/// The real library, where its folder is in LD_LIBRARY_PATH; no GPU is needed.
#[test]
#[ignore = "needs NCCL: tests/gpu/run"]
fn the_library_makes_identifiers_and_explains_its_errors() {
    nvidia::NCCL_LIBRARY.find().unwrap();
    let id = Gpu::unique_id().unwrap();
    assert!(id.len() == 128 && id != Gpu::unique_id().unwrap());
    // The driver refuses before NCCL is asked, on a machine that has none.
    if nvidia::gpus().is_err() {
        let error = Gpu::start(0, &id, RankIndex(0), 1, Reduction::Tree).err().unwrap();
        assert!(error.to_string().starts_with("cuDevicePrimaryCtxRetain"), "{error}");
    }
}

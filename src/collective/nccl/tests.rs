//! What is special about NCCL, with threads for ranks; the room's own tests run over it too.

mod start;

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{
    agree::{NcclOffer, Offer, choose},
    failures::StartFailures,
    host::{self, Host, Trouble},
    start::{Opening, Started, start},
    *,
};
use crate::{
    collective::{
        Collective, CollectiveError, JoinError, Partial, TreeAccumulator,
        contribution::{Call, Header, Method},
        exchange::{Exchange, Exchanged},
        reduce_tree,
        shared_memory::{Places, SharedMemory},
    },
    protocol::{Epoch, Generation, OpToken, OperationSeq, RankIndex},
    types::RunId,
};

/// For what must happen, on a machine that is busy with other things.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// For what must not.
const SHORT: Duration = Duration::from_millis(300);

pub(super) fn call(method: Method, seq: u64, patience: Duration) -> Call {
    let (epoch, generation) = (Epoch(2), Generation(3));
    let token = OpToken { run: RunId(7), epoch, generation, seq: OperationSeq(seq), incarnation: 1 };
    Call { method, token, deadline: Instant::now() + patience }
}

pub(super) fn control(name: &str, rank: u32, world_size: u32) -> SharedMemory {
    let deadline = Instant::now() + PATIENCE;
    SharedMemory::join(Places::of_this_host(), name, RankIndex(rank), world_size, deadline).unwrap()
}

/// A rank whose GPU is a vector of this process.
fn over_host(
    control: SharedMemory,
    reduction: Reduction,
    trouble: Trouble,
) -> Result<Nccl<SharedMemory, Host>, CollectiveError> {
    let (me, world_size) = (control.rank(), control.world_size());
    let open = |id: &[u8]| {
        let mut link = Host::start(id, me, world_size)?;
        link.trouble = trouble;
        Ok(link)
    };
    let failures = &StartFailures::new();
    let opening = Opening { failures, patience: PATIENCE, make_id: host::unique_id, open };
    linked(start(control, &call(Method::AllGather, 0, PATIENCE), None, opening)?, reduction)
}

/// What has started, and panics if it has not.
pub(super) fn linked<C: Exchange, L: Link>(
    started: Started<C, L>,
    reduction: Reduction,
) -> Result<Nccl<C, L>, CollectiveError> {
    match started {
        Started::Linked(control, link) => Ok(Nccl::new(control, link, reduction)),
        Started::Refused(_, refusal) => panic!("{refusal}"),
    }
}

/// A rank of the set of this name, which no other set has, over shared memory and the link of vectors: what two
/// GPUs are to a trainer.
pub(crate) fn over_host_link(
    name: &str,
    rank: u32,
    world_size: u32,
    reduction: Reduction,
) -> Box<dyn Collective> {
    let control = control(name, rank, world_size);
    Box::new(Exchanged::new(over_host(control, reduction, Trouble::None).unwrap()))
}

pub(super) fn unique(what: &str) -> String {
    format!("nccl{}{what}{:?}", std::process::id(), thread::current().id())
}

/// Runs `body` as each rank at once.
pub(super) fn as_each<T: Send>(world_size: u32, body: impl Fn(u32) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let body = &body;
        let ranks: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || body(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn leaf(i: u32, len: usize) -> Vec<f32> {
    (0..len as u32)
        .map(|j| ((i * 31 + j * 17) % 97) as f32 * 10f32.powi((i * 7 + j) as i32 % 9 - 4))
        .collect()
}

/// Leaf r at rank r, summed up; the last rank has another one.
pub(super) fn reduce(
    rank: &mut dyn Collective,
    seq: u64,
    len: usize,
    patience: Duration,
) -> Result<Vec<f32>, CollectiveError> {
    let (me, world_size) = (rank.rank().0, rank.world_size());
    let mut sums = TreeAccumulator::new(me, len);
    sums.push(leaf(me, len));
    if me + 1 == world_size {
        sums.push(leaf(world_size, len));
    }
    let call = call(Method::AllReduce, seq, patience);
    let mut out = vec![f32::NAN; len];
    let leaves = world_size + 1;
    rank.all_reduce(call.token, leaves, sums.finish(leaves), &mut out, call.deadline).map(|()| out)
}

pub(super) fn reference(leaves: u32, len: usize) -> Vec<f32> {
    let all: Vec<_> =
        (0..leaves).map(|index| Partial { level: 0, index, values: leaf(index, len) }).collect();
    reduce_tree(leaves, len, &all).unwrap()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Several pieces, of which the last is short, and more than the pinned memory holds.
pub(super) const LEN: usize = 50_001;

#[test]
fn the_tree_has_its_bits_and_the_fast_sum_is_near() {
    for world_size in 1..=4 {
        let (tree, fast) = (unique("tree"), unique("fast"));
        let expected = reference(world_size + 1, LEN);
        for (name, reduction) in [(tree, Reduction::Tree), (fast, Reduction::Fast)] {
            let sums = as_each(world_size, |rank| {
                let control = control(&name, rank, world_size);
                let mut rank = Exchanged::new(over_host(control, reduction, Trouble::None).unwrap());
                // Three of one collective, the second longer: what the first left in memory shows.
                reduce(&mut rank, 1, 100, PATIENCE).unwrap();
                reduce(&mut rank, 2, LEN, PATIENCE).unwrap();
                reduce(&mut rank, 3, LEN, PATIENCE).unwrap()
            });
            assert!(sums.iter().all(|sum| bits(sum) == bits(&sums[0])), "the same on each rank");
            if reduction == Reduction::Tree {
                assert!(bits(&sums[0]) == bits(&expected), "{world_size} ranks");
            }
            for (i, (sum, expected)) in sums[0].iter().zip(&expected).enumerate() {
                // At most five addends, each sum rounded to 2^-24 of it; all addends are positive.
                assert!((sum - expected).abs() <= expected * 1e-6, "{i}: {sum} for {expected}");
            }
        }
    }
}

/// Ranks that offer this, each summing up once; whether they went through the link.
fn meet_and_reduce(what: &str, offers: &[Offer]) -> Vec<Result<bool, JoinError>> {
    let name = unique(what);
    let world_size = offers.len() as u32;
    let met = as_each(world_size, |rank| {
        let control = control(&name, rank, world_size);
        let (call, mut linked) = (call(Method::AllGather, 0, PATIENCE), false);
        let over_link = |control, _| -> Result<Box<dyn Collective>, JoinError> {
            linked = true;
            Ok(Box::new(Exchanged::new(over_host(control, Reduction::Tree, Trouble::None).unwrap())))
        };
        let mut rank = choose(control, &call, (&offers[rank as usize], false), over_link)?;
        Ok((linked, reduce(&mut *rank, 1, LEN, PATIENCE).unwrap()))
    });
    let expected = reference(world_size + 1, LEN);
    let check = |(linked, sum): (bool, Vec<f32>)| {
        assert!(bits(&sum) == bits(&expected), "{what}: the tree's bits, whatever carries them");
        linked
    };
    met.into_iter().map(|met| met.map(check)).collect()
}

#[test]
fn ranks_with_a_gpu_each_take_the_link_and_others_go_through_the_host() {
    let gpu = |uuid: &str| Offer::Nccl(NcclOffer { uuid: uuid.into(), version: 22809, fast: false });
    let without = Offer::Without("no library".into());
    for (what, offers, linked) in [
        ("each", [gpu("a"), gpu("b"), gpu("c")], true),
        ("shared", [gpu("a"), gpu("b"), gpu("a")], false),
        ("library", [gpu("a"), without, gpu("b")], false),
        ("mixed", [Offer::Host, gpu("a"), gpu("b")], false),
        ("host", [Offer::Host, Offer::Host, Offer::Host], false),
    ] {
        assert_eq!(meet_and_reduce(what, &offers), [Ok(linked), Ok(linked), Ok(linked)], "{what}");
    }
    let fast = Offer::Nccl(NcclOffer { uuid: "b".into(), version: 22809, fast: true });
    for met in meet_and_reduce("reduce", &[gpu("a"), fast]) {
        assert!(
            matches!(&met, Err(JoinError::System { problem }) if problem.contains("--reduce")),
            "{met:?}"
        );
    }
}

#[test]
fn a_reduction_is_read_as_it_is_written() {
    for reduction in [Reduction::Tree, Reduction::Fast] {
        assert_eq!(reduction.to_string().parse(), Ok(reduction));
    }
    assert!("tree".parse::<Reduction>().is_err());
}

#[test]
fn a_gpu_that_gets_stuck_ends_at_the_deadline_and_blames_nobody_who_is_there() {
    let name = unique("stuck");
    let errors = as_each(2, |rank| {
        let trouble = if rank == 1 { Trouble::Stuck } else { Trouble::None };
        let mut rank = Exchanged::new(over_host(control(&name, rank, 2), Reduction::Tree, trouble).unwrap());
        let error = reduce(&mut rank, 1, LEN, SHORT).unwrap_err();
        (error, reduce(&mut rank, 2, LEN, PATIENCE).unwrap_err())
    });
    for (error, after) in errors {
        assert_eq!(error.missing(), None, "{error}");
        assert!(error.to_string().contains("every rank is there"), "{error}");
        assert!(matches!(after, CollectiveError::UsedUp { .. }), "{after}");
    }
}

#[test]
fn what_nccl_refuses_is_said_in_its_words() {
    let name = unique("refused");
    let errors = as_each(2, |rank| {
        let control = control(&name, rank, 2);
        let mut nccl = over_host(control, Reduction::Tree, Trouble::None).unwrap();
        if rank == 1 {
            nccl.link().trouble = Trouble::Refused;
        }
        reduce(&mut Exchanged::new(nccl), 1, LEN, SHORT).unwrap_err()
    });
    assert!(errors[1].to_string().contains("unhandled cuda error"), "{}", errors[1]);
    // It waits for contributions that never come, and hears that rank 1 is still there, or has given up.
    assert!(
        matches!(
            errors[0],
            CollectiveError::System { .. } | CollectiveError::Lost { missing: RankIndex(1), .. }
        ),
        "{}",
        errors[0]
    );
}

#[test]
fn a_rank_that_goes_in_the_middle_of_a_sum_is_named() {
    let name = unique("gone");
    let errors = as_each(2, |rank| {
        let control = control(&name, rank, 2);
        let mut nccl = over_host(control, Reduction::Tree, Trouble::None).unwrap();
        if rank == 0 {
            return Some(reduce(&mut Exchanged::new(nccl), 1, LEN, SHORT).unwrap_err());
        }
        // It says that it takes part, and is gone.
        let call = call(Method::AllReduce, 1, PATIENCE);
        let (token, nodes) = (call.token, vec![(0, 1), (1, 1)]);
        let header = Header { method: call.method, round: 1, token, leaves: 3, len: LEN as u64, nodes };
        nccl.meet(&call, &header).unwrap();
        None
    });
    let error = errors[0].as_ref().unwrap();
    assert!(matches!(error, CollectiveError::Lost { missing: RankIndex(1), .. }), "{error}");
}

#[test]
fn an_abort_breaks_a_sum_in_progress() {
    let name = unique("abort");
    let begun = Instant::now();
    let errors = as_each(2, |rank| {
        let trouble = if rank == 0 { Trouble::Stuck } else { Trouble::None };
        let nccl = over_host(control(&name, rank, 2), Reduction::Tree, trouble).unwrap();
        let mut rank = Exchanged::new(nccl);
        let abort = rank.abort_handle();
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(SHORT);
                abort();
            });
            reduce(&mut rank, 1, LEN, PATIENCE).unwrap_err()
        })
    });
    assert!(begun.elapsed() < PATIENCE);
    assert!(errors.iter().all(|error| matches!(error, CollectiveError::Aborted { .. })), "{errors:?}");
}

//! Communicators that don't start: what the ranks come to, all of them the same.

use std::sync::{
    Weak,
    atomic::{AtomicU32, Ordering},
};

use super::*;
use crate::collective::{
    GpuSeat,
    nccl::{
        agree::over_link,
        link::Fault,
        rounds::{IDENTIFIER, tell},
    },
};

const RANKS: u32 = 3;

const TREE: GpuSeat = GpuSeat { ordinal: 0, reduction: Reduction::Tree, required: false };

/// How the start goes on a rank.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Going {
    Well,
    /// Its call of NCCL fails.
    Refused,
    /// The same, a look later.
    RefusedLater,
    /// Its communicator waits for others, which are behind a firewall.
    Alone,
    /// It can't make an identifier.
    Nameless,
}

/// Each rank's process: what it remembers.
fn fresh() -> [StartFailures; RANKS as usize] {
    Default::default()
}

fn gpus() -> Vec<String> {
    ["a", "b", "c"].map(str::to_owned).to_vec()
}

/// Meets once, and sums up over whatever came of it. Of each rank, whether that was its link; and how many links were
/// begun in all.
fn meet(
    memories: &[StartFailures; RANKS as usize],
    seat: GpuSeat,
    going: [Going; RANKS as usize],
) -> (Vec<Result<bool, JoinError>>, u32) {
    static MEETINGS: AtomicU32 = AtomicU32::new(0);
    let name = unique(&format!("start{}", MEETINGS.fetch_add(1, Ordering::Relaxed)));
    let begun = AtomicU32::new(0);
    let all_well = going.iter().all(|going| *going == Going::Well);
    let expected = reference(RANKS + 1, LEN);
    let met = as_each(RANKS, |rank| {
        let (control, call) = (control(&name, rank, RANKS), call(Method::AllGather, 0, PATIENCE));
        let (going, mut link) = (going[rank as usize], Weak::new());
        let make_id = || match going {
            Going::Nameless => Err(Fault::new("ncclGetUniqueId", "no socket interface found")),
            _ => host::unique_id(),
        };
        let open = |id: &[u8]| {
            begun.fetch_add(1, Ordering::Relaxed);
            if going == Going::Refused {
                return Err(Fault::new("ncclCommInitRankConfig", "unhandled system error"));
            }
            let id = if going == Going::Alone { &host::unique_id()? } else { id };
            let mut host = Host::start(id, RankIndex(rank), RANKS)?;
            if going == Going::RefusedLater {
                host.trouble = Trouble::Refused;
            }
            link = host.presence();
            Ok(host)
        };
        let patience = if all_well { PATIENCE } else { SHORT };
        let opening = Opening { failures: &memories[rank as usize], patience, make_id, open };
        let mut rank = over_link(control, &call, seat, &gpus(), opening)?;
        let sum = reduce(&mut *rank, 1, LEN, PATIENCE).unwrap();
        assert!(seat.reduction == Reduction::Fast || bits(&sum) == bits(&expected), "{going:?}");
        Ok(link.upgrade().is_some())
    });
    (met, begun.into_inner())
}

fn remembered(memories: &[StartFailures; RANKS as usize]) -> Vec<Option<String>> {
    memories.iter().map(|memory| memory.recall(&gpus(), Instant::now())).collect()
}

const LINK: [Result<bool, JoinError>; RANKS as usize] = [Ok(true), Ok(true), Ok(true)];
const HOST: [Result<bool, JoinError>; RANKS as usize] = [Ok(false), Ok(false), Ok(false)];

#[test]
fn one_rank_that_nccl_refuses_takes_all_to_the_host_and_they_stay_there() {
    use Going::{Alone, Nameless, Refused, RefusedLater, Well};
    assert_eq!(meet(&fresh(), TREE, [Well; 3]), (LINK.into(), 3));
    for (going, why, begun) in [
        ([Well, Refused, Well], "rank 1: ncclCommInitRankConfig: unhandled system error", 3),
        ([Well, Well, RefusedLater], "rank 2: ncclCommGetAsyncError: unhandled cuda error", 3),
        ([Nameless, Well, Well], "rank 0: ncclGetUniqueId: no socket interface found", 0),
        // All wait for one, which waits for all.
        ([Well, Well, Alone], "rank 0: ncclCommInitRankConfig: no communicator within 300ms", 3),
    ] {
        let mut memories = fresh();
        assert_eq!(meet(&memories, TREE, going), (HOST.into(), begun), "{going:?}");
        for known in remembered(&memories) {
            assert!(known.as_ref().is_some_and(|known| known.contains(why)), "{known:?}, not {why}");
        }
        // What was in the way is gone, and nobody looks: the next meeting costs nothing.
        assert_eq!(meet(&memories, TREE, [Well; 3]), (HOST.into(), 0), "{going:?}");
        // Nor when processes start again that remember nothing, as long as one remembers; which it does not
        // learn to do anew from the others.
        (memories[0], memories[1]) = (StartFailures::new(), StartFailures::new());
        assert_eq!(meet(&memories, TREE, [Well; 3]), (HOST.into(), 0), "{going:?}");
        assert_eq!(remembered(&memories)[..2], [None, None], "{going:?}");
        memories[2] = StartFailures::new();
        assert_eq!(meet(&memories, TREE, [Well; 3]), (LINK.into(), 3), "{going:?}");
    }
}

/// Another sum is no replacement for NCCL's, and neither is anything for a measurement of NCCL.
#[test]
fn what_only_nccl_can_do_is_refused_on_every_rank_and_tried_again() {
    let fast = GpuSeat { reduction: Reduction::Fast, ..TREE };
    let measured = GpuSeat { required: true, ..TREE };
    for (seat, says) in [(fast, "`--reduce fast`"), (measured, "NCCL_DEBUG=INFO")] {
        let memories = fresh();
        let (met, _) = meet(&memories, seat, [Going::Well, Going::Refused, Going::Well]);
        for refused in &met {
            let Err(JoinError::NoNccl { reason }) = refused else { panic!("{refused:?}") };
            assert!(reason.starts_with("rank 1: ncclCommInitRankConfig: unhandled system error"), "{reason}");
            assert!(reason.contains(says), "{reason}");
        }
        assert_eq!(remembered(&memories), [None, None, None]);
        assert_eq!(meet(&memories, seat, [Going::Well; 3]), (LINK.into(), 3));
    }
    let name = unique("required");
    for refused in as_each(2, |rank| {
        let (control, call) = (control(&name, rank, 2), call(Method::AllGather, 0, PATIENCE));
        choose(control, &call, (&Offer::Host, true), |_, _| panic!("no GPU")).err()
    }) {
        assert_eq!(refused, Some(JoinError::NoNccl { reason: "rank 0 has no GPU".into() }));
    }
}

/// That a rank is gone is no failure of NCCL's: it is named, and the GPUs are not left alone for it.
#[test]
fn a_rank_that_goes_before_its_communicator_is_there_is_named() {
    let (name, memory) = (unique("init"), StartFailures::new());
    let errors = as_each(2, |rank| {
        let (mut control, call) = (control(&name, rank, 2), call(Method::AllGather, 0, PATIENCE));
        if rank == 1 {
            // It hears the identifier and does nothing with it, for longer than rank 0 waits for NCCL.
            let nothing: Result<Vec<u8>, ()> = Ok(Vec::new());
            tell(&mut control, &call, IDENTIFIER, &nothing).unwrap();
            thread::sleep(2 * SHORT);
            return None;
        }
        let open = |id: &[u8]| Host::start(id, RankIndex(0), 2);
        let opening = Opening { failures: &memory, patience: SHORT, make_id: host::unique_id, open };
        over_link(control, &call, TREE, &gpus(), opening).err()
    });
    assert!(matches!(errors[0], Some(JoinError::Lost { missing: RankIndex(1), .. })), "{errors:?}");
    assert_eq!(memory.recall(&gpus(), Instant::now()), None);
}

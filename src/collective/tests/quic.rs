//! What is special about QUIC.

use std::sync::Arc;

use super::*;
use crate::collective::quic::Quic;

#[test]
fn a_stream_may_come_before_its_rank_or_after() {
    let runtime = runtime();
    let network = MemoryNetwork::default();
    let (a, b) = ("a", "b");
    let (a, b) = [a, b].map(|n| Endpoint::memory(&network, Role::Node, n).unwrap()).into();
    let inboxes: [CollectiveInbox; 2] = Default::default();
    for (endpoint, inbox) in [&a, &b].into_iter().zip(&inboxes) {
        runtime.spawn(serve(endpoint.clone(), inbox.clone()));
    }
    let addresses = [a.local_address(), b.local_address()];
    let roster = Arc::new(roster(&["x", "y"], &addresses));
    for late in [0, 1] {
        let key =
            move |from, to| StreamKey { run: RUN, epoch: Epoch(1), generation: Generation(late), from, to };
        let joined = thread::scope(|scope| {
            let joining = [&a, &b].into_iter().zip(&inboxes).zip(0..).map(|((endpoint, inbox), me)| {
                let (roster, handle) = (roster.clone(), runtime.handle().clone());
                scope.spawn(move || {
                    if me == late {
                        thread::sleep(Duration::from_millis(50));
                    }
                    Quic::join(&roster, RankIndex(me), key, endpoint, inbox, handle, soon())
                        .map(Exchanged::new)
                })
            });
            joining.collect::<Vec<_>>().into_iter().map(|j| j.join().unwrap().unwrap()).collect::<Vec<_>>()
        });
        let mut ranks: Vec<Box<dyn Collective>> = joined.into_iter().map(|j| Box::new(j) as _).collect();
        on_each(&mut ranks, |rank| operation(rank, 1, &[1, 2, 3], 100));
    }
}

/// More pieces than may be under way, on ranks that each hear from two others: that one of these is ahead is
/// no fault of its own.
#[test]
fn long_vectors_pass_in_many_pieces() {
    // 67 pieces a slice, the last one short.
    let len = 3 * 66 * (64 << 10) + 999;
    let costs = [1, 1, 1];
    let Ranks { mut ranks, _runtime } = meet(Carrier::Quic, 3);
    let expected = reference(3, len);
    for seq in 1..=3 {
        for (_, sum) in on_each(&mut ranks, |rank| operation(rank, seq, &costs, len)) {
            assert!(sum == expected, "operation {seq}");
        }
    }
}

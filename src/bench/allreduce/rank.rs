//! One process of an all-reduce.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::{
    bench::{
        BenchError,
        figures::Span,
        worker::{PATIENCE, Parent},
    },
    collective::{self, Collective, CollectiveInbox, GpuSeat, Partial, RankSet, Reduction, StreamKey},
    protocol::{
        Epoch, Generation, MAX_MESSAGE, NodeId, OpToken, OperationSeq, RankIndex, RankSeat, StreamOpen,
        decode,
    },
    transport::{Connection, Endpoint},
    types::{Digest, RunId},
};

/// First line that a rank is told: who the others are.
#[derive(Serialize, Deserialize)]
pub(super) struct Setup {
    pub me: u32,
    pub seats: Vec<Seat>,
    /// How the ranks' GPUs add up, each rank's being the one of its number; `None`: no GPU has a part.
    pub reduction: Option<Reduction>,
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Seat {
    pub host: String,
    pub address: String,
}

/// Every later one.
#[derive(Serialize, Deserialize)]
pub(super) struct Work {
    /// Values of the vector.
    pub len: usize,
    pub repeats: u32,
}

/// What a rank answers to [`Work`].
#[derive(Serialize, Deserialize)]
pub(super) struct Measured {
    pub spans: Vec<Span>,
    /// Of the sum.
    pub digest: String,
}

const RUN: RunId = RunId(1);

/// A rank's side of it all.
pub(in crate::bench) fn serve_rank(
    parent: &mut Parent,
    endpoint: Endpoint,
    runtime: &Runtime,
) -> Result<(), BenchError> {
    let Some(setup) = parent.hear()? else { return Ok(()) };
    let mut rank = meet(&setup, &endpoint, runtime).map_err(|e| parent.failed(e))?;
    parent.tell(&())?;
    let mut seq = 0;
    while let Some(work) = parent.hear::<Work>()? {
        let measured = measure(&mut *rank, &work, &mut seq).map_err(|e| parent.failed(e))?;
        parent.tell(&measured)?;
    }
    Ok(())
}

fn meet(
    setup: &Setup,
    endpoint: &Endpoint,
    runtime: &Runtime,
) -> Result<Box<dyn Collective>, collective::JoinError> {
    let inbox = CollectiveInbox::default();
    runtime.spawn(accept(endpoint.clone(), inbox.clone()));
    let seat = |(i, seat): (usize, &Seat)| RankSeat {
        rank: RankIndex(i as u32),
        node: NodeId(i as u32),
        slot: 0,
        host: seat.host.clone(),
        address: seat.address.clone(),
    };
    let roster: Vec<RankSeat> = setup.seats.iter().enumerate().map(seat).collect();
    let set = RankSet {
        cluster: endpoint.cluster(),
        run: RUN,
        epoch: Epoch(1),
        generation: Generation(1),
        roster: &roster,
        me: RankIndex(setup.me),
        gpu: setup.reduction.map(|reduction| GpuSeat { ordinal: setup.me, reduction, required: true }),
    };
    collective::join(set, endpoint, &inbox, runtime.handle().clone(), Instant::now() + PATIENCE)
}

/// Gives the streams of other ranks to this one.
async fn accept(endpoint: Endpoint, inbox: CollectiveInbox) {
    while let Some(connection) = endpoint.accept().await {
        tokio::spawn(take_streams(connection, inbox.clone()));
    }
}

async fn take_streams(connection: Connection, inbox: CollectiveInbox) {
    while let Ok(mut stream) = connection.accept_stream().await {
        let Ok(Some(frame)) = stream.recv.recv_frame(MAX_MESSAGE).await else { continue };
        if let Ok(StreamOpen::Collective { run, epoch, generation, from, to }) =
            decode("opening of a stream", &frame, MAX_MESSAGE)
        {
            inbox.deliver(StreamKey { run, epoch, generation, from, to }, stream);
        }
    }
}

/// One all-reduce that is not counted, then `work.repeats` that are.
fn measure(
    rank: &mut dyn Collective,
    work: &Work,
    seq: &mut u64,
) -> Result<Measured, collective::CollectiveError> {
    let (me, leaves) = (rank.rank().0, rank.world_size());
    let mut out = vec![0.0; work.len];
    let mut spans = Vec::new();
    for repeat in 0..=work.repeats {
        *seq += 1;
        let token = OpToken {
            run: RUN,
            epoch: Epoch(1),
            generation: Generation(1),
            seq: OperationSeq(*seq),
            incarnation: 1,
        };
        // Sizes far apart, so that another order of additions would show.
        let value = |i: usize| ((me as usize * 31 + i * 17) % 97) as f32 * [1e-3, 1.0, 1e3][i % 3];
        let partials = vec![Partial { level: 0, index: me, values: (0..work.len).map(value).collect() }];
        rank.all_gather(token, Vec::new(), Instant::now() + PATIENCE)?;
        let deadline = Instant::now() + PATIENCE;
        let (span, done) = Span::of(|| rank.all_reduce(token, leaves, partials, &mut out, deadline));
        done?;
        if repeat > 0 {
            spans.push(span);
        }
    }
    let bytes: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
    Ok(Measured { spans, digest: Digest::of(&bytes).to_string() })
}

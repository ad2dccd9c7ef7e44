//! Ranks on several hosts: one stream for each pair of ranks, opened by the lower one.
//!
//! ```text
//!   rank i ──StreamOpen::Collective──► rank j > i            once, at the start
//!   then, both ways, for each call:
//!     frame: header │ raw: slice j of each of my partial sums      (an all-reduce)
//!                     raw: my slice of the sum
//!     frame: header │ raw: my bytes                                (an all-gather)
//! ```
//!
//! A rank sends to all and receives from all at the same time, so none waits for one that waits
//! for it.

use std::time::Instant;

use futures::future::{join_all, try_join, try_join_all};
use tokio::{runtime::Handle, sync::watch, time::timeout_at};

use super::{
    CollectiveError, CollectiveInbox, JoinError, Partial, StreamKey,
    contribution::{Call, Header, MAX_HEADER},
    exchange::{Contribution, Exchange, Values, as_bytes, as_bytes_mut, slice_of},
};
use crate::{
    protocol::{RankIndex, RankSeat, encode},
    transport::{Connection, Endpoint, RecvHalf, Role, SendHalf, Stream, TransportError},
};

/// One rank's side.
pub(super) struct Quic {
    rank: RankIndex,
    world_size: u32,
    runtime: Handle,
    peers: Vec<Peer>,
    /// Those that this rank made. They outlast their streams, so that a reset gets through.
    _connections: Vec<Connection>,
    aborted: watch::Sender<bool>,
}

/// The stream to one other rank.
struct Peer {
    rank: RankIndex,
    send: SendHalf,
    recv: RecvHalf,
}

impl Quic {
    /// Opens the streams to higher ranks and fetches those of lower ones. Blocks; `runtime` is the
    /// one on which `endpoint` lives.
    pub(super) fn join(
        roster: &[RankSeat],
        me: RankIndex,
        key_of: impl Fn(RankIndex, RankIndex) -> StreamKey,
        endpoint: &Endpoint,
        inbox: &CollectiveInbox,
        runtime: Handle,
        deadline: Instant,
    ) -> Result<Self, JoinError> {
        let others = roster.iter().filter(|seat| seat.rank != me);
        let joining = others.map(|seat| {
            let key = key_of(me.min(seat.rank), me.max(seat.rank));
            async move {
                let meeting = async {
                    match me < seat.rank {
                        true => open(endpoint, seat, key, deadline).await.map_err(|e| e.to_string()),
                        false => {
                            let fetched = inbox.fetch(key).await.map(|stream| (stream, None));
                            fetched.ok_or_else(|| "this rank joined twice".to_owned())
                        }
                    }
                };
                match timeout_at(deadline.into(), meeting).await {
                    Ok(Ok((Stream { send, recv }, connection))) => {
                        Ok((Peer { rank: seat.rank, send, recv }, connection))
                    }
                    Ok(Err(reason)) => Err(JoinError::Lost { missing: seat.rank, reason }),
                    Err(_) => Err(JoinError::Deadline { missing: seat.rank }),
                }
            }
        });
        // All of them, then the first error: a rank that is there should not be called missing
        // because this one gave up on another.
        let met = runtime.block_on(join_all(joining));
        let met = met.into_iter().collect::<Result<Vec<_>, JoinError>>()?;
        let (mut peers, connections): (Vec<Peer>, Vec<Option<Connection>>) = met.into_iter().unzip();
        peers.sort_by_key(|peer| peer.rank);
        let world_size = roster.len() as u32;
        let _connections = connections.into_iter().flatten().collect();
        Ok(Self { rank: me, world_size, runtime, peers, _connections, aborted: watch::Sender::new(false) })
    }

    /// Talks with every other rank at once; ends with the first error, at the deadline or when
    /// called off.
    fn with_each<'a, T>(
        &'a mut self,
        call: &Call,
        talk: impl AsyncFn(&mut Peer) -> Result<T, CollectiveError> + 'a,
    ) -> Result<Vec<T>, CollectiveError> {
        let (mut aborted, deadline) = (self.aborted.subscribe(), call.deadline.into());
        let talks = self.peers.iter_mut().map(async |peer| {
            let missing = peer.rank;
            timeout_at(deadline, talk(peer)).await.unwrap_or_else(|_| Err(call.timed_out(missing)))
        });
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                // Fails only without a sender, and `self` holds it.
                _ = aborted.wait_for(|aborted| *aborted) => Err(call.aborted()),
                result = try_join_all(talks) => result,
            }
        })
    }
}

/// Connects to a seat and says what the stream is for.
async fn open(
    endpoint: &Endpoint,
    seat: &RankSeat,
    key: StreamKey,
    deadline: Instant,
) -> Result<(Stream, Option<Connection>), TransportError> {
    let patience = deadline.saturating_duration_since(Instant::now());
    let connection = endpoint.connect(&seat.address, Role::Node, patience).await?;
    let mut stream = connection.open_stream().await?;
    stream.send.send_frame(&encode(&key.stream_open())).await?;
    Ok((stream, Some(connection)))
}

impl Peer {
    /// Sends my part of a call and receives theirs.
    async fn exchange<T>(
        &mut self,
        call: &Call,
        send: impl AsyncFnOnce(&mut SendHalf) -> Result<(), TransportError>,
        receive: impl AsyncFnOnce(&mut RecvHalf, RankIndex) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        let Self { rank, send: to, recv: from } = self;
        let sending = async {
            match send(to).await {
                Err(TransportError::Stopped) => Ok(false),
                sent => sent.map(|()| true).map_err(|e| lost(call, *rank, e)),
            }
        };
        let (taken, received) = try_join(sending, receive(&mut *from, *rank)).await?;
        if !taken {
            // It has given up after its own part: what comes behind that says because of whom.
            let why = from.recv_chunk(1).await.err().unwrap_or(TransportError::Stopped);
            return Err(lost(call, *rank, why));
        }
        Ok(received)
    }
}

impl Exchange for Quic {
    fn rank(&self) -> RankIndex {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn is_aborted(&self) -> bool {
        *self.aborted.borrow()
    }

    fn abort_handle(&self) -> Box<dyn Fn() + Send + Sync> {
        let aborted = self.aborted.clone();
        Box::new(move || {
            aborted.send_replace(true);
        })
    }

    fn scatter(
        &mut self,
        call: &Call,
        header: &Header,
        partials: &[Partial],
    ) -> Result<Vec<Contribution>, CollectiveError> {
        let (rank, world_size) = (self.rank, self.world_size);
        let head = &header.to_bytes().map_err(|e| call.mismatch(rank, e))?;
        let len = header.len as usize;
        let mine = slice_of(len, world_size, rank);
        let (call, width) = (*call, mine.len());
        self.with_each(&call, async |peer| {
            let theirs = slice_of(len, world_size, peer.rank);
            let send = async |to: &mut SendHalf| {
                to.send_frame(head).await?;
                for partial in partials {
                    to.send_bytes(as_bytes(&partial.values[theirs.clone()])).await?;
                }
                Ok(())
            };
            let receive = async |from: &mut RecvHalf, rank| {
                let nodes = receive_header(&call, header, from, rank).await?.nodes;
                let mut slices = Vec::with_capacity(nodes.len());
                for _ in &nodes {
                    let mut slice = vec![0.0; width];
                    receive_values(&call, from, rank, &mut slice).await?;
                    slices.push(slice);
                }
                Ok(Contribution { rank, nodes, values: Values::Held(slices) })
            };
            peer.exchange(&call, send, receive).await
        })
    }

    fn share(&mut self, call: &Call, out: &mut [f32]) -> Result<(), CollectiveError> {
        let (len, world_size, call) = (out.len(), self.world_size, *call);
        let mine = out[slice_of(len, world_size, self.rank)].to_vec();
        let received = self.with_each(&call, async |peer| {
            let send = async |to: &mut SendHalf| to.send_bytes(as_bytes(&mine)).await;
            let receive = async |from: &mut RecvHalf, rank| {
                let mut slice = vec![0.0; slice_of(len, world_size, rank).len()];
                receive_values(&call, from, rank, &mut slice).await?;
                Ok((rank, slice))
            };
            peer.exchange(&call, send, receive).await
        })?;
        for (rank, slice) in received {
            out[slice_of(len, world_size, rank)].copy_from_slice(&slice);
        }
        Ok(())
    }

    fn gather(
        &mut self,
        call: &Call,
        header: &Header,
        bytes: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let (rank, call) = (self.rank, *call);
        let head = &header.to_bytes().map_err(|e| call.mismatch(rank, e))?;
        let mine = &bytes;
        let mut gathered = self.with_each(&call, async |peer| {
            let send = async |to: &mut SendHalf| {
                to.send_frame(head).await?;
                to.send_bytes(mine).await
            };
            let receive = async |from: &mut RecvHalf, rank| {
                let len = receive_header(&call, header, from, rank).await?.len;
                from.recv_bytes(len).await.map_err(|e| lost(&call, rank, e))
            };
            peer.exchange(&call, send, receive).await
        })?;
        gathered.insert(rank.0 as usize, bytes);
        Ok(gathered)
    }

    fn break_off(&mut self, missing: Option<RankIndex>) {
        for peer in self.peers.drain(..) {
            // Otherwise dropping it says that it is this rank's own fault.
            if let Some(missing) = missing {
                peer.send.reset(MISSING_CODE + missing.0);
            }
        }
    }
}

/// A stream that is reset with this code plus N is given up because of rank N. (0: because of its
/// own rank.)
const MISSING_CODE: u32 = 1 << 16;

/// Why the stream to `rank` broke: for itself, or because it misses another.
fn lost(call: &Call, rank: RankIndex, error: TransportError) -> CollectiveError {
    match error {
        TransportError::Reset { code } if code >= MISSING_CODE => {
            let missing = RankIndex(code - MISSING_CODE);
            call.lost(missing, format!("rank {} says so", rank.0))
        }
        error => call.lost(rank, error),
    }
}

async fn receive_header(
    call: &Call,
    mine: &Header,
    from: &mut RecvHalf,
    rank: RankIndex,
) -> Result<Header, CollectiveError> {
    let bytes = match from.recv_frame(MAX_HEADER).await {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Err(call.lost(rank, "it has left the rank set")),
        Err(e) => return Err(lost(call, rank, e)),
    };
    let header = Header::from_bytes(&bytes).map_err(|e| call.mismatch(rank, e))?;
    mine.check_fits(&header).map_err(|e| call.mismatch(rank, e))?;
    Ok(header)
}

/// Fills `values`, as they arrive.
async fn receive_values(
    call: &Call,
    from: &mut RecvHalf,
    rank: RankIndex,
    values: &mut [f32],
) -> Result<(), CollectiveError> {
    let mut rest = as_bytes_mut(values);
    while !rest.is_empty() {
        let chunk = match from.recv_chunk(rest.len()).await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return Err(call.lost(rank, "its stream ended in the middle of a call")),
            Err(e) => return Err(lost(call, rank, e)),
        };
        let (filled, after) = rest.split_at_mut(chunk.len());
        filled.copy_from_slice(&chunk);
        rest = after;
    }
    Ok(())
}

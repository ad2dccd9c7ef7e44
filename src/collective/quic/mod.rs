//! Ranks on several hosts: one stream for each pair of ranks, opened by the lower one.
//!
//! ```text
//!   rank i ──StreamOpen::Collective──► rank j > i            once, at the start
//!   then, both ways, for each call:
//!     frame: header │ pieces of partial sums and of the sum        (an all-reduce: `reduce`)
//!     frame: header │ raw: my bytes                                (an all-gather)
//! ```
//!
//! A rank sends to all and receives from all at the same time, so none waits for one that waits
//! for it.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures::future::{Future, join_all, try_join, try_join_all};
use tokio::{runtime::Handle, sync::watch, time::timeout_at};

use super::{
    CollectiveError, CollectiveInbox, JoinError, Partial, StreamKey,
    contribution::{Call, Header, MAX_HEADER},
    exchange::{Exchange, as_bytes_mut},
};
use crate::{
    protocol::{RankIndex, RankSeat, encode},
    transport::{Connection, Endpoint, RecvHalf, Role, SendHalf, Stream, TransportError},
};

mod reduce;

/// How long another rank's node may take to take a connection: as long as it may be silent towards the
/// coordinator. It takes them as soon as it runs, whatever its ranks are still loading.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

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
        let aborted = self.aborted.subscribe();
        // The first that has not ended, when time is up.
        let waiting: RefCell<BTreeSet<RankIndex>> = RefCell::new(self.peers.iter().map(|p| p.rank).collect());
        let talks = self.peers.iter_mut().map(async |peer| {
            let rank = peer.rank;
            let said = talk(peer).await?;
            waiting.borrow_mut().remove(&rank);
            Ok(said)
        });
        let missing = || waiting.borrow().first().copied().unwrap_or(RankIndex(0));
        until(&self.runtime, aborted, call, try_join_all(talks), missing)
    }
}

/// Runs the talks of a call; ends at the deadline, for which `missing` then names a rank, or when called
/// off.
fn until<T>(
    runtime: &Handle,
    mut aborted: watch::Receiver<bool>,
    call: &Call,
    talks: impl Future<Output = Result<T, CollectiveError>>,
    missing: impl FnOnce() -> RankIndex,
) -> Result<T, CollectiveError> {
    runtime.block_on(async {
        tokio::select! {
            biased;
            // Fails only without a sender, and the rank holds it.
            _ = aborted.wait_for(|aborted| *aborted) => Err(call.aborted()),
            done = timeout_at(call.deadline.into(), talks) => {
                done.unwrap_or_else(|_| Err(call.timed_out(missing())))
            }
        }
    })
}

/// Connects to a seat and says what the stream is for.
async fn open(
    endpoint: &Endpoint,
    seat: &RankSeat,
    key: StreamKey,
    deadline: Instant,
) -> Result<(Stream, Option<Connection>), TransportError> {
    let patience = deadline.saturating_duration_since(Instant::now()).min(CONNECT_DEADLINE);
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

    fn meet(&mut self, call: &Call, header: &Header) -> Result<Vec<Vec<(u32, u32)>>, CollectiveError> {
        let (rank, call) = (self.rank, *call);
        let head = &header.to_bytes().map_err(|e| call.mismatch(rank, e))?;
        let mut nodes = self.with_each(&call, async |peer| {
            let send = async |to: &mut SendHalf| to.send_frame(head).await;
            let receive =
                async |from: &mut RecvHalf, rank| Ok(receive_header(&call, header, from, rank).await?.nodes);
            peer.exchange(&call, send, receive).await
        })?;
        nodes.insert(rank.0 as usize, header.nodes.clone());
        Ok(nodes)
    }

    fn reduce(
        &mut self,
        call: &Call,
        header: &Header,
        partials: Vec<Partial>,
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.reduce_in_pieces(call, header, partials, out)
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

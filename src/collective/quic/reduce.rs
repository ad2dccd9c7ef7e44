//! An all-reduce over streams: every pair of ranks talks both ways at once, and each piece of the sum goes
//! out as soon as it is added up.
//!
//! ```text
//!   to rank j, in any order of kinds, each kind in order of pieces:
//!     frame: 0, piece │ raw: a piece of slice j of each of my partial sums
//!     frame: 1, piece │ raw: a piece of my slice of the sum
//! ```
//!
//! A piece of the sum of slice j says that rank j has used up my piece of it, so I am at most `CREDIT`
//! pieces ahead of what came back, and rank j holds no more of mine than that.

use std::{cell::RefCell, collections::VecDeque, convert::Infallible, ops::Range, sync::Arc};

use bytes::Bytes;
use futures::future::try_join_all;
use tokio::sync::Notify;

use super::{Peer, Quic, lost, receive_header, receive_values, until};
use crate::{
    collective::{
        CollectiveError, Partial,
        contribution::{Call, Header},
        exchange::{Pieces, Sum, as_bytes, slice_of},
        plan::Read,
    },
    protocol::RankIndex,
    transport::{RecvHalf, SendHalf, TransportError},
};

/// Values of a piece: 256 KiB, two hundred packets, so that what is said and done once a piece costs nothing.
const WIDTH: usize = 64 << 10;

/// Pieces under way to one rank: as many as the stream's window takes, so that neither waits for the other.
const CREDIT: usize = 32;

/// The frame before a piece.
const TAG: usize = 8;

const CONTRIBUTION: u32 = 0;
const SUM: u32 = 1;

/// What the talks with each peer share; they all run on the calling thread.
struct Reduction<'a> {
    me: RankIndex,
    /// The others, in order.
    others: Vec<RankIndex>,
    call: &'a Call,
    header: &'a Header,
    pieces: Pieces,
    /// My partial sums, whole: as values, and as bytes that are sent without a copy.
    own: Vec<(Values, Bytes)>,
    board: RefCell<Board<'a>>,
    /// A piece more is added up, or has come back.
    changed: Notify,
}

/// How far it has got.
struct Board<'a> {
    /// Of each other rank, once its header has come.
    nodes: Vec<Option<Vec<(u32, u32)>>>,
    /// Made when all of them have.
    sum: Option<Sum>,
    /// Contributions of each other rank that are not added up yet: those of pieces `sums.len()..`.
    arrived: Vec<VecDeque<Vec<f32>>>,
    /// Buffers of contributions, to be used again.
    spare: Vec<Vec<f32>>,
    mine: &'a mut [f32],
    /// Pieces of my slice, added up.
    sums: Vec<Bytes>,
    /// Pieces of each other rank's slice that have come.
    returned: Vec<usize>,
}

/// A vector that is read here while quinn sends it.
#[derive(Clone)]
struct Values(Arc<Vec<f32>>);

impl AsRef<[u8]> for Values {
    fn as_ref(&self) -> &[u8] {
        as_bytes(&self.0)
    }
}

impl Quic {
    /// See the module.
    pub(super) fn reduce_in_pieces(
        &mut self,
        call: &Call,
        header: &Header,
        partials: Vec<Partial>,
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let head = header.to_bytes().map_err(|e| call.mismatch(self.rank, e))?;
        let pieces = Pieces { len: out.len(), world_size: self.world_size, width: WIDTH };
        let others: Vec<RankIndex> = self.peers.iter().map(|peer| peer.rank).collect();
        let (mine, slices) = split(out, self.world_size, self.rank);
        let all = Reduction {
            me: self.rank,
            call,
            header,
            pieces,
            own: partials.into_iter().map(|partial| share(partial.values)).collect(),
            board: RefCell::new(Board::new(others.len(), mine)),
            others,
            changed: Notify::new(),
        };
        let talks = self.peers.iter_mut().zip(slices).enumerate();
        let talks = talks.map(|(other, (peer, slice))| all.talk(other, peer, slice, &head));
        until(&self.runtime, self.aborted.subscribe(), call, try_join_all(talks), || all.missing()).map(drop)
    }
}

impl<'a> Board<'a> {
    fn new(others: usize, mine: &'a mut [f32]) -> Self {
        Self {
            nodes: vec![None; others],
            sum: None,
            arrived: vec![VecDeque::new(); others],
            spare: Vec::new(),
            mine,
            sums: Vec::new(),
            returned: vec![0; others],
        }
    }
}

impl Reduction<'_> {
    async fn talk(
        &self,
        other: usize,
        peer: &mut Peer,
        slice: &mut [f32],
        head: &[u8],
    ) -> Result<(), CollectiveError> {
        let send = async |to: &mut SendHalf| self.send(other, to, head).await;
        let receive = async |from: &mut RecvHalf, _| self.receive(other, from, slice).await;
        peer.exchange(self.call, send, receive).await
    }

    /// Pieces of the sum first: another rank may wait for them to get on.
    async fn send(&self, other: usize, to: &mut SendHalf, head: &[u8]) -> Result<(), TransportError> {
        to.send_frame(head).await?;
        let rank = self.others[other];
        let (all_contributions, all_sums) = (self.pieces.count(rank), self.pieces.count(self.me));
        let (mut contributions, mut sums) = (0, 0);
        while contributions < all_contributions || sums < all_sums {
            let (sum, returned) = {
                let board = self.board.borrow();
                (board.sums.get(sums).cloned(), board.returned[other])
            };
            if let Some(sum) = sum {
                to.send_frame(&tag(SUM, sums)).await?;
                to.send_shared(sum).await?;
                sums += 1;
            } else if contributions < all_contributions.min(returned + CREDIT) {
                to.send_frame(&tag(CONTRIBUTION, contributions)).await?;
                let values = self.pieces.of(rank, contributions);
                for (_, bytes) in &self.own {
                    let size = size_of::<f32>();
                    to.send_shared(bytes.slice(values.start * size..values.end * size)).await?;
                }
                contributions += 1;
            } else {
                // Nothing has happened since the board was read: all this runs on one thread.
                self.changed.notified().await;
            }
        }
        Ok(())
    }

    async fn receive(
        &self,
        other: usize,
        from: &mut RecvHalf,
        slice: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let (call, rank) = (self.call, self.others[other]);
        let nodes = receive_header(call, self.header, from, rank).await?.nodes;
        let partials = nodes.len();
        self.meet(other, nodes)?;
        let (all_contributions, all_sums) = (self.pieces.count(self.me), self.pieces.count(rank));
        let (mut contributions, mut sums) = (0, 0);
        while contributions < all_contributions || sums < all_sums {
            let tag = receive_tag(call, from, rank).await?;
            // Looked at behind the waiting: meanwhile a third rank's piece may have had some added up.
            let held = self.board.borrow().arrived[other].len();
            match tag {
                (CONTRIBUTION, piece)
                    if piece == contributions && piece < all_contributions && held < CREDIT =>
                {
                    let mut values = self.board.borrow_mut().spare.pop().unwrap_or_default();
                    values.resize(partials * self.pieces.of(self.me, piece).len(), 0.0);
                    receive_values(call, from, rank, &mut values).await?;
                    self.board.borrow_mut().arrived[other].push_back(values);
                    contributions += 1;
                    self.add_up();
                }
                (SUM, piece) if piece == sums && piece < all_sums => {
                    let (values, first) = (self.pieces.of(rank, piece), self.pieces.of(rank, 0).start);
                    let values = values.start - first..values.end - first;
                    receive_values(call, from, rank, &mut slice[values]).await?;
                    sums += 1;
                    self.board.borrow_mut().returned[other] = sums;
                    self.changed.notify_waiters();
                }
                (kind, piece) => {
                    let place = format!("{contributions} contributions ({held} held) and {sums} sums");
                    let problem = format!("piece {piece} of kind {kind} is out of turn after {place}");
                    return Err(call.mismatch(rank, problem));
                }
            }
        }
        Ok(())
    }

    /// Another rank's header is there; the last one makes the sum.
    fn meet(&self, other: usize, nodes: Vec<(u32, u32)>) -> Result<(), CollectiveError> {
        let mut board = self.board.borrow_mut();
        board.nodes[other] = Some(nodes);
        let nodes: Option<Vec<_>> = board.nodes.iter().map(Option::as_deref).collect();
        let Some(nodes) = nodes else { return Ok(()) };
        board.sum = Some(Sum::new(self.call, self.header, &nodes)?);
        drop(board);
        self.add_up();
        Ok(())
    }

    /// Adds up every piece of which all contributions are there.
    fn add_up(&self) {
        let mut board = self.board.borrow_mut();
        let Board { sum: Some(sum), arrived, spare, mine, sums, .. } = &mut *board else { return };
        let before = sums.len();
        while sums.len() < self.pieces.count(self.me) && arrived.iter().all(|pieces| !pieces.is_empty()) {
            let range = self.pieces.of(self.me, sums.len());
            let (first, width) = (self.pieces.of(self.me, 0).start, range.len());
            let out = &mut mine[range.start - first..range.end - first];
            let own = |k: usize| &self.own[k].0.0[range.clone()];
            let read = |other: usize, k: usize, block: Range<usize>, _: &mut [f32]| {
                let values: &[f32] = &arrived[other][0][k * width..][..width];
                Ok::<_, Infallible>(Read::Here(&values[block]))
            };
            let Ok(()) = sum.run(own, read, out);
            sums.push(Bytes::copy_from_slice(as_bytes(out)));
            spare.extend(arrived.iter_mut().filter_map(VecDeque::pop_front));
        }
        if sums.len() > before {
            self.changed.notify_waiters();
        }
    }

    /// Whom this call waits for, when it has waited too long: one that has not said what it has, or not
    /// given its part; else one whose sum has not come.
    fn missing(&self) -> RankIndex {
        let board = self.board.borrow();
        let lacks_mine = board.sums.len() < self.pieces.count(self.me);
        let silent = |other: &usize| board.nodes[*other].is_none();
        let behind = |other: &usize| lacks_mine && board.arrived[*other].is_empty();
        let unfinished = |other: &usize| board.returned[*other] < self.pieces.count(self.others[*other]);
        let others = || 0..self.others.len();
        let found = others().find(silent).or_else(|| others().find(behind));
        // Nothing is missing but that they take what is sent: any of them.
        self.others[found.or_else(|| others().find(unfinished)).unwrap_or(0)]
    }
}

fn share(values: Vec<f32>) -> (Values, Bytes) {
    let values = Values(Arc::new(values));
    (values.clone(), Bytes::from_owner(values))
}

/// A rank's own slice, and those of the others in order.
fn split(out: &mut [f32], world_size: u32, me: RankIndex) -> (&mut [f32], Vec<&mut [f32]>) {
    let len = out.len();
    let (mut mine, mut others, mut rest) = (&mut [][..], Vec::new(), out);
    for rank in (0..world_size).map(RankIndex) {
        let (slice, after) = rest.split_at_mut(slice_of(len, world_size, rank).len());
        rest = after;
        if rank == me {
            mine = slice;
        } else {
            others.push(slice);
        }
    }
    (mine, others)
}

fn tag(kind: u32, piece: usize) -> [u8; TAG] {
    (u64::from(kind) << 32 | piece as u64).to_le_bytes()
}

async fn receive_tag(
    call: &Call,
    from: &mut RecvHalf,
    rank: RankIndex,
) -> Result<(u32, usize), CollectiveError> {
    let frame = match from.recv_frame(TAG).await {
        Ok(Some(frame)) => frame,
        Ok(None) => return Err(call.lost(rank, "its stream ended in the middle of a call")),
        Err(e) => return Err(lost(call, rank, e)),
    };
    let bytes: [u8; TAG] =
        frame[..].try_into().map_err(|_| call.mismatch(rank, "a piece without a number"))?;
    let word = u64::from_le_bytes(bytes);
    Ok(((word >> 32) as u32, word as u32 as usize))
}

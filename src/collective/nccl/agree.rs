//! What the ranks of a set tell each other before they choose what carries their gradients: each comes to
//! the same choice from the same offers.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

#[cfg(feature = "nccl")]
use super::device::Gpu;
#[cfg(any(test, feature = "nccl"))]
use super::{Fault, Link, Nccl, Reduction};
use crate::{
    collective::{
        Collective, CollectiveError, GpuSeat, JoinError, RankSet,
        contribution::{Call, Header, Method},
        exchange::{Exchange, Exchanged},
    },
    protocol::{OpToken, OperationSeq},
};

/// What a rank can do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Offer {
    /// Its numbers are in the host's memory.
    Host,
    /// They are on a GPU, and its program can't speak NCCL for this reason.
    Without(String),
    Nccl(NcclOffer),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct NcclOffer {
    /// Of the GPU: NCCL takes one rank for each.
    pub uuid: String,
    /// Of the library, as it counts: 22809 is 2.28.9. Two releases don't talk to each other.
    pub version: u32,
    pub fast: bool,
}

/// Numbers of the calls before a collective's first, which is 1: no other has them.
const OFFERS: u64 = 0;
#[cfg(any(test, feature = "nccl"))]
const IDENTIFIER: u64 = u64::MAX - 1;

/// Makes the collective of ranks that have met over `control`: through NCCL if each has a GPU of its own and
/// the same NCCL, else through `control` itself.
pub(in crate::collective) fn join<C: Exchange + 'static>(
    control: C,
    set: &RankSet<'_>,
    deadline: std::time::Instant,
) -> Result<Box<dyn Collective>, JoinError> {
    let (epoch, generation, seq) = (set.epoch, set.generation, OperationSeq(0));
    let token = OpToken { run: set.run, epoch, generation, seq, incarnation: 0 };
    let call = Call { method: Method::AllGather, token, deadline };
    let mine = match set.gpu.map(offer) {
        None => Offer::Host,
        Some(Ok(nccl)) => Offer::Nccl(nccl),
        Some(Err(why)) => Offer::Without(why),
    };
    choose(control, &call, &mine, |control| over_nccl(control, set, &call))
}

/// Hears what the other ranks offer, and makes what all of them can do: with `over_nccl`, or over `control`.
pub(super) fn choose<C: Exchange + 'static>(
    mut control: C,
    call: &Call,
    mine: &Offer,
    over_nccl: impl FnOnce(C) -> Result<Box<dyn Collective>, JoinError>,
) -> Result<Box<dyn Collective>, JoinError> {
    let offers = tell(&mut control, call, mine).map_err(not_met)?;
    let Some(reason) = decide(&offers)? else { return over_nccl(control) };
    if *mine != Offer::Host {
        tracing::info!(run = %call.token.run, %reason, "gradients go through the host, not NCCL");
    }
    Ok(Box::new(Exchanged::new(control)))
}

#[cfg(feature = "nccl")]
fn offer(seat: GpuSeat) -> Result<NcclOffer, String> {
    let (uuid, version) = Gpu::offer(seat.ordinal)?;
    Ok(NcclOffer { uuid, version, fast: seat.reduction == Reduction::Fast })
}

#[cfg(not(feature = "nccl"))]
fn offer(_: GpuSeat) -> Result<NcclOffer, String> {
    Err("its program was built without the feature `nccl`".into())
}

#[cfg(feature = "nccl")]
fn over_nccl<C: Exchange + 'static>(
    control: C,
    set: &RankSet<'_>,
    call: &Call,
) -> Result<Box<dyn Collective>, JoinError> {
    let Some(GpuSeat { ordinal, reduction }) = set.gpu else {
        return Err(JoinError::System { problem: "a rank without a GPU was taken for one with".into() });
    };
    let (me, world_size) = (control.rank(), control.world_size());
    let start = |id: &[u8]| Gpu::start(ordinal, id, me, world_size, reduction);
    let nccl = connect(control, reduction, call, Gpu::unique_id, start).map_err(not_met)?;
    tracing::info!(run = %set.run, ?reduction, "gradients go through NCCL");
    Ok(Box::new(Exchanged::new(nccl)))
}

/// Without the feature this rank offers nothing, so no set agrees on it.
#[cfg(not(feature = "nccl"))]
fn over_nccl<C: Exchange + 'static>(
    _: C,
    _: &RankSet<'_>,
    _: &Call,
) -> Result<Box<dyn Collective>, JoinError> {
    Err(JoinError::System { problem: "the ranks chose NCCL, which this program can't speak".into() })
}

/// Makes the ranks' communicators meet under an identifier that rank 0 makes. It goes from rank to rank over
/// `control`, which is this generation's and, between hosts, mutually authenticated.
#[cfg(any(test, feature = "nccl"))]
pub(super) fn connect<C: Exchange, L: Link>(
    mut control: C,
    reduction: Reduction,
    call: &Call,
    make_id: impl FnOnce() -> Result<Vec<u8>, Fault>,
    start: impl FnOnce(&[u8]) -> Result<L, Fault>,
) -> Result<Nccl<C, L>, CollectiveError> {
    let mine = match control.rank().0 {
        0 => make_id().map_err(|fault| call.system(fault))?,
        _ => Vec::new(),
    };
    let ids = gather(&mut control, call, IDENTIFIER, mine)?;
    let link = start(&ids[0]).map_err(|fault| call.system(fault))?;
    Nccl::new(control, link, reduction, call)
}

/// `Some`: why not through NCCL.
fn decide(offers: &[Offer]) -> Result<Option<String>, JoinError> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut first: Option<&NcclOffer> = None;
    for (rank, offer) in offers.iter().enumerate() {
        let offer = match offer {
            Offer::Host => return Ok(Some(format!("rank {rank} has no GPU"))),
            Offer::Without(why) => return Ok(Some(format!("rank {rank} has no NCCL: {why}"))),
            Offer::Nccl(offer) => offer,
        };
        if let Some(other) = seen.insert(&offer.uuid, rank) {
            return Ok(Some(format!("ranks {other} and {rank} share a GPU")));
        }
        let first = *first.get_or_insert(offer);
        if first.version != offer.version {
            return Ok(Some(format!("rank {rank} has NCCL {}, rank 0 has {}", offer.version, first.version)));
        }
        if first.fast != offer.fast {
            let problem = format!("rank {rank} was started with another --reduce than rank 0");
            return Err(JoinError::System { problem });
        }
    }
    Ok(None)
}

fn tell<C: Exchange>(control: &mut C, call: &Call, offer: &Offer) -> Result<Vec<Offer>, CollectiveError> {
    let bytes = serde_json::to_vec(offer).map_err(|e| call.system(e))?;
    let told = gather(control, call, OFFERS, bytes)?;
    let read = |(rank, bytes): (usize, Vec<u8>)| {
        let rank = crate::protocol::RankIndex(rank as u32);
        serde_json::from_slice(&bytes).map_err(|e| call.mismatch(rank, e))
    };
    told.into_iter().enumerate().map(read).collect()
}

fn gather<C: Exchange>(
    control: &mut C,
    call: &Call,
    round: u64,
    bytes: Vec<u8>,
) -> Result<Vec<Vec<u8>>, CollectiveError> {
    let (token, len) = (call.token, bytes.len() as u64);
    let header = Header { method: call.method, round, token, leaves: 0, len, nodes: Vec::new() };
    let gathered = control.gather(call, &header, bytes);
    if let Err(error) = &gathered {
        control.break_off(error.missing());
    }
    gathered
}

fn not_met(error: CollectiveError) -> JoinError {
    match error {
        CollectiveError::Deadline { missing, .. } => JoinError::Deadline { missing },
        CollectiveError::Lost { missing, reason, .. } => JoinError::Lost { missing, reason },
        other => JoinError::System { problem: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(uuid: &str, version: u32, fast: bool) -> Offer {
        Offer::Nccl(NcclOffer { uuid: uuid.into(), version, fast })
    }

    #[test]
    fn a_gpu_each_and_the_same_nccl() {
        let why_not = |offers: &[Offer]| decide(offers).unwrap();
        assert_eq!(why_not(&[with("a", 22809, false), with("b", 22809, false)]), None);
        assert_eq!(why_not(&[with("a", 22809, false), Offer::Host]).as_deref(), Some("rank 1 has no GPU"));
        let without = Offer::Without("libnccl.so.2 is not here".into());
        let reason = why_not(&[without, with("a", 22809, false)]);
        assert_eq!(reason.as_deref(), Some("rank 0 has no NCCL: libnccl.so.2 is not here"));
        let shared = why_not(&[with("a", 22809, false), with("b", 22809, false), with("a", 22809, false)]);
        assert_eq!(shared.as_deref(), Some("ranks 0 and 2 share a GPU"));
        assert!(why_not(&[with("a", 22809, false), with("b", 22900, false)]).unwrap().contains("22900"));
        // Weights would come to depend on who is where: refused, not worked around.
        let error = decide(&[with("a", 22809, false), with("b", 22809, true)]).unwrap_err();
        assert!(error.to_string().contains("--reduce"), "{error}");
    }
}

//! What the ranks of a set tell each other before they choose what carries their gradients: each comes to
//! the same choice from the same offers.

use std::collections::HashMap;
#[cfg(any(test, feature = "nccl"))]
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::rounds::{OFFERS, tell};

#[cfg(any(test, feature = "nccl"))]
use super::{
    Fault, Link, Nccl, Reduction,
    failures::RETRY_AFTER,
    start::{Cause, Opening, Refusal, Started, start},
};
#[cfg(feature = "nccl")]
use super::{device::Gpu, failures::StartFailures, start::START_PATIENCE};
use crate::{
    collective::{
        Collective, CollectiveError, GpuSeat, JoinError, RankSet,
        contribution::{Call, Method},
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

/// What the ranks can do together.
#[derive(Debug, PartialEq)]
enum Choice {
    /// For this reason.
    Host(String),
    /// With these GPUs, by rank.
    Nccl(Vec<String>),
}

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
    let required = set.gpu.is_some_and(|seat| seat.required);
    choose(control, &call, (&mine, required), |control, gpus| over_nccl(control, set, &call, &gpus))
}

/// Hears what the other ranks offer, and makes what all of them can do: with `over_nccl`, which gets their GPUs by rank,
/// or over `control`, if that is not refused (`required`).
pub(super) fn choose<C: Exchange + 'static>(
    mut control: C,
    call: &Call,
    (mine, required): (&Offer, bool),
    over_nccl: impl FnOnce(C, Vec<String>) -> Result<Box<dyn Collective>, JoinError>,
) -> Result<Box<dyn Collective>, JoinError> {
    let offers = tell(&mut control, call, OFFERS, mine).map_err(not_met)?;
    match decide(&offers)? {
        Choice::Nccl(gpus) => over_nccl(control, gpus),
        Choice::Host(reason) if required => Err(JoinError::NoNccl { reason }),
        Choice::Host(reason) => {
            let run = call.token.run;
            match mine {
                Offer::Host => {}
                Offer::Nccl(NcclOffer { fast: true, .. }) => tracing::warn!(
                    %run,
                    %reason,
                    "gradients go through the host, not NCCL, whose own sum `--reduce fast` asks for"
                ),
                _ => tracing::info!(%run, %reason, "gradients go through the host, not NCCL"),
            }
            Ok(Box::new(Exchanged::new(control)))
        }
    }
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
    gpus: &[String],
) -> Result<Box<dyn Collective>, JoinError> {
    static FAILURES: StartFailures = StartFailures::new();
    let Some(seat) = set.gpu else {
        return Err(JoinError::System { problem: "a rank without a GPU was taken for one with".into() });
    };
    let (me, world_size) = (control.rank(), control.world_size());
    let open = |id: &[u8]| Gpu::start(seat.ordinal, id, me, world_size, seat.reduction);
    let opening = Opening { failures: &FAILURES, patience: START_PATIENCE, make_id: Gpu::unique_id, open };
    over_link(control, call, seat, gpus, opening)
}

/// Without the feature this rank offers nothing, so no set agrees on it.
#[cfg(not(feature = "nccl"))]
fn over_nccl<C: Exchange + 'static>(
    _: C,
    _: &RankSet<'_>,
    _: &Call,
    _: &[String],
) -> Result<Box<dyn Collective>, JoinError> {
    Err(JoinError::System { problem: "the ranks chose NCCL, which this program can't speak".into() })
}

/// Through links, if one starts on every rank. If not, over `control`, where the tree of micro-batches leaves the same
/// bits; NCCL's own sum has no others to go to.
#[cfg(any(test, feature = "nccl"))]
pub(super) fn over_link<C: Exchange + 'static, L: Link + 'static>(
    control: C,
    call: &Call,
    seat: GpuSeat,
    gpus: &[String],
    opening: Opening<'_, impl FnOnce() -> Result<Vec<u8>, Fault>, impl FnOnce(&[u8]) -> Result<L, Fault>>,
) -> Result<Box<dyn Collective>, JoinError> {
    let (run, reduction, failures) = (call.token.run, seat.reduction, opening.failures);
    let only_nccl = seat.required || reduction == Reduction::Fast;
    // Whoever can't go through the host tries every time.
    let remembered = failures.recall(gpus, Instant::now()).filter(|_| !only_nccl);
    let (control, refusal) = match start(control, call, remembered, opening).map_err(not_met)? {
        Started::Linked(control, link) => {
            tracing::info!(%run, ?reduction, "gradients go through NCCL");
            return Ok(Box::new(Exchanged::new(Nccl::new(control, link, reduction))));
        }
        Started::Refused(control, refusal) => (control, refusal),
    };
    if only_nccl {
        return Err(JoinError::NoNccl { reason: why_only_nccl(&refusal, reduction) });
    }
    if refusal.cause == Cause::Remembered {
        tracing::info!(%run, reason = %refusal, "gradients go through the host, not NCCL");
    } else {
        failures.remember(gpus, refusal.to_string(), Instant::now());
        tracing::warn!(
            %run,
            "NCCL did not start, so gradients go through the host, with the same bits: {refusal}. {MORE_ABOUT_IT}. \
             Ranks that meet {} minutes from now try again, and any once all these nodes were started anew",
            RETRY_AFTER.as_secs() / 60
        );
    }
    Ok(Box::new(Exchanged::new(control)))
}

/// What helps, beside NCCL's own words.
#[cfg(any(test, feature = "nccl"))]
const MORE_ABOUT_IT: &str = "NCCL_DEBUG=INFO in the nodes' environment makes NCCL say more, NCCL_SOCKET_IFNAME tells it the \
                             network interface between hosts";

#[cfg(any(test, feature = "nccl"))]
fn why_only_nccl(refusal: &Refusal, reduction: Reduction) -> String {
    match reduction {
        Reduction::Fast => format!(
            "{refusal}. `--reduce fast` is NCCL's own sum, which nothing else adds up: {MORE_ABOUT_IT}; nodes that are \
             started with `--reduce deterministic` go through the host where NCCL does not start"
        ),
        Reduction::Tree => format!("{refusal}. {MORE_ABOUT_IT}"),
    }
}

fn decide(offers: &[Offer]) -> Result<Choice, JoinError> {
    let host = |reason| Ok(Choice::Host(reason));
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut first: Option<&NcclOffer> = None;
    let mut gpus = Vec::new();
    for (rank, offer) in offers.iter().enumerate() {
        let offer = match offer {
            Offer::Host => return host(format!("rank {rank} has no GPU")),
            Offer::Without(why) => return host(format!("rank {rank} has no NCCL: {why}")),
            Offer::Nccl(offer) => offer,
        };
        if let Some(other) = seen.insert(&offer.uuid, rank) {
            return host(format!("ranks {other} and {rank} share a GPU"));
        }
        let first = *first.get_or_insert(offer);
        if first.version != offer.version {
            return host(format!("rank {rank} has NCCL {}, rank 0 has {}", offer.version, first.version));
        }
        if first.fast != offer.fast {
            let problem = format!("rank {rank} was started with another --reduce than rank 0");
            return Err(JoinError::System { problem });
        }
        gpus.push(offer.uuid.clone());
    }
    Ok(Choice::Nccl(gpus))
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
        let both = Choice::Nccl(vec!["a".into(), "b".into()]);
        assert_eq!(decide(&[with("a", 22809, false), with("b", 22809, false)]), Ok(both));
        let why_not = |offers: &[Offer]| match decide(offers) {
            Ok(Choice::Host(reason)) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(why_not(&[with("a", 22809, false), Offer::Host]), "rank 1 has no GPU");
        let without = Offer::Without("libnccl.so.2 is not here".into());
        let reason = why_not(&[without, with("a", 22809, false)]);
        assert_eq!(reason, "rank 0 has no NCCL: libnccl.so.2 is not here");
        let shared = why_not(&[with("a", 22809, false), with("b", 22809, false), with("a", 22809, false)]);
        assert_eq!(shared, "ranks 0 and 2 share a GPU");
        assert!(why_not(&[with("a", 22809, false), with("b", 22900, false)]).contains("22900"));
        // Weights would come to depend on who is where: refused, not worked around.
        let error = decide(&[with("a", 22809, false), with("b", 22809, true)]).unwrap_err();
        assert!(error.to_string().contains("--reduce"), "{error}");
    }
}

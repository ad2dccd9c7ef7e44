//! What ranks tell each other over control before they add anything up, each round under a number that no other call has.

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    collective::{
        CollectiveError,
        contribution::{Call, Header},
        exchange::Exchange,
    },
    protocol::RankIndex,
};

/// The first call of all: a collective's own count from 1.
pub(super) const OFFERS: u64 = 0;
#[cfg(any(test, feature = "nccl"))]
pub(super) const IDENTIFIER: u64 = u64::MAX - 1;
#[cfg(any(test, feature = "nccl"))]
pub(super) const VERDICT: u64 = u64::MAX - 2;

/// Says something to every rank, and hears it of each: by rank, my own too. `round` is of no other call.
pub(super) fn tell<C: Exchange, T: Serialize + DeserializeOwned>(
    control: &mut C,
    call: &Call,
    round: u64,
    mine: &T,
) -> Result<Vec<T>, CollectiveError> {
    let bytes = serde_json::to_vec(mine).map_err(|e| call.system(e))?;
    let (token, len) = (call.token, bytes.len() as u64);
    let header = Header { method: call.method, round, token, leaves: 0, len, nodes: Vec::new() };
    let told =
        control.gather(call, &header, bytes).inspect_err(|error| control.break_off(error.missing()))?;
    let read = |(bytes, rank): (Vec<u8>, u32)| {
        serde_json::from_slice(&bytes).map_err(|e| call.mismatch(RankIndex(rank), e))
    };
    told.into_iter().zip(0..).map(read).collect()
}

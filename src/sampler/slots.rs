//! The policies that a replica holds, by their identity.
//!
//! ```text
//!   stage ──► Verifying ──verified──► Staged ──activate──► Active ──retire──► Retired ──► gone
//!                │                       └──────────retire───────────────►       once the last
//!                └──failed──► gone                                                pin is gone
//! ```
//!
//! A request pins its policy from its admission to its answer, so weights never change, and never
//! leave, under a sequence that runs. Only an active policy takes new requests.

use std::collections::{BTreeMap, btree_map::Entry};

use crate::types::PolicyId;

use super::{error::SamplerError, schedule::ModelIndex};

/// Most policies that a replica holds at once. An adapter of rank 16 for a 135M model takes
/// 20 MB: 128 of them 2.5 GB, more than a run's retained versions should ever need.
pub const MAX_SLOTS: usize = 128;

/// Most policies whose bytes are read and hashed, or wait for it, at once: bounds the memory that
/// unverified bytes take.
pub const MAX_VERIFYING: usize = 16;

/// Held (or soon held) policies.
#[derive(Debug, Default)]
pub struct Slots {
    slots: BTreeMap<PolicyId, Slot>,
}

#[derive(Debug)]
struct Slot {
    model: ModelIndex,
    standing: Standing,
    /// Requests that run, or wait, on it.
    pins: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Its bytes are being read and hashed; `retire` says that nobody wants it any more.
    Verifying {
        retire: bool,
    },
    Staged,
    Active,
    /// Serves those that pin it, nobody else.
    Retired,
}

/// What a request to stage leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Staging {
    /// Its bytes must be read and verified.
    Verify,
    /// They are being verified already: that will be reported.
    Underway,
    /// They were verified before and are still held.
    Held,
}

/// Whether a policy's weights have to leave memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    Kept,
    Forgotten,
}

impl Slots {
    /// Makes room for `policy`, unless it is there.
    pub fn stage(&mut self, policy: PolicyId, model: ModelIndex) -> Result<Staging, SamplerError> {
        let held = self.slots.len();
        let verifying =
            self.slots.values().filter(|slot| matches!(slot.standing, Standing::Verifying { .. })).count();
        match self.slots.entry(policy) {
            Entry::Vacant(_) if held >= MAX_SLOTS => Err(SamplerError::SlotsFull { policy, held }),
            Entry::Vacant(_) if verifying >= MAX_VERIFYING => {
                Err(SamplerError::StagingBusy { policy, verifying })
            }
            Entry::Vacant(entry) => {
                entry.insert(Slot { model, standing: Standing::Verifying { retire: false }, pins: 0 });
                Ok(Staging::Verify)
            }
            Entry::Occupied(mut entry) => {
                let standing = &mut entry.get_mut().standing;
                match standing {
                    Standing::Verifying { retire } => {
                        *retire = false;
                        Ok(Staging::Underway)
                    }
                    Standing::Retired => {
                        *standing = Standing::Staged;
                        Ok(Staging::Held)
                    }
                    Standing::Staged | Standing::Active => Ok(Staging::Held),
                }
            }
        }
    }

    /// Its weights are the ones that it names.
    pub fn verified(&mut self, policy: PolicyId) -> Fate {
        match self.slots.get_mut(&policy) {
            Some(slot) if slot.standing == (Standing::Verifying { retire: false }) => {
                slot.standing = Standing::Staged;
                Fate::Kept
            }
            _ => {
                self.slots.remove(&policy);
                Fate::Forgotten
            }
        }
    }

    /// Its weights could not be had.
    pub fn failed(&mut self, policy: PolicyId) {
        self.slots.remove(&policy);
    }

    /// New requests are served from now on.
    pub fn activate(&mut self, policy: PolicyId) -> Result<(), SamplerError> {
        match self.slots.get_mut(&policy) {
            Some(slot) if matches!(slot.standing, Standing::Staged | Standing::Active) => {
                slot.standing = Standing::Active;
                Ok(())
            }
            _ => Err(SamplerError::UnknownPolicy { policy }),
        }
    }

    /// No new requests; forgotten once nobody pins it.
    pub fn retire(&mut self, policy: PolicyId) -> Fate {
        let Some(slot) = self.slots.get_mut(&policy) else { return Fate::Kept };
        slot.standing = match slot.standing {
            Standing::Verifying { .. } => Standing::Verifying { retire: true },
            _ => Standing::Retired,
        };
        self.settle(policy)
    }

    /// Holds an active policy for one request; returns the model that it adapts.
    pub fn pin(&mut self, policy: PolicyId) -> Result<ModelIndex, SamplerError> {
        let slot = self.slots.get_mut(&policy).ok_or(SamplerError::UnknownPolicy { policy })?;
        match slot.standing {
            Standing::Active => {
                slot.pins += 1;
                Ok(slot.model)
            }
            Standing::Staged => Err(SamplerError::NotActive { policy }),
            Standing::Verifying { .. } | Standing::Retired => Err(SamplerError::UnknownPolicy { policy }),
        }
    }

    /// One request less.
    pub fn unpin(&mut self, policy: PolicyId) -> Fate {
        if let Some(slot) = self.slots.get_mut(&policy) {
            slot.pins -= 1;
        }
        self.settle(policy)
    }

    fn settle(&mut self, policy: PolicyId) -> Fate {
        match self.slots.get(&policy) {
            Some(Slot { standing: Standing::Retired, pins: 0, .. }) => {
                self.slots.remove(&policy);
                Fate::Forgotten
            }
            _ => Fate::Kept,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use crate::types::{Digest, RunId};

    use super::*;

    pub fn policy(step: u64) -> PolicyId {
        PolicyId { run: RunId(1), incarnation: 0, step, digest: Digest::of(&step.to_le_bytes()) }
    }

    const MODEL: ModelIndex = ModelIndex(0);

    fn active(step: u64) -> Slots {
        let mut slots = Slots::default();
        assert_eq!(slots.stage(policy(step), MODEL), Ok(Staging::Verify));
        assert_eq!(slots.verified(policy(step)), Fate::Kept);
        slots.activate(policy(step)).expect("staged");
        slots
    }

    #[test]
    fn only_an_active_policy_takes_requests() {
        let mut slots = Slots::default();
        let policy = policy(1);
        let unknown = Err(SamplerError::UnknownPolicy { policy });
        assert_eq!(slots.pin(policy), unknown);
        slots.stage(policy, MODEL).expect("there is room");
        assert_eq!(slots.pin(policy), unknown);
        assert!(slots.activate(policy).is_err(), "not verified yet");
        assert_eq!(slots.verified(policy), Fate::Kept);
        assert_eq!(slots.pin(policy), Err(SamplerError::NotActive { policy }));
        slots.activate(policy).expect("staged");
        assert_eq!(slots.pin(policy), Ok(MODEL));
        assert_eq!(slots.retire(policy), Fate::Kept);
        assert_eq!(slots.pin(policy), unknown);
    }

    #[test]
    fn a_retired_policy_waits_for_its_last_request() {
        let mut slots = active(1);
        slots.pin(policy(1)).expect("active");
        slots.pin(policy(1)).expect("active");
        assert_eq!(slots.retire(policy(1)), Fate::Kept);
        assert_eq!(slots.unpin(policy(1)), Fate::Kept);
        assert_eq!(slots.unpin(policy(1)), Fate::Forgotten);
        assert_eq!(active(2).retire(policy(2)), Fate::Forgotten);
    }

    #[test]
    fn staging_again_revives_what_is_still_held() {
        let mut slots = active(1);
        assert_eq!(slots.stage(policy(1), MODEL), Ok(Staging::Held));
        slots.pin(policy(1)).expect("staging again leaves it active");
        assert_eq!(slots.retire(policy(1)), Fate::Kept);
        assert_eq!(slots.stage(policy(1), MODEL), Ok(Staging::Held));
        assert_eq!(slots.unpin(policy(1)), Fate::Kept);
    }

    #[test]
    fn retiring_while_it_is_verified_forgets_it_then() {
        let mut slots = Slots::default();
        slots.stage(policy(1), MODEL).expect("there is room");
        assert_eq!(slots.retire(policy(1)), Fate::Kept);
        assert_eq!(slots.verified(policy(1)), Fate::Forgotten);
        assert_eq!(slots.stage(policy(1), MODEL), Ok(Staging::Verify));
        assert_eq!(slots.retire(policy(1)), Fate::Kept);
        assert_eq!(slots.stage(policy(1), MODEL), Ok(Staging::Underway));
        assert_eq!(slots.verified(policy(1)), Fate::Kept);
    }

    #[test]
    fn slots_are_bounded() {
        let mut slots = Slots::default();
        for step in 0..MAX_SLOTS as u64 {
            slots.stage(policy(step), MODEL).expect("there is room");
            assert_eq!(slots.verified(policy(step)), Fate::Kept);
        }
        let policy = policy(1000);
        assert_eq!(slots.stage(policy, MODEL), Err(SamplerError::SlotsFull { policy, held: MAX_SLOTS }));
        slots.failed(self::policy(0));
        assert_eq!(slots.stage(policy, MODEL), Ok(Staging::Verify));
    }

    #[test]
    fn what_is_verified_at_once_is_bounded() {
        let mut slots = Slots::default();
        for step in 0..MAX_VERIFYING as u64 {
            slots.stage(policy(step), MODEL).expect("there is room");
        }
        let next = policy(1000);
        let busy = SamplerError::StagingBusy { policy: next, verifying: MAX_VERIFYING };
        assert_eq!(slots.stage(next, MODEL), Err(busy));
        assert_eq!(slots.verified(policy(0)), Fate::Kept);
        assert_eq!(slots.stage(next, MODEL), Ok(Staging::Verify));
    }
}

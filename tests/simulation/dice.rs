//! Chance, from a seed.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// All choices of a run come from here.
pub struct Dice {
    rng: ChaCha8Rng,
    /// Off: nothing fails any more.
    pub accidents: bool,
}

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), accidents: true }
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.rng.next_u64() % n
    }

    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    /// An accident with a chance of so many percent.
    pub fn fails(&mut self, percent: u64) -> bool {
        self.accidents && self.below(100) < percent
    }
}

//! Inputs out of seeds: each is one of them with a few changes.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// Longest input: what is longer is decoded no differently.
const INPUT_MAX: usize = 64 << 10;

/// Values at which lengths and counts go wrong, in the encodings that the decoders read: bincode's marks of
/// a longer integer, all bits, the sign.
const EDGES: [u8; 8] = [0, 1, 0x7f, 0x80, 251, 252, 253, 255];

pub struct Mutator {
    random: ChaCha8Rng,
    seeds: Vec<Vec<u8>>,
}

impl Mutator {
    /// Inputs in an order that `seed` decides.
    pub fn new(seed: u64, seeds: Vec<Vec<u8>>) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), seeds }
    }

    pub fn seeds(&self) -> &[Vec<u8>] {
        &self.seeds
    }

    pub fn next(&mut self) -> Vec<u8> {
        let mut input = self.any_seed();
        for _ in 0..=self.below(8) {
            self.change(&mut input);
        }
        input.truncate(INPUT_MAX);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let at = self.below(input.len() + 1);
        match self.below(7) {
            0 => input.truncate(at),
            1 => input.insert(at, self.random.next_u32() as u8),
            2 => {
                // The rest of another seed, from anywhere in it.
                let other = self.any_seed();
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            3 => {
                let length = self.below(9);
                let random = self.random.next_u64().to_le_bytes();
                input.splice(at..at, random[..length.min(8)].iter().copied());
            }
            // Changes of a byte that is there.
            change if at < input.len() => match change {
                4 => input[at] ^= 1 << self.below(8),
                5 => input[at] = EDGES[self.below(EDGES.len())],
                _ => drop(input.remove(at)),
            },
            _ => {}
        }
    }

    fn any_seed(&mut self) -> Vec<u8> {
        let seed = self.below(self.seeds.len());
        self.seeds[seed].clone()
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random.next_u32() as usize % bound
    }
}

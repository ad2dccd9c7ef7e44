//! The store, as the coordinator's world has it.

use std::collections::HashMap;

use lockstep::{protocol::BlobRef, types::Digest};

use super::rank::Weights;

/// States by the digest of what stands for their bytes.
#[derive(Default)]
pub struct Blobs {
    pub now_ms: u64,
    /// With the time at which each was put last.
    stored: HashMap<Digest, (Weights, u64)>,
}

impl Blobs {
    pub fn put(&mut self, state: Weights) -> BlobRef {
        let digest = Digest::of(format!("{state:?}").as_bytes());
        self.stored.insert(digest, (state, self.now_ms));
        BlobRef { digest, size: 1 }
    }

    pub fn get(&self, blob: BlobRef) -> &Weights {
        &self.stored.get(&blob.digest).expect("a blob that was stored").0
    }

    pub fn old(&self) -> Vec<Digest> {
        let old = self.stored.iter().filter(|(_, (_, put_ms))| put_ms + YOUNG_MS <= self.now_ms);
        old.map(|(digest, _)| *digest).collect()
    }

    pub fn remove(&mut self, digest: &Digest) {
        self.stored.remove(digest);
    }

    /// Time in which nothing happened, and which makes no blob older.
    pub fn stall(&mut self, stalled_ms: u64) {
        self.stored.values_mut().for_each(|(_, put_ms)| *put_ms += stalled_ms);
    }
}

/// Blobs that are not swept yet: longer than from a rank's file to the row that names it.
const YOUNG_MS: u64 = 10_000;

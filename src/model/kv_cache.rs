use super::ModelConfig;

/// Keys and values of one sequence's past positions, in blocks shared between forks.
pub struct KvCache {}

impl KvCache {
    /// Positions that are allocated, and shared between forks, together: what admission to a
    /// replica reserves is a multiple of it.
    pub const BLOCK: usize = 64;

    /// An empty cache.
    pub fn new(config: &ModelConfig) -> Self {
        let _ = config;
        todo!()
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Another sequence with the same past: shares full blocks, copies the last one.
    pub fn fork(&self) -> Self {
        todo!()
    }

    /// Bytes that one position takes, over all layers.
    pub fn bytes_per_position(config: &ModelConfig) -> usize {
        let _ = config;
        todo!()
    }
}

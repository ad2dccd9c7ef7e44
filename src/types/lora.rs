use serde::{Deserialize, Serialize};

/// A linear layer of a decoder block that can carry an adapter, by its PEFT name.
///
/// The order of the variants is the order of the tensors in an adapter's flat layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraTarget {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

/// How a run's adapter is made.
///
/// An adapted layer computes `y = W x + (alpha / rank) · B (A x)`; A starts uniform in
/// `±1/sqrt(in)`, B at zero, so a fresh adapter equals the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rows of A and columns of B; at least 1.
    pub rank: u32,
    /// Numerator of the scale; 32 by default.
    pub alpha: f32,
    /// Seed of A's initialisation.
    pub seed: u64,
    /// Which layers carry an adapter; sorted, no duplicates, not empty.
    pub targets: Vec<LoraTarget>,
}

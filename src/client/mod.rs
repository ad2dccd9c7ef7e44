//! ServiceClient, TrainingClient, SamplingClient: what a Rust program drives Lockstep with.

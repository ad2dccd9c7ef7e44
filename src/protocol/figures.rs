use bincode::{Decode, Encode};

/// What a coordinator has counted since it started.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
pub struct Figures {
    /// Operations that ended, by kind and outcome.
    pub operations: Vec<EndedOperations>,
    /// Tokens that optimiser steps were over.
    pub trained_tokens: u64,
    /// Sample requests that were answered.
    pub samples: u64,
    /// Tokens of the answers.
    pub sampled_tokens: u64,
    /// Policies that a node could not stage: fetch, verify and apply.
    pub stage_failures: u64,
    /// Policies that a node began to serve.
    pub activations: u64,
}

/// Operations of one kind that ended in one way.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct EndedOperations {
    /// As in the journal: `forward_backward`, …
    pub operation: String,
    /// `done`, or the kind of the error: `not_found`, …
    pub outcome: String,
    pub count: u64,
    /// From being accepted to the durable outcome, all of them together.
    pub seconds: f64,
}

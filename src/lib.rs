//! Lockstep: an open, self-hosted training service for language models.

pub mod archive;
pub mod bench;
pub mod client;
pub mod collective;
pub mod coordinator;
pub mod gateway;
pub mod gpu;
pub mod join;
pub mod journal;
pub mod kernels;
pub mod model;
pub mod node;
pub mod nvidia;
pub mod protocol;
pub mod pull;
pub mod quickstart;
pub mod sampler;
pub mod service;
pub mod store;
pub mod trainer;
pub mod transport;
pub mod types;

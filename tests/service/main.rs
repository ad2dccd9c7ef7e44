//! `lockstep up` as a user runs it: real processes on loopback, a model of a few kilobytes.

mod certificates;
mod chaos;
mod checkpoints;
mod device;
mod history;
mod hosts;
mod join;
mod lifecycle;
mod network;
mod s3_server;
mod sharing;
mod store;
mod up;
mod weather;

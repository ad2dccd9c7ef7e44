//! `lockstep bench`: measures this machine, Lockstep on it and, where they are installed, its peers.
//!
//! ```text
//!   machine, limits   what the figures stand beside: CPU, memory, load; memcpy, quinn's bulk transfer
//!   worker            processes of this program that do the work, and how they are told
//!   allreduce         the collective, with real processes, over shared memory and QUIC
//!   publish, gateway  a local cluster's processes: from a step to served by all; what a request costs
//!   start             from `lockstep up` to the first step
//!   local             a cluster inside this process, and through a client of it:
//!   train, generate, parity
//!   peer, compare     the peers' scripts; Lockstep and them in turns
//!   gpu               all of it on a GPU, beside what the chip can do
//! ```
//!
//! Every figure is the median of repeats after one that is not counted, and a report says the machine
//! and its load. Nothing else in the crate knows this room.

mod error;
mod figures;
mod folder;
mod machine;
mod worker;

mod limits;
mod peer;
mod program;

mod allreduce;
mod gateway;
mod publish;
mod start;

mod local;

mod generate;
mod parity;
mod train;

mod compare;
mod gpu;

pub use allreduce::{AllReduceConfig, AllReduceReport, AllReduceResult, Carrier, all_reduce};
pub use compare::{CompareConfig, CompareReport, CompareRow, compare, draw};
pub use error::BenchError;
pub use gateway::{GatewayConfig, GatewayReport, GatewayResult, gateway};
pub use generate::{GenerateConfig, GenerateReport, generate};
pub use gpu::{
    Figures, FiguresConfig, GpuBenchConfig, GpuReport, GpuRow, Peak, Shape, Workload, gpu, gpu_figures,
};
pub use limits::{Bulk, Memcpy};
pub use local::Subject;
pub use machine::Machine;
pub use parity::{ParityConfig, ParityReport, parity};
pub use publish::{PublishConfig, PublishReport, PublishResult, adapter_mb, publish};
pub use start::{StartConfig, StartReport, StartTimes, start};
pub use train::{TrainConfig, TrainReport, train};
pub use worker::{WorkerKind, run_worker};

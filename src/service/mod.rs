//! Starts the parts: a cluster inside the caller's process, the parts as processes of their
//! own, and the supervisor behind `lockstep up`.
//!
//! ```text
//!   lockstep up ── gateway (this process)
//!              ├── lockstep coordinator     restarted with back-off, same port
//!              └── lockstep node × K        restarted with back-off, same name
//! ```
//!
//! One code path: `Cluster::local` runs the same [`coordinator::serve`](crate::coordinator::serve)
//! and [`node::serve`](crate::node::serve) over the in-memory twin of the transport.

mod backup;
mod error;
mod layout;
mod local;
mod placement;
mod process;
mod share;
mod supervisor;
mod watchdog;

mod up;

pub use backup::{BackedUp, back_up};
pub use error::ServiceError;
pub use layout::{CACHE, DataDirectory};
pub use local::{Cluster, ClusterConfig};
pub use placement::{COORDINATOR_PORT, Placement, Said};
pub use process::{
    CoordinatorProcess, EXIT_REFUSED, NodeProcess, run_coordinator, run_here, run_node, shutdown_requested,
};
pub use supervisor::{Supervisor, SupervisorConfig};
pub use up::{GatewayProcess, UpConfig, run_gateway, up, wait_until_joined};

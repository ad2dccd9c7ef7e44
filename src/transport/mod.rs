//! Connections between processes: QUIC with mutual TLS (quinn), and an in-memory twin for
//! embedding and simulation. Moves opaque frames and byte streams; knows no message.
//!
//! ```text
//!   ClusterCa ──issue──► Identity ──► Endpoint ──connect / accept──► Connection ──open / accept──► Stream
//!                                                                    (peer: role, name)           send │ recv
//! ```
//!
//! A process without an identity reaches a [`Doorway`] and nothing else: it proves the server alone.
//!
//! Both twins behave the same: what is sent before `finish` arrives; dropping an unfinished half
//! is seen at the other end; a closed connection says who closed it and why; every queue has a
//! bound. The tests run each claim over both.

mod error;
mod name;

mod applicant;
mod ca;
mod files;
mod identity;
mod revocation;
mod tls;
mod validity;

mod endpoint;

mod connection;
mod stream;

mod memory;
mod quic;

mod doorway;

mod bulk;
mod https;

pub use applicant::{Admission, Applicant, PublicKey};
pub use bulk::{receive_bulk, send_bulk};
pub use ca::ClusterCa;
pub use connection::Connection;
pub use doorway::{Doorway, knock};
pub use endpoint::Endpoint;
pub use error::TransportError;
pub use https::HttpsIdentity;
pub use identity::Identity;
pub use memory::MemoryNetwork;
pub use name::{Peer, Role, check_name};
pub use revocation::{Proof, Revocation};
pub use stream::{RecvHalf, SendHalf, Stream};
pub use tls::offer_crypto_provider;
pub use validity::{CERTIFICATE_LIFE, Validity, unix_now};

/// Streams of one connection that its peer may have open at once. A coordinator holds one per
/// waiting request of a gateway; the next opener waits.
const MAX_STREAMS: u32 = 4096;

/// Longest reason that [`Connection::close`] carries: it must fit in one packet.
const MAX_CLOSE_REASON: usize = 512;

#[cfg(test)]
mod tests;

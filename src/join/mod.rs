//! How a process on another machine becomes part of a cluster: a token, shown once at the doorway,
//! is exchanged for a certificate.
//!
//! ```text
//!   coordinator's machine                            another machine
//!   lockstep token create ─► DATA/tokens/ID          lockstep node --token ID.SECRET.CA
//!                                 │                        │  a key of its own
//!                               Desk ◄── Doorway ◄─────────┘  CA checked against the token
//!                                 │  one use gone, durable
//!                                 └─► certificate: role of the token, name as asked
//! ```
//!
//! A certificate is good for a while. Whoever runs for longer asks for the next one over the connection that it
//! has ([`keep_fresh`]); processes of the coordinator's machine find theirs in DATA/identity, where the
//! [`Authority`] puts them.
//!
//! A token names the cluster's CA by its fingerprint, so that the joiner knows whom it tells the
//! secret, and the secret is stored as its SHA-256 alone. Tokens are files beside the CA, not rows of the
//! journal: they can be made before the coordinator's first start, and revoked by deleting one.

mod error;
mod token;

mod ledger;

mod authority;

mod apply;
mod desk;
mod renew;

pub use apply::apply;
pub use authority::{Authority, Issued};
pub use desk::Desk;
pub use error::JoinError;
pub use ledger::{Ledger, Terms, TokenInfo};
pub use renew::keep_fresh;
pub use token::JoinToken;

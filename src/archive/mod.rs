//! A checkpoint as a directory: the form in which it leaves a service.
//!
//! ```text
//! DIR/adapter_model.safetensors, adapter_config.json    a sampler checkpoint, in PEFT layout
//! DIR/state.safetensors                                 a trainer checkpoint
//! DIR/checkpoint.json                                   what it is, and every file's size and SHA-256
//! ```
//!
//! The manifest is written last: a directory without one may be half-written. What a file of
//! ours holds is proved twice, by the manifest (`sha256sum` agrees with it) and by the digest
//! inside the file, which covers its numbers. Knows files and formats, no service.

mod error;
mod manifest;
mod merge;
mod verify;

pub use error::ArchiveError;
pub use manifest::{MANIFEST, Manifest, ManifestFile, write};
pub use merge::{merge, read_adapter};
pub use verify::{Verified, verify_directory, verify_files};

#[cfg(test)]
mod tests;

//! Where a map stays as it is for as long as it is there: asked before a file is mapped.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use super::PackError;
use crate::model::files::remote_system;

/// Bytes that this user may still write to the disk of a directory.
pub(super) fn free_bytes(directory: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(directory)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Refuses a file, or a directory of files, that is not on a disk of this machine.
pub(super) fn check_local(file: &File) -> Result<(), PackError> {
    match remote_system(file)? {
        Some(system) => Err(PackError::Remote { system }),
        None => Ok(()),
    }
}

/// Refuses a file to which others than this process's user may write.
pub(super) fn check_ours(metadata: &Metadata) -> Result<(), PackError> {
    // SAFETY: the call takes nothing and always succeeds.
    let ours = unsafe { libc::geteuid() };
    match (metadata.uid(), metadata.mode() & 0o777) {
        (uid, _) if uid != ours => Err(PackError::Owner { uid }),
        (_, mode) if mode & 0o022 != 0 => Err(PackError::Mode { mode }),
        _ => Ok(()),
    }
}

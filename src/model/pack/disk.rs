//! Where a map stays as it is for as long as it is there: asked before a file is mapped.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use super::PackError;

/// File systems where another machine, or a server that has gone, can take a mapped file's pages away: the next look
/// at one that isn't in memory is a SIGBUS. By `f_type` of `fstatfs(2)`, whose upper half some sign-extend.
#[cfg(target_os = "linux")]
const REMOTE: [(u32, &str); 13] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0bd0_0bd0, "Lustre"),
    (0x00c3_6400, "Ceph"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0x786f_4256, "vboxsf"),
];

/// Bytes that this user may still write to the disk of a directory.
pub(super) fn free_bytes(directory: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(directory)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Refuses a file, or a directory of files, that is not on a disk of this machine.
pub(super) fn check_local(file: &File) -> Result<(), PackError> {
    match remote(file)? {
        Some(system) => Err(PackError::Remote { system }),
        None => Ok(()),
    }
}

#[cfg(target_os = "linux")]
fn remote(file: &File) -> io::Result<Option<&'static str>> {
    Ok(name_of(rustix::fs::fstatfs(file)?.f_type as u32))
}

/// Nobody has told them apart yet.
#[cfg(not(target_os = "linux"))]
fn remote(_: &File) -> io::Result<Option<&'static str>> {
    Ok(Some("a system other than Linux"))
}

#[cfg(target_os = "linux")]
fn name_of(kind: u32) -> Option<&'static str> {
    REMOTE.iter().find(|(remote, _)| *remote == kind).map(|(_, name)| *name)
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_local_disk_is_told_from_a_remote_one() {
        check_local(&File::open("/proc").unwrap()).unwrap();
        // What the kernel's headers and statfs(2) say.
        assert_eq!(name_of(libc::NFS_SUPER_MAGIC as u32), Some("NFS"));
        assert_eq!(name_of(libc::SMB_SUPER_MAGIC as u32), Some("SMB"));
        assert_eq!(name_of(libc::FUSE_SUPER_MAGIC as u32), Some("FUSE"));
        assert_eq!(name_of(libc::AFS_SUPER_MAGIC as u32), Some("AFS"));
        for local in [libc::EXT4_SUPER_MAGIC, libc::XFS_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC] {
            assert_eq!(name_of(local as u32), None);
        }
        assert_eq!(name_of(libc::TMPFS_MAGIC as u32).or(name_of(libc::OVERLAYFS_SUPER_MAGIC as u32)), None);
    }
}

//! Which disks are this machine's.

use std::{fs::File, io};

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

/// What a file is on, if not on a disk of this machine.
#[cfg(target_os = "linux")]
pub(in crate::model) fn remote_system(file: &File) -> io::Result<Option<&'static str>> {
    Ok(name_of(rustix::fs::fstatfs(file)?.f_type as u32))
}

/// Nobody has told them apart yet.
#[cfg(not(target_os = "linux"))]
pub(in crate::model) fn remote_system(_: &File) -> io::Result<Option<&'static str>> {
    Ok(Some("a system other than Linux"))
}

#[cfg(target_os = "linux")]
fn name_of(kind: u32) -> Option<&'static str> {
    REMOTE.iter().find(|(remote, _)| *remote == kind).map(|(_, name)| *name)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_local_disk_is_told_from_a_remote_one() {
        assert_eq!(remote_system(&File::open("/proc").unwrap()).unwrap(), None);
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

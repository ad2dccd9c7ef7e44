//! Remembers the digests of model files that haven't changed, so that a start needn't read
//! gigabytes again.
//!
//! A hint, never an authority: an entry counts only while every file's [`Stamp`] is the one it was made with, its
//! path, where that leads, size, time and inode, and whatever goes wrong with the cache only costs the hashing.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::files::Stamp;
use crate::types::Digest;

/// Files younger than this aren't remembered: one more write within the file system's clock
/// tick would not show in their time.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// Digests by the files they were taken of, one small JSON file a model.
pub(super) struct DigestCache {
    directory: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    files: Vec<Stamp>,
    digest: Digest,
}

impl DigestCache {
    /// Remembers nothing.
    pub fn none() -> Self {
        Self { directory: None }
    }

    pub fn in_directory(directory: &Path) -> Self {
        Self { directory: Some(directory.to_owned()) }
    }

    /// The digest of these files, if it is known and they haven't changed.
    pub fn get(&self, files: &[Stamp]) -> Option<Digest> {
        let entry = fs::read(self.path_of(files.iter().map(|file| &*file.path))?).ok()?;
        let entry: Entry = serde_json::from_slice(&entry).ok()?;
        (entry.files == files).then_some(entry.digest)
    }

    /// Remembers the digest of these files, if they are not too young for that.
    pub fn put(&self, files: &[Stamp], digest: Digest) {
        if files.iter().all(is_settled) {
            self.put_at_once(files, digest);
        }
    }

    /// The same of files to which nobody writes.
    pub fn put_at_once(&self, files: &[Stamp], digest: Digest) {
        let Some(path) = self.path_of(files.iter().map(|file| &*file.path)) else { return };
        if let Err(error) = write(&path, &Entry { files: files.to_vec(), digest }) {
            tracing::warn!(path = %path.display(), %error, "cannot remember a model's digest");
        }
    }

    /// Forgets the digest of a file that is gone.
    pub fn forget(&self, file: &Path) {
        if let Some(entry) = self.path_of([file].into_iter()) {
            // It is one that was never there, or it stays and is of no use to anybody.
            let _ = fs::remove_file(entry);
        }
    }

    /// Where the entry of these files stands: named by their paths, so that a changed file takes
    /// its old entry's place.
    fn path_of<'a>(&self, files: impl Iterator<Item = &'a Path>) -> Option<PathBuf> {
        let mut paths = Vec::new();
        for file in files {
            paths.extend_from_slice(file.as_os_str().as_encoded_bytes());
            paths.push(0);
        }
        Some(self.directory.as_ref()?.join(format!("digest-{}.json", Digest::of(&paths).short())))
    }
}

fn is_settled(file: &Stamp) -> bool {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Duration::from_nanos(file.modified_ns) + SETTLED_AFTER < now
}

/// Makes a cache's directory, and those above it, for its owner alone; one that is there stays as it is.
pub(super) fn make_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn write(path: &Path, entry: &Entry) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        make_directory(directory)?;
    }
    let partial = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&partial, serde_json::to_vec(entry)?)?;
    fs::rename(partial, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn stamp(size: u64, modified_ns: u64) -> Stamp {
        Stamp { path: "a/model.gguf".into(), target: "/a/model.gguf".into(), size, modified_ns, inode: None }
    }

    /// Two files of one size and time, by turns under one name: a link that is switched, and a file that is
    /// renamed over another.
    #[test]
    fn a_file_in_anothers_place_is_not_taken_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        for name in ["one", "two"] {
            fs::write(at(name), name).unwrap();
            fs::File::options().append(true).open(at(name)).unwrap().set_modified(hour_ago).unwrap();
        }
        let cache = DigestCache::in_directory(&at("cache"));
        let stamps = || [Stamp::of(&at("model")).unwrap()];
        symlink(at("one"), at("model")).unwrap();
        let first = stamps();
        cache.put(&first, Digest([1; 32]));
        assert_eq!(cache.get(&stamps()), Some(Digest([1; 32])));

        fs::remove_file(at("model")).unwrap();
        symlink(at("two"), at("model")).unwrap();
        let second = stamps();
        assert_eq!((second[0].size, second[0].modified_ns), (first[0].size, first[0].modified_ns));
        assert_eq!(cache.get(&second), None, "the link leads elsewhere");

        cache.put(&second, Digest([2; 32]));
        fs::rename(at("one"), at("two")).unwrap();
        let third = stamps();
        assert_eq!(third[0].target, second[0].target);
        assert_eq!(cache.get(&third), None, "another file came by a rename");
        // Where inodes say nothing, that is the one thing that can't be seen.
        assert_eq!(Stamp { inode: None, ..third[0].clone() }, Stamp { inode: None, ..second[0].clone() });
    }

    #[test]
    fn remembers_files_until_they_change() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DigestCache::in_directory(&directory.path().join("cache"));
        let files = [stamp(10, 1)];
        assert_eq!(cache.get(&files), None);
        cache.put(&files, Digest([7; 32]));
        assert_eq!(cache.get(&files), Some(Digest([7; 32])));
        let made = fs::metadata(directory.path().join("cache")).unwrap();
        assert_eq!(made.permissions().mode() & 0o777, 0o700, "packed weights will be in it");
        assert_eq!(cache.get(&[stamp(11, 1)]), None);
        assert_eq!(cache.get(&[stamp(10, 2)]), None);
        assert_eq!(cache.get(&[stamp(10, 1), stamp(10, 1)]), None);

        cache.put(&[stamp(11, 2)], Digest([8; 32]));
        assert_eq!(cache.get(&[stamp(11, 2)]), Some(Digest([8; 32])));
        assert_eq!(fs::read_dir(directory.path().join("cache")).unwrap().count(), 1);
    }

    #[test]
    fn forgets_what_is_damaged_and_what_is_too_young() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DigestCache::in_directory(directory.path());
        let files = [stamp(10, 1)];
        cache.put(&files, Digest([7; 32]));
        fs::write(cache.path_of([&*files[0].path].into_iter()).unwrap(), "{").unwrap();
        assert_eq!(cache.get(&files), None);

        let young = [stamp(10, u64::MAX)];
        cache.put(&young, Digest([7; 32]));
        assert_eq!(cache.get(&young), None);
    }
}

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use tokio::sync::{Mutex, MutexGuard};

use crate::types::Digest;

/// How many folders the blobs are spread over: one for each value of a digest's first byte.
pub(super) const FOLDERS: usize = 256;

/// The blobs whose digests share a first byte. One is written or removed at a time.
pub(super) struct Folder {
    /// Absent in a bucket, where nothing has to be synced.
    path: Option<PathBuf>,
    /// Whether this process has synced the folder. Until then a blob seen in it may have been
    /// renamed by a process that died before it could sync, and a power cut could undo that.
    synced: Mutex<bool>,
}

impl Folder {
    /// The folder of `first_byte` below the store's directory; without one, of a bucket.
    pub(super) fn new(directory: Option<&Path>, first_byte: usize) -> Self {
        let path = directory.map(|directory| directory.join(format!("{first_byte:02x}")));
        Self { path, synced: Mutex::new(false) }
    }

    /// Waits for the folder's turn.
    pub(super) async fn lock(&self) -> Locked<'_> {
        Locked { path: self.path.as_deref(), synced: self.synced.lock().await }
    }
}

/// A folder that nobody else changes.
pub(super) struct Locked<'a> {
    path: Option<&'a Path>,
    synced: MutexGuard<'a, bool>,
}

impl Locked<'_> {
    /// Makes the names in the folder durable, whoever wrote them. Free after the first time:
    /// `put` and `delete` of this process sync what they change.
    pub(super) async fn sync(&mut self) -> io::Result<()> {
        if let Some(path) = self.path
            && !*self.synced
        {
            let path = path.to_owned();
            let synced = move || sync_directory(&path).and_then(|()| sync_parent(&path));
            tokio::task::spawn_blocking(synced).await.map_err(io::Error::other)??;
            *self.synced = true;
        }
        Ok(())
    }
}

/// Makes a directory and its parents, durably.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    sync_directory(directory)?;
    sync_parent(directory)
}

/// Removes the files of writes that never ended. Files that this store didn't write stay.
pub(super) fn sweep(directory: &Path) -> io::Result<()> {
    for first_byte in 0..FOLDERS {
        let entries = match fs::read_dir(directory.join(format!("{first_byte:02x}"))) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(is_half_written) {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

/// The blobs below `directory` whose digests begin with `first_byte` that were written at `time` or
/// earlier, as far as the file system knows; none if there is no such time.
pub(super) fn written_by(
    directory: &Path,
    first_byte: u8,
    time: Option<SystemTime>,
) -> io::Result<Vec<Digest>> {
    let entries = match fs::read_dir(directory.join(format!("{first_byte:02x}"))) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        // What has another name is not ours, or half-written.
        let Some(digest) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let written = match entry.metadata().and_then(|metadata| metadata.modified()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            written => written?,
        };
        if time.is_some_and(|time| written <= time) {
            found.push(digest);
        }
    }
    Ok(found)
}

/// A digest, `#` and a number: how object_store calls what it has not yet renamed.
fn is_half_written(name: &str) -> bool {
    let Some((digest, number)) = name.split_once('#') else { return false };
    digest.len() == 64
        && digest.bytes().all(|b| b.is_ascii_hexdigit())
        && !number.is_empty()
        && number.bytes().all(|b| b.is_ascii_digit())
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        // The parent of a relative path of one part is written "".
        Some(parent) if parent.as_os_str().is_empty() => sync_directory(Path::new(".")),
        Some(parent) => sync_directory(parent),
        None => Ok(()),
    }
}

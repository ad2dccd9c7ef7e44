//! A directory in which a model is put together before it gets its name.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{PullError, at};
use crate::types::{Digest, Hasher};

/// A hidden directory beside the models, removed with all it holds when dropped.
pub(super) struct Stage {
    path: PathBuf,
}

impl Stage {
    /// `models/.partial-NAME-PID-COUNT`, empty.
    pub fn new(models: &Path, name: &str) -> Result<Self, PullError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = models.join(format!(".partial-{name}-{}-{count}", std::process::id()));
        // Left behind by a process of the same number that was killed.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).map_err(at(&path))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory `name` of the stage durable and gives it its final place.
    ///
    /// If another process was faster, its model stays.
    pub fn install(&self, name: &str, target: &Path) -> Result<(), PullError> {
        let staged = self.path.join(name);
        let place = || -> io::Result<()> {
            for entry in fs::read_dir(&staged)? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&staged)?.sync_all()?;
            let parent = target.parent().ok_or(io::ErrorKind::InvalidFilename)?;
            fs::create_dir_all(parent)?;
            match fs::rename(&staged, target) {
                // Directories replace only empty ones: somebody has put the model here already.
                Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => return Err(error),
                _ => {}
            }
            File::open(parent)?.sync_all()
        };
        place().map_err(at(target))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// SHA-256 of a file.
pub(super) fn digest_of(path: &Path) -> Result<Digest, PullError> {
    struct Sink(Hasher);
    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut sink = Sink(Hasher::default());
    let mut file = io::BufReader::with_capacity(1 << 20, File::open(path).map_err(at(path))?);
    io::copy(&mut file, &mut sink).map_err(at(path))?;
    Ok(sink.0.finish())
}

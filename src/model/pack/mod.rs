//! Base weights that are packed once and mapped by every process of a machine: one physical copy of them, and
//! nothing to read or bring into order at the next start.
//!
//! ```text
//!   CACHE/<base model's digest>-<layout>.pack    what processes map; its name comes by a rename, when it is whole
//!   CACHE/packing.lock                           held by whoever writes one
//!   CACHE/digest-….json                          which file has been proved, by its stamp (digest_cache.rs)
//! ```
//!
//! It is a copy of what the model's files say, never an authority: one that is truncated, altered, foreign or of
//! another layout is written again. The values are hashed before a file is used for the first time and whenever
//! its size, time or inode is not as they were then; so they are trusted as the model's own files are, and a start costs
//! nothing for it. What bits rot unseen meanwhile, [`PackFile::verify`] finds (`lockstep model verify`).
//!
//! Each model at a place, in a dtype, has one file: whoever writes one removes those of other layouts, of the same
//! place and dtype in an earlier state, and of models that are no longer where they were; before it writes, so that a
//! full disk is full only of what is of use. Where nothing can be written, or a map could be taken away (NFS and
//! other remote file systems), the weights are in the process's own memory, as they would be without all this.

mod disk;
mod file;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

pub use self::file::PackError;
use self::file::{Contents, Pack, WriteError};
use super::{
    BaseWeights, ModelError,
    digest_cache::{DigestCache, make_directory},
    files::{ModelFiles, Stamp},
};
use crate::{
    kernels::{LAYOUT, MatrixForm, WeightDtype},
    types::Digest,
};

/// How long a process waits for another one that packs and writes nothing meanwhile, before it takes memory of its
/// own: one that hangs must not hold up all of them. Making 20 GB durable takes a minute.
const LOCK_DEADLINE: Duration = Duration::from_secs(120);

/// Between two looks at the lock.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// What a file leaves free of its disk, in bytes: on the same one the journal lies.
const SPARE: u64 = 1 << 30;

/// Endings of whole files, and of those that are being written.
const ENDING: &str = "pack";
const UNFINISHED: &str = "partial";

/// The packed weights in a directory.
pub(super) struct PackCache {
    directory: PathBuf,
    proved: DigestCache,
    /// Bytes that a file leaves free of its disk.
    spare: u64,
}

/// A model, and what its weights are held as.
pub(super) struct Wanted<'a> {
    pub files: &'a ModelFiles,
    /// Of the files when the digest was taken.
    pub stamps: &'a [Stamp],
    /// Where they stand, absolute.
    pub source: &'a Path,
    pub dtype: WeightDtype,
    /// Of the model in this dtype.
    pub digest: Digest,
    /// What its weights are held as.
    pub forms: &'a [Option<MatrixForm>],
}

impl Wanted<'_> {
    fn weights_in(&self, pack: &Pack) -> Result<BaseWeights, PackError> {
        pack.weights(&self.files.config, self.digest, self.forms)
    }
}

/// A file of packed weights, as it is listed.
#[derive(Debug)]
pub struct PackFile {
    pub path: PathBuf,
    pub bytes: u64,
    /// Where the model's files are, or were, and the dtype; or why it can't be said.
    pub holds: Result<(PathBuf, String), PackError>,
}

impl PackCache {
    /// Made when it is first written to.
    pub fn in_directory(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), proved: DigestCache::in_directory(directory), spare: SPARE }
    }

    /// A model's weights: mapped, packed first if they are not yet, or in memory if there can be no file.
    pub fn load(&self, wanted: &Wanted<'_>) -> Result<BaseWeights, ModelError> {
        match self.shared(wanted) {
            Ok(weights) => Ok(weights),
            Err(WriteError::Model(error)) => Err(error),
            Err(WriteError::Io(error)) => {
                let cache = self.directory.display();
                tracing::warn!(
                    "weights are in this process's own memory, not shared: cannot pack them into {cache}: {error}"
                );
                wanted.files.load_unchanged(wanted.dtype, wanted.stamps)
            }
        }
    }

    /// The weights of the file that is there, or of the one that it writes.
    fn shared(&self, wanted: &Wanted<'_>) -> Result<BaseWeights, WriteError> {
        make_directory(&self.directory)?;
        disk::check_local(&File::open(&self.directory)?).map_err(unusable)?;
        match self.present(wanted) {
            Some(weights) => Ok(weights),
            None => self.pack(wanted),
        }
    }

    /// The weights of a file that is there and sound.
    fn present(&self, wanted: &Wanted<'_>) -> Option<BaseWeights> {
        let path = self.path_of(wanted);
        match self.open(&path).and_then(|pack| wanted.weights_in(&pack)) {
            Ok(weights) => Some(weights),
            Err(PackError::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(problem) => {
                tracing::warn!("{} is no use and is written again: {problem}", path.display());
                None
            }
        }
    }

    /// A file whose values are those that were written.
    fn open(&self, path: &Path) -> Result<Pack, PackError> {
        // Taken before hashing: a change in between is then seen the next time.
        let stamp = [Stamp::of(path)?];
        let pack = Pack::open(path)?;
        if self.proved.get(&stamp) != Some(pack.table.content) {
            pack.verify()?;
            self.proved.put(&stamp, pack.table.content);
        }
        Ok(pack)
    }

    /// Writes the file, unless somebody else has meanwhile, and maps it.
    fn pack(&self, wanted: &Wanted<'_>) -> Result<BaseWeights, WriteError> {
        let _lock = self.lock()?;
        if let Some(weights) = self.present(wanted) {
            return Ok(weights);
        }
        // What another model has meanwhile packed in this one's place is not removed for it.
        wanted.files.check_unchanged(wanted.stamps)?;
        self.tidy_up(wanted);
        let begun = Instant::now();
        let path = self.path_of(wanted);
        let partial = path.with_extension(UNFINISHED);
        self.write(wanted, &partial).inspect_err(|_| drop(fs::remove_file(&partial)))?;
        fs::rename(&partial, &path)?;
        File::open(&self.directory)?.sync_all()?;
        let pack = Pack::open(&path).map_err(unusable)?;
        // Nobody but the holder of the lock writes files of this name, so it is no matter how young it is.
        let stamp = Stamp::of(&path).map_err(io::Error::other)?;
        self.proved.put_at_once(&[stamp], pack.table.content);
        let weights = wanted.weights_in(&pack).map_err(unusable)?;
        tracing::info!("packed weights of {} in {:.1?}", wanted.source.display(), begun.elapsed());
        Ok(weights)
    }

    fn write(&self, wanted: &Wanted<'_>, partial: &Path) -> Result<(), WriteError> {
        let weights = wanted.files.read(wanted.dtype)?;
        let contents = Contents {
            model: wanted.digest,
            source: wanted.source,
            dtype: wanted.dtype.to_string(),
            config: &wanted.files.config,
            weights: &*weights,
        };
        let (free, needed) =
            (disk::free_bytes(&self.directory)?, contents.bytes().saturating_add(self.spare));
        if free < needed {
            let problem =
                format!("{free} bytes are free on its disk; it takes {needed} with what is to stay free");
            return Err(io::Error::new(io::ErrorKind::StorageFull, problem).into());
        }
        tracing::info!(
            "packing weights of {} into {}, {:.0} MiB, once",
            wanted.source.display(),
            self.directory.display(),
            contents.bytes() as f64 / f64::from(1 << 20)
        );
        // What a writer left that was killed is overwritten; nobody maps it.
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(partial)?;
        file::write(&file, &contents)?;
        // The files were opened anew by their names, maybe minutes after the digest was found to be theirs: under it
        // no other weights may ever stand, they would outlive a rollback of the model.
        Ok(wanted.files.check_unchanged(wanted.stamps)?)
    }

    /// Waits for its turn to write.
    fn lock(&self) -> io::Result<File> {
        let path = self.directory.join("packing.lock");
        let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let (mut written, mut since) = (self.unfinished_bytes(), Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(error),
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_POLL),
            }
            match self.unfinished_bytes() {
                now if now != written => (written, since) = (now, Instant::now()),
                _ if since.elapsed() > LOCK_DEADLINE => {
                    let problem =
                        format!("another process packs, and has written nothing for {LOCK_DEADLINE:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
                }
                _ => {}
            }
        }
    }

    fn unfinished_bytes(&self) -> u64 {
        let unfinished = entries(&self.directory).filter(|path| ends(path, UNFINISHED));
        unfinished.filter_map(|path| Some(fs::metadata(path).ok()?.len())).sum()
    }

    /// Removes files that nobody will ask for again, the one that was found to be no use, and what killed writers
    /// left; for the holder of the lock. Whoever has one mapped keeps it.
    fn tidy_up(&self, wanted: &Wanted<'_>) {
        let own = self.path_of(wanted);
        let dead = |path: &Path| match file::table_of(path) {
            Err(PackError::Io(_)) => false,
            Err(_) => true,
            Ok(table) => {
                let replaced = table.source == wanted.source && table.dtype == wanted.dtype.to_string();
                replaced || !table.source.exists()
            }
        };
        for path in entries(&self.directory) {
            if (ends(&path, UNFINISHED) || ends(&path, ENDING) && (path == own || dead(&path)))
                && let Err(error) = self.remove(&path)
            {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }

    /// One that somebody else has removed is as good as removed.
    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => {
                self.proved.forget(path);
                Ok(())
            }
        }
    }

    fn path_of(&self, wanted: &Wanted<'_>) -> PathBuf {
        self.directory.join(format!("{}-{LAYOUT}.{ENDING}", wanted.digest))
    }
}

impl PackFile {
    /// Those of a cache, by name; those too that are being written, or whose writer was killed
    /// ([`PackError::Unfinished`]).
    pub fn list(cache: &Path) -> Vec<Self> {
        let mut paths: Vec<_> =
            entries(cache).filter(|path| ends(path, ENDING) || ends(path, UNFINISHED)).collect();
        paths.sort();
        let list = paths.into_iter().map(|path| Self {
            bytes: fs::metadata(&path).map_or(0, |metadata| metadata.len()),
            holds: match ends(&path, UNFINISHED) {
                true => Err(PackError::Unfinished),
                false => file::table_of(&path).map(|table| (table.source, table.dtype)),
            },
            path,
        });
        list.collect()
    }

    /// Removes all of them and says which: processes that have one mapped keep it, the next one packs again. Waits
    /// for whoever is writing one.
    pub fn clear(cache: &Path) -> io::Result<Vec<Self>> {
        if Self::list(cache).is_empty() {
            return Ok(Vec::new());
        }
        let packs = PackCache::in_directory(cache);
        let _lock = packs.lock()?;
        let list = Self::list(cache);
        list.iter().try_for_each(|pack| packs.remove(&pack.path))?;
        Ok(list)
    }

    /// Reads every byte and compares it with the digest of what was written.
    pub fn verify(&self) -> Result<(), PackError> {
        match ends(&self.path, UNFINISHED) {
            true => Err(PackError::Unfinished),
            false => Pack::open(&self.path)?.verify(),
        }
    }
}

/// Nothing that would be the model's fault.
fn unusable(problem: PackError) -> WriteError {
    WriteError::Io(io::Error::other(problem.to_string()))
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn ends(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|found| found == ending)
}

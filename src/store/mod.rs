//! Blobs by digest: in a local directory, or in an S3-compatible bucket (object_store). Knows bytes
//! and digests, never tensors.
//!
//! ```text
//! DIR/3f/3f9a…c1       a blob: 64 hexadecimal digits, in a folder named by the first two
//! DIR/3f/3f9a…c1#1     one that was being written; swept when the store is opened
//!
//! s3://BUCKET/PREFIX/3f/3f9a…c1     the same in a bucket
//! s3://BUCKET/PREFIX/owner          which data directory's blobs these are
//! ```
//!
//! A blob is written beside its place, synced and renamed, and then its folder is synced:
//! what has a blob's name is whole, and what `put` returned for survives a power cut. A bucket
//! promises as much for each write that it acknowledges. A blob is never changed. Whoever reads one
//! gets bytes that hash to its name, or an error.
//!
//! One process owns a directory, or a prefix of a bucket: whoever holds the journal of the data
//! directory that names it.

mod access;
mod binding;
mod bucket;
mod error;
mod folder;
mod location;
mod part;
mod young;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem, path::Path as ObjectPath};

use crate::types::Digest;

pub use error::StoreError;
pub use location::BucketLocation;

use access::Access;
use binding::Binding;
use bucket::Bucket;
use folder::{FOLDERS, Folder};
use young::Young;

/// From here on bytes are hashed on a thread of their own: SHA-256 takes about 1 ms for it,
/// as long as a task may keep its runtime's thread.
const HASH_ASIDE: usize = 1 << 20;

/// The blobs' folder in a data directory.
const FOLDER: &str = "blobs";

/// Blobs named by the SHA-256 of their bytes. Writing one that exists is free.
///
/// Cheap to clone; works on any tokio runtime.
#[derive(Clone)]
pub struct BlobStore(Arc<Inner>);

struct Inner {
    place: Place,
    /// One for each first byte of a digest.
    folders: Vec<Folder>,
    young: Young,
}

enum Place {
    Directory { path: PathBuf, objects: LocalFileSystem },
    Bucket(Bucket),
}

impl BlobStore {
    /// The blobs of a data directory: in the bucket that is asked for, or that it remembers from an
    /// earlier start, or else in `DATA/blobs`. Refuses a place other than the one that holds the
    /// blobs which are there already. A bucket is reached with what the `AWS_*` variables of this
    /// process say.
    pub async fn open(data_dir: &Path, wanted: Option<&BucketLocation>) -> Result<Self, StoreError> {
        Self::open_with(data_dir, wanted, &Access::from_env()).await
    }

    async fn open_with(
        data_dir: &Path,
        wanted: Option<&BucketLocation>,
        access: &Access,
    ) -> Result<Self, StoreError> {
        let folder = data_dir.join(FOLDER);
        let elsewhere = |is: String, asked: &BucketLocation| StoreError::Elsewhere {
            is,
            asked: asked.clone(),
            data_dir: data_dir.to_owned(),
        };
        match (Binding::read(data_dir)?, wanted) {
            (None, None) => Self::open_local(&folder),
            (Some(bound), Some(wanted)) if bound.location != *wanted => {
                Err(elsewhere(bound.location.to_string(), wanted))
            }
            (Some(bound), _) => Self::open_bucket(&bound, access).await,
            (None, Some(wanted)) if fs::read_dir(&folder).is_ok_and(|mut blobs| blobs.next().is_some()) => {
                Err(elsewhere(folder.display().to_string(), wanted))
            }
            (None, Some(wanted)) => {
                let bound = Binding::new(wanted.clone())?;
                // First, so that a crash leaves no prefix whose owner nobody knows.
                bound.write(data_dir)?;
                let opened = Self::open_bucket(&bound, access).await;
                if opened.is_err() {
                    Binding::forget(data_dir)?;
                }
                opened
            }
        }
    }

    /// Whether the bucket that `open` would use can be read, written and swept, and which it is; `None`
    /// of a directory. Claims nothing.
    pub async fn probe(
        data_dir: &Path,
        wanted: Option<&BucketLocation>,
    ) -> Result<Option<BucketLocation>, StoreError> {
        let bound = Binding::read(data_dir)?.map(|bound| bound.location);
        let Some(location) = wanted.cloned().or(bound) else { return Ok(None) };
        Bucket::probe(&location, &Access::from_env()).await?;
        Ok(Some(location))
    }

    /// A store in a local directory, made if it is missing; sweeps what a crash left
    /// half-written. What `put` returned for survives a power cut (fsync).
    pub fn open_local(directory: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open { path: directory.to_owned(), source };
        folder::make(directory).map_err(failed)?;
        // Absolute, so that the process may change its own directory later.
        let directory = directory.canonicalize().map_err(failed)?;
        folder::sweep(&directory).map_err(failed)?;
        let objects = LocalFileSystem::new_with_prefix(&directory)
            .map_err(|e| failed(std::io::Error::other(e)))?
            .with_fsync(true);
        Ok(Self::at(Place::Directory { path: directory, objects }))
    }

    async fn open_bucket(bound: &Binding, access: &Access) -> Result<Self, StoreError> {
        Ok(Self::at(Place::Bucket(Bucket::open(bound, access).await?)))
    }

    fn at(place: Place) -> Self {
        let directory = match &place {
            Place::Directory { path, .. } => Some(path.as_path()),
            Place::Bucket(_) => None,
        };
        let folders = (0..FOLDERS).map(|first_byte| Folder::new(directory, first_byte)).collect();
        Self(Arc::new(Inner { place, folders, young: Young::default() }))
    }

    /// Whether the blobs are in a bucket, where each request costs.
    pub fn is_bucket(&self) -> bool {
        matches!(self.0.place, Place::Bucket(_))
    }

    /// The bucket's own URL of a blob, from which anyone can read it for an hour; `None` in a directory.
    pub async fn presign(&self, digest: &Digest) -> Result<Option<String>, StoreError> {
        match &self.0.place {
            Place::Directory { .. } => Ok(None),
            Place::Bucket(bucket) => bucket.presign(&self.0.location(digest)).await.map(Some),
        }
    }

    /// Stores bytes durably and returns their name. Goes on to its end when the caller leaves.
    pub async fn put(&self, bytes: Bytes) -> Result<Digest, StoreError> {
        let store = self.clone();
        unbroken(async move { store.write(bytes).await }).await
    }

    /// Reads a blob and checks that it hashes to its name; `None` if there is none.
    pub async fn get(&self, digest: &Digest) -> Result<Option<Bytes>, StoreError> {
        let failed = |e| StoreError::object("read", *digest, 0, e);
        let found = match self.0.objects().get(&self.0.location(digest)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(failed)?,
        };
        let (actual, bytes) = hash(found.bytes().await.map_err(failed)?).await?;
        if actual != *digest {
            return Err(StoreError::Damaged { digest: *digest, actual, size: bytes.len() as u64 });
        }
        Ok(Some(bytes))
    }

    /// Size of a blob that is about to be named somewhere; `None` if there is none. It counts as
    /// just put: [`delete_old`](Self::delete_old) spares it.
    pub async fn renew(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        let _folder = self.folder(digest).lock().await;
        let size = self.size(digest).await?;
        if size.is_some() {
            self.0.young.mark(*digest);
        }
        Ok(size)
    }

    /// Size of a blob; `None` if there is none. Does not read it.
    pub async fn size(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        match self.0.objects().head(&self.0.location(digest)).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(StoreError::object("look up", *digest, 0, e)),
        }
    }

    /// The blobs whose digests begin with `first_byte` and that were written `age` ago or earlier.
    pub async fn old(&self, first_byte: u8, age: Duration) -> Result<Vec<Digest>, StoreError> {
        let time = SystemTime::now().checked_sub(age);
        let path = match &self.0.place {
            Place::Directory { path, .. } => path.clone(),
            Place::Bucket(bucket) => return bucket.written_by(first_byte, time).await,
        };
        tokio::task::spawn_blocking(move || folder::written_by(&path, first_byte, time))
            .await
            .map_err(|_| StoreError::Interrupted)?
            .map_err(|source| StoreError::List { first_byte, source })
    }

    /// Removes a blob, durably, unless it was put or renewed within `age`; says whether it did.
    /// Whoever will name it in a row renews it first, so that it can't go in between. Goes on
    /// like `put`.
    pub async fn delete_old(&self, digest: &Digest, age: Duration) -> Result<bool, StoreError> {
        let (store, digest) = (self.clone(), *digest);
        unbroken(async move { store.remove_old(digest, age).await }).await
    }

    /// Forgets which blobs were put or renewed before `age`: nobody asks with a longer one.
    pub fn forget_renewals(&self, age: Duration) {
        self.0.young.forget(age);
    }

    async fn write(&self, bytes: Bytes) -> Result<Digest, StoreError> {
        let (digest, bytes) = hash(bytes).await?;
        let size = bytes.len() as u64;
        // Held from the look to the write: of two writers of one blob the second waits until
        // the first is durable instead of believing a name that isn't yet.
        let mut folder = self.folder(&digest).lock().await;
        self.0.young.mark(digest);
        if self.size(&digest).await? == Some(size) {
            folder.sync().await.map_err(|e| StoreError::io("sync", digest, size, e))?;
            return Ok(digest);
        }
        let at = self.0.location(&digest);
        let written = match &self.0.place {
            Place::Directory { objects, .. } => objects.put(&at, bytes.into()).await.map(drop),
            Place::Bucket(bucket) => bucket.put(&at, bytes).await,
        };
        written.map_err(|e| StoreError::object("write", digest, size, e))?;
        Ok(digest)
    }

    async fn remove_old(&self, digest: Digest, age: Duration) -> Result<bool, StoreError> {
        // A `put` or `renew` of the same blob comes wholly before or wholly after.
        let _folder = self.folder(&digest).lock().await;
        if self.0.young.is_within(digest, age) {
            return Ok(false);
        }
        match self.0.objects().delete(&self.0.location(&digest)).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(StoreError::object("delete", digest, 0, e)),
        }
    }

    fn folder(&self, digest: &Digest) -> &Folder {
        &self.0.folders[usize::from(digest.0[0])]
    }
}

impl Inner {
    fn objects(&self) -> &dyn ObjectStore {
        match &self.place {
            Place::Directory { objects, .. } => objects,
            Place::Bucket(bucket) => bucket.objects(),
        }
    }

    /// Where a blob lies in the store's directory or bucket.
    fn location(&self, digest: &Digest) -> ObjectPath {
        let name = digest.to_string();
        let name = format!("{}/{name}", &name[..2]);
        match &self.place {
            Place::Directory { .. } => ObjectPath::from(name),
            Place::Bucket(bucket) => bucket.path(&name),
        }
    }
}

/// Runs a change of the disk to its end even if nobody waits for it any more: the folder must
/// stay locked for as long as the blocking part underneath, which can't be stopped, goes on.
async fn unbroken<T: Send + 'static>(
    change: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::spawn(change).await.map_err(|_| StoreError::Interrupted)?
}

/// Hashes without holding up the runtime's thread, and gives the bytes back.
async fn hash(bytes: Bytes) -> Result<(Digest, Bytes), StoreError> {
    if bytes.len() < HASH_ASIDE {
        return Ok((Digest::of(&bytes), bytes));
    }
    tokio::task::spawn_blocking(move || (Digest::of(&bytes), bytes))
        .await
        .map_err(|_| StoreError::Interrupted)
}

#[cfg(test)]
mod tests;

//! Blobs by digest: a local directory today, an S3-compatible bucket later (object_store).
//! Knows bytes and digests, never tensors.
//!
//! ```text
//! DIR/3f/3f9a…c1       a blob: 64 hexadecimal digits, in a folder named by the first two
//! DIR/3f/3f9a…c1#1     one that was being written; swept when the store is opened
//! ```
//!
//! A blob is written beside its place, synced and renamed, and then its folder is synced:
//! what has a blob's name is whole, and what `put` returned for survives a power cut. A blob
//! is never changed. Whoever reads one gets bytes that hash to its name, or an error.
//!
//! One process owns a directory (whoever holds the journal beside it).

mod error;
mod folder;
mod young;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use object_store::{ObjectStoreExt, local::LocalFileSystem, path::Path as ObjectPath};

use crate::types::Digest;

pub use error::StoreError;

use folder::{FOLDERS, Folder};
use young::Young;

/// From here on bytes are hashed on a thread of their own: SHA-256 takes about 1 ms for it,
/// as long as a task may keep its runtime's thread.
const HASH_ASIDE: usize = 1 << 20;

/// Blobs named by the SHA-256 of their bytes. Writing one that exists is free.
///
/// Cheap to clone; works on any tokio runtime.
#[derive(Clone)]
pub struct BlobStore(Arc<Inner>);

struct Inner {
    objects: LocalFileSystem,
    /// One for each first byte of a digest.
    folders: Vec<Folder>,
    young: Young,
}

impl BlobStore {
    /// A store in a local directory, made if it is missing; sweeps what a crash left
    /// half-written. What `put` returned for survives a power cut (fsync).
    pub fn open_local(directory: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Open { path: directory.to_owned(), source };
        folder::make(directory).map_err(failed)?;
        // Absolute, so that the process may change its own directory later.
        let directory = &directory.canonicalize().map_err(failed)?;
        folder::sweep(directory).map_err(failed)?;
        let objects = LocalFileSystem::new_with_prefix(directory)
            .map_err(|e| failed(std::io::Error::other(e)))?
            .with_fsync(true);
        let folders = (0..FOLDERS).map(|first_byte| Folder::new(directory, first_byte)).collect();
        Ok(Self(Arc::new(Inner { objects, folders, young: Young::default() })))
    }

    /// Stores bytes durably and returns their name. Goes on to its end when the caller leaves.
    pub async fn put(&self, bytes: Bytes) -> Result<Digest, StoreError> {
        let store = self.clone();
        unbroken(async move { store.write(bytes).await }).await
    }

    /// Reads a blob and checks that it hashes to its name; `None` if there is none.
    pub async fn get(&self, digest: &Digest) -> Result<Option<Bytes>, StoreError> {
        let failed = |e| StoreError::object("read", *digest, 0, e);
        let found = match self.0.objects.get(&location(digest)).await {
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
        match self.0.objects.head(&location(digest)).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(StoreError::object("look up", *digest, 0, e)),
        }
    }

    /// The blobs whose digests begin with `first_byte` and that were written `age` ago or earlier.
    pub async fn old(&self, first_byte: u8, age: Duration) -> Result<Vec<Digest>, StoreError> {
        let path = self.0.folders[usize::from(first_byte)].path().to_owned();
        let written_by = SystemTime::now().checked_sub(age);
        tokio::task::spawn_blocking(move || folder::written_by(&path, written_by))
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
        self.0
            .objects
            .put(&location(&digest), bytes.into())
            .await
            .map_err(|e| StoreError::object("write", digest, size, e))?;
        Ok(digest)
    }

    async fn remove_old(&self, digest: Digest, age: Duration) -> Result<bool, StoreError> {
        // A `put` or `renew` of the same blob comes wholly before or wholly after.
        let _folder = self.folder(&digest).lock().await;
        if self.0.young.is_within(digest, age) {
            return Ok(false);
        }
        match self.0.objects.delete(&location(&digest)).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(StoreError::object("delete", digest, 0, e)),
        }
    }

    fn folder(&self, digest: &Digest) -> &Folder {
        &self.0.folders[usize::from(digest.0[0])]
    }
}

/// Where a blob lies below the store's directory.
fn location(digest: &Digest) -> ObjectPath {
    let name = digest.to_string();
    ObjectPath::from(format!("{}/{name}", &name[..2]))
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
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn store() -> (tempfile::TempDir, BlobStore) {
        let directory = tempfile::tempdir().unwrap();
        let store = BlobStore::open_local(&directory.path().join("blobs")).unwrap();
        (directory, store)
    }

    fn file_of(directory: &tempfile::TempDir, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        directory.path().join("blobs").join(&name[..2]).join(name)
    }

    #[tokio::test]
    async fn what_is_put_is_read_back_after_reopening() {
        let (directory, store) = store();
        let large = Bytes::from(vec![7; HASH_ASIDE + 1]);
        for bytes in [Bytes::new(), Bytes::from_static(b"adapter"), large] {
            let digest = store.put(bytes.clone()).await.unwrap();
            assert_eq!(digest, Digest::of(&bytes));
            let again = BlobStore::open_local(&directory.path().join("blobs")).unwrap();
            assert_eq!(again.get(&digest).await.unwrap(), Some(bytes.clone()));
            assert_eq!(again.size(&digest).await.unwrap(), Some(bytes.len() as u64));
        }
    }

    #[tokio::test]
    async fn a_missing_blob_is_none_and_deleting_it_is_no_error() {
        let (_directory, store) = store();
        let digest = Digest::of(b"never stored");
        assert_eq!(store.get(&digest).await.unwrap(), None);
        assert_eq!(store.size(&digest).await.unwrap(), None);
        assert!(!store.delete_old(&digest, Duration::ZERO).await.unwrap());
    }

    #[tokio::test]
    async fn a_deleted_blob_is_gone_and_can_be_put_again() {
        let (_directory, store) = store();
        let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
        assert!(store.delete_old(&digest, Duration::ZERO).await.unwrap());
        assert_eq!(store.get(&digest).await.unwrap(), None);
        store.put(Bytes::from_static(b"blob")).await.unwrap();
        assert_eq!(store.get(&digest).await.unwrap().unwrap(), "blob");
    }

    #[tokio::test]
    async fn a_blob_that_was_just_put_or_renewed_is_not_deleted() {
        let (directory, store) = store();
        let hour = Duration::from_secs(3_600);
        let put = store.put(Bytes::from_static(b"put")).await.unwrap();
        assert!(!store.delete_old(&put, hour).await.unwrap());
        // To a process that has just started it is old, until somebody wants it.
        let again = BlobStore::open_local(&directory.path().join("blobs")).unwrap();
        assert_eq!(again.renew(&put).await.unwrap(), Some(3));
        assert!(!again.delete_old(&put, hour).await.unwrap());
        let again = BlobStore::open_local(&directory.path().join("blobs")).unwrap();
        again.put(Bytes::from_static(b"put")).await.unwrap();
        assert!(!again.delete_old(&put, hour).await.unwrap(), "a put that wrote nothing counts");
        assert_eq!(again.renew(&Digest::of(b"absent")).await.unwrap(), None);
        let again = BlobStore::open_local(&directory.path().join("blobs")).unwrap();
        assert!(again.delete_old(&put, hour).await.unwrap());
    }

    #[tokio::test]
    async fn blobs_are_listed_by_their_first_byte_once_they_are_old() {
        let (directory, store) = store();
        let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
        let half = PathBuf::from(format!("{}#1", file_of(&directory, &digest).display()));
        std::fs::write(half, b"bl").unwrap();
        assert_eq!(store.old(digest.0[0], Duration::from_secs(3_600)).await.unwrap(), []);
        assert_eq!(store.old(digest.0[0], Duration::ZERO).await.unwrap(), [digest]);
        assert_eq!(store.old(!digest.0[0], Duration::ZERO).await.unwrap(), [], "a folder that is not there");
    }

    #[tokio::test]
    async fn a_blob_that_exists_is_not_written_again() {
        let (directory, store) = store();
        let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
        let inode = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(path).unwrap().ino()
        };
        let before = inode(&file_of(&directory, &digest));
        store.put(Bytes::from_static(b"blob")).await.unwrap();
        assert_eq!(inode(&file_of(&directory, &digest)), before);
    }

    #[tokio::test]
    async fn a_flipped_bit_is_an_error_that_names_the_blob() {
        let (directory, store) = store();
        let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
        std::fs::write(file_of(&directory, &digest), b"blub").unwrap();
        let error = store.get(&digest).await.unwrap_err();
        assert!(matches!(error, StoreError::Damaged { digest: d, size: 4, .. } if d == digest));
        assert!(error.to_string().contains(&digest.to_string()), "{error}");
    }

    #[tokio::test]
    async fn a_truncated_blob_is_replaced_by_the_next_put() {
        let (directory, store) = store();
        let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
        std::fs::write(file_of(&directory, &digest), b"bl").unwrap();
        store.put(Bytes::from_static(b"blob")).await.unwrap();
        assert_eq!(store.get(&digest).await.unwrap().unwrap(), "blob");
    }

    #[tokio::test]
    async fn what_a_crash_left_half_written_is_swept() {
        let (directory, store) = store();
        let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
        let whole = file_of(&directory, &digest);
        let half = PathBuf::from(format!("{}#1", whole.display()));
        let foreign = directory.path().join("blobs").join("notes#1");
        std::fs::write(&half, b"bl").unwrap();
        std::fs::write(&foreign, b"not ours").unwrap();
        BlobStore::open_local(&directory.path().join("blobs")).unwrap();
        assert!(!half.exists() && whole.exists() && foreign.exists());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn writers_of_one_blob_do_not_disturb_each_other() {
        let (directory, store) = store();
        let puts = (0..16).map(|i| {
            let store = store.clone();
            tokio::spawn(async move { store.put(Bytes::from(vec![i % 2; 100_000])).await.unwrap() })
        });
        for digest in futures::future::join_all(puts).await {
            assert!(store.get(&digest.unwrap()).await.unwrap().is_some());
        }
        let left = walk(&directory.path().join("blobs"));
        assert_eq!(left.iter().filter(|p| p.to_string_lossy().contains('#')).count(), 0);
        assert_eq!(left.len(), 2);
    }

    fn walk(directory: &Path) -> Vec<PathBuf> {
        let folders = std::fs::read_dir(directory).unwrap().map(|f| f.unwrap().path());
        folders.flat_map(|f| std::fs::read_dir(f).unwrap().map(|e| e.unwrap().path())).collect()
    }

    #[test]
    fn a_path_that_cannot_be_a_directory_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = BlobStore::open_local(file.path()).err().unwrap();
        assert!(error.to_string().contains(&file.path().display().to_string()), "{error}");
    }
}

//! The store in a local directory.

use std::path::{Path, PathBuf};

use super::super::*;

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

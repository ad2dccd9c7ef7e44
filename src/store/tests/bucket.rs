//! The store in a bucket of a real S3 server.

#[path = "../../../tests/service/s3_server.rs"]
mod s3_server;

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use super::super::*;
use s3_server::{BUCKET, S3Server};

/// A server, a data directory, and the place that its blobs go to.
struct Place {
    server: S3Server,
    directory: tempfile::TempDir,
    location: BucketLocation,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = S3Server::start(&directory.path().join("s3"));
        Self::data_dir_of(&directory, "data");
        let location = format!("s3://{BUCKET}/runs").parse().unwrap();
        Self { server, directory, location }
    }

    fn data_dir_of(directory: &tempfile::TempDir, name: &str) -> PathBuf {
        let path = directory.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn data_dir(&self) -> PathBuf {
        Self::data_dir_of(&self.directory, "data")
    }

    fn access(&self) -> Access {
        Access::from_variables(self.server.environment().into_iter())
    }

    /// The same with one variable changed.
    fn access_but(&self, name: &str, value: &str) -> Access {
        let changed = |(known, old): (String, String)| match known == name {
            true => (known, value.to_owned()),
            false => (known, old),
        };
        Access::from_variables(self.server.environment().into_iter().map(changed))
    }

    async fn open(&self) -> Result<BlobStore, StoreError> {
        BlobStore::open_with(&self.data_dir(), Some(&self.location), &self.access()).await
    }

    fn object_of(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.server.object(&format!("runs/{}/{name}", &name[..2]))
    }
}

#[tokio::test]
async fn what_is_put_is_read_back_after_reopening() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    // The last goes in parts.
    for size in [0, 1, HASH_ASIDE + 1, (64 << 20) + 5] {
        let bytes = Bytes::from(vec![7; size]);
        let digest = store.put(bytes.clone()).await.unwrap();
        assert_eq!(digest, Digest::of(&bytes));
        // The data directory remembers its bucket.
        let again = BlobStore::open_with(&place.data_dir(), None, &place.access()).await.unwrap();
        assert!(again.get(&digest).await.unwrap() == Some(bytes), "{size} bytes");
        assert_eq!(again.size(&digest).await.unwrap(), Some(size as u64));
        assert_eq!(fs::metadata(place.object_of(&digest)).unwrap().len(), size as u64);
    }
}

#[tokio::test]
async fn a_blob_goes_when_it_is_old_and_comes_again() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let (hour, now) = (Duration::from_secs(3_600), Duration::ZERO);
    let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
    assert_eq!(store.old(digest.0[0], hour).await.unwrap(), []);
    assert_eq!(store.old(digest.0[0], now).await.unwrap(), [digest]);
    assert_eq!(store.old(!digest.0[0], now).await.unwrap(), [], "nothing begins so");
    assert!(!store.delete_old(&digest, hour).await.unwrap());
    assert!(store.delete_old(&digest, now).await.unwrap());
    assert_eq!(store.get(&digest).await.unwrap(), None);
    assert_eq!(store.renew(&digest).await.unwrap(), None);
    store.put(Bytes::from_static(b"blob")).await.unwrap();
    assert_eq!(store.get(&digest).await.unwrap().unwrap(), "blob");
}

#[tokio::test]
async fn damage_is_told_and_mended_by_the_next_put() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let digest = store.put(Bytes::from_static(b"blob")).await.unwrap();
    fs::write(place.object_of(&digest), b"blub").unwrap();
    assert!(matches!(store.get(&digest).await, Err(StoreError::Damaged { digest: d, .. }) if d == digest));
    fs::write(place.object_of(&digest), b"bl").unwrap();
    store.put(Bytes::from_static(b"blob")).await.unwrap();
    assert_eq!(store.get(&digest).await.unwrap().unwrap(), "blob");
}

#[tokio::test]
async fn anyone_can_read_a_presigned_url_and_no_other() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let digest = store.put(Bytes::from_static(b"adapter")).await.unwrap();
    let url = store.presign(&digest).await.unwrap().unwrap();
    let read = |url: String| tokio::task::spawn_blocking(move || http_get(&url));
    let answer = read(url.clone()).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("adapter"), "{answer}");
    let other = store.put(Bytes::from_static(b"other")).await.unwrap().to_string();
    let (mine, other) = (digest.to_string(), other);
    let forged =
        url.replace(&mine, &other).replace(&format!("/{}/", &mine[..2]), &format!("/{}/", &other[..2]));
    assert_ne!(forged, url);
    let answer = read(forged).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    let (unsigned, _) = url.split_once('?').unwrap();
    let answer = read(unsigned.to_owned()).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
}

fn http_get(url: &str) -> String {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test]
async fn a_bucket_that_can_not_be_used_is_refused_by_what_is_wrong_with_it() {
    let place = Place::new();
    let missing: BucketLocation = "s3://no-such-bucket/runs".parse().unwrap();
    let error = BlobStore::open_with(&place.data_dir(), Some(&missing), &place.access()).await.err().unwrap();
    assert!(matches!(error, StoreError::NoBucket { .. }), "{error}");

    let location = Some(&place.location);
    for (name, value) in [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "unknown")] {
        let access = place.access_but(name, value);
        let error = BlobStore::open_with(&place.data_dir(), location, &access).await.err().unwrap();
        assert!(matches!(error, StoreError::Forbidden { .. }), "{name}: {error}");
        assert!(error.is_final());
    }
    let access = place.access_but("AWS_SECRET_ACCESS_KEY", "");
    let error = BlobStore::open_with(&place.data_dir(), location, &access).await.err().unwrap();
    assert!(error.to_string().contains("belong together"), "{error}");

    let access = place.access_but("AWS_ENDPOINT_URL", "http://127.0.0.1:9");
    let error = BlobStore::open_with(&place.data_dir(), location, &access).await.err().unwrap();
    assert!(matches!(error, StoreError::Unreachable { .. }) && !error.is_final(), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");

    // A refusal is not remembered.
    place.open().await.unwrap();
}

#[tokio::test]
async fn blobs_stay_where_they_are_and_whose_they_are() {
    let place = Place::new();
    place.open().await.unwrap();
    let elsewhere: BucketLocation = format!("s3://{BUCKET}/other").parse().unwrap();
    let error =
        BlobStore::open_with(&place.data_dir(), Some(&elsewhere), &place.access()).await.err().unwrap();
    assert!(matches!(error, StoreError::Elsewhere { .. }), "{error}");

    // Another data directory would sweep them.
    let another = Place::data_dir_of(&place.directory, "another");
    let error = BlobStore::open_with(&another, Some(&place.location), &place.access()).await.err().unwrap();
    assert!(matches!(error, StoreError::Owned { .. }), "{error}");

    // And so would this one's journal miss those that it has beside it.
    let local = Place::data_dir_of(&place.directory, "local");
    let store = BlobStore::open_with(&local, None, &place.access()).await.unwrap();
    store.put(Bytes::from_static(b"blob")).await.unwrap();
    let error = BlobStore::open_with(&local, Some(&elsewhere), &place.access()).await.err().unwrap();
    assert!(error.to_string().contains("blobs"), "{error}");
}

#[tokio::test]
async fn a_probe_leaves_nothing() {
    let place = Place::new();
    Bucket::probe(&place.location, &place.access()).await.unwrap();
    let left = fs::read_dir(place.server.object("runs")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
    let error = Bucket::probe(&place.location, &place.access_but("AWS_SECRET_ACCESS_KEY", "x")).await;
    assert!(matches!(error, Err(StoreError::Forbidden { .. })));
}

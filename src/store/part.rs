//! Parts of blobs, for readers that can't hold a whole one.

use std::ops::Range;

use bytes::Bytes;
use object_store::ObjectStoreExt;

use crate::types::Digest;

use super::{BlobStore, StoreError};

impl BlobStore {
    /// Reads some bytes of a blob; `None` if there is none, or it ends before them. Unlike
    /// [`get`](Self::get) it can't tell that they are what they were: whoever has all parts hashes them.
    pub async fn part(&self, digest: &Digest, part: Range<u64>) -> Result<Option<Bytes>, StoreError> {
        match self.size(digest).await? {
            Some(size) if part.end <= size => {}
            _ => return Ok(None),
        }
        let failed = |e| StoreError::object("read", *digest, part.end - part.start, e);
        match self.0.objects().get_range(&self.0.location(digest), part.clone()).await {
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            read => Ok(Some(read.map_err(failed)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_is_read_alone() {
        let directory = tempfile::tempdir().unwrap();
        let store = BlobStore::open_local(&directory.path().join("blobs")).unwrap();
        let digest = store.put(Bytes::from_static(b"0123456789")).await.unwrap();
        let read = async |part| store.part(&digest, part).await.unwrap();
        assert_eq!(read(2..5).await.as_deref(), Some(&b"234"[..]));
        assert_eq!(read(0..10).await.as_deref(), Some(&b"0123456789"[..]));
        assert_eq!(read(8..11).await, None, "past its end");
        assert_eq!(store.part(&Digest::of(b"absent"), 0..1).await.unwrap(), None);
    }
}

//! An S3-compatible bucket: how it is reached, and whose blobs are in it.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    Error, ObjectStore, ObjectStoreExt, PutMode, PutPayload, WriteMultipart,
    aws::AmazonS3,
    path::Path as ObjectPath,
    signer::{Method, Signer},
};

use crate::types::Digest;

use super::{
    BucketLocation, StoreError,
    access::{Access, Retries},
    binding::Binding,
};

/// How long a presigned URL is good for.
const URL_GOOD_FOR: Duration = Duration::from_secs(3_600);

/// For all that is asked of a bucket where a person waits: at the start, and for `lockstep doctor`.
const CLAIM_DEADLINE: Duration = Duration::from_secs(15);

/// Blobs above it are written in parts, each of which is sent again by itself.
const WHOLE_MAX: usize = 64 << 20;

/// Length of a part: with S3's 10,000 parts a blob could have 160 GiB.
const PART: usize = 16 << 20;

/// Parts on their way at once.
const PARTS_AT_ONCE: usize = 4;

/// A prefix of a bucket, and the way to it.
pub(super) struct Bucket {
    location: BucketLocation,
    objects: AmazonS3,
}

impl Bucket {
    /// Reaches the bucket, and makes sure that the prefix is this data directory's: nobody else may
    /// sweep it.
    pub async fn open(binding: &Binding, access: &Access) -> Result<Self, StoreError> {
        let claiming = Self::reach(&binding.location, access, Retries::Few)?;
        claiming.in_time(claiming.claim(&binding.owner)).await?;
        Self::reach(&binding.location, access, Retries::Many)
    }

    /// Whether everything that a store does to a bucket can be done; leaves nothing there.
    pub async fn probe(location: &BucketLocation, access: &Access) -> Result<(), StoreError> {
        let bucket = Self::reach(location, access, Retries::Few)?;
        let at = bucket.path(&format!("probe-{}", std::process::id()));
        let all = async {
            bucket.objects.list(Some(&bucket.path("00"))).try_next().await?;
            bucket.objects.put(&at, PutPayload::from_static(b"lockstep")).await?;
            bucket.objects.get(&at).await?.bytes().await?;
            bucket.objects.delete(&at).await
        };
        bucket.in_time(async { all.await.map_err(|error| bucket.unusable(error)) }).await
    }

    fn reach(location: &BucketLocation, access: &Access, retries: Retries) -> Result<Self, StoreError> {
        Ok(Self { objects: access.connect(location, retries)?, location: location.clone() })
    }

    async fn in_time(&self, work: impl Future<Output = Result<(), StoreError>>) -> Result<(), StoreError> {
        tokio::time::timeout(CLAIM_DEADLINE, work).await.unwrap_or_else(|_| {
            let problem = format!("no answer within {} s", CLAIM_DEADLINE.as_secs());
            Err(StoreError::Unreachable { location: self.location.clone(), problem })
        })
    }

    /// Reads and writes `PREFIX/owner`.
    async fn claim(&self, owner: &str) -> Result<(), StoreError> {
        let failed = |error| self.unusable(error);
        // First, as it tells a bucket that is not there from one that has no owner yet.
        self.objects.list(Some(&self.path("00"))).try_next().await.map_err(failed)?;
        let at = self.path("owner");
        let ours = || PutPayload::from(owner.to_owned());
        let mode = match self.objects.get(&at).await {
            // Written again, as only that shows that this process may write.
            Ok(found) => match found.bytes().await.map_err(failed)? {
                same if same == owner => PutMode::Overwrite,
                _ => return Err(StoreError::Owned { location: self.location.clone() }),
            },
            Err(Error::NotFound { .. }) => PutMode::Create,
            Err(error) => return Err(failed(error)),
        };
        match self.objects.put_opts(&at, ours(), mode.into()).await {
            Ok(_) | Err(Error::AlreadyExists { .. }) => {}
            // Some servers know no conditions; that another service claims the same prefix in the same
            // moment is then seen by what is read below.
            Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => {
                self.objects.put(&at, ours()).await.map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        let found = self.objects.get(&at).await.map_err(failed)?.bytes().await.map_err(failed)?;
        if found == owner { Ok(()) } else { Err(StoreError::Owned { location: self.location.clone() }) }
    }

    pub fn objects(&self) -> &AmazonS3 {
        &self.objects
    }

    /// Below the prefix.
    pub fn path(&self, name: &str) -> ObjectPath {
        match self.location.prefix.as_str() {
            "" => ObjectPath::from(name),
            prefix => ObjectPath::from(format!("{prefix}/{name}")),
        }
    }

    /// Writes a blob; once it returns, the bucket has promised to keep it.
    pub async fn put(&self, at: &ObjectPath, bytes: Bytes) -> Result<(), Error> {
        if bytes.len() <= WHOLE_MAX {
            return self.objects.put(at, bytes.into()).await.map(drop);
        }
        let upload = self.objects.put_multipart(at).await?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART);
        for start in (0..bytes.len()).step_by(PART) {
            if let Err(error) = parts.wait_for_capacity(PARTS_AT_ONCE).await {
                // Parts that can't be removed cost room, nothing else.
                let _ = parts.abort().await;
                return Err(error);
            }
            parts.put(bytes.slice(start..bytes.len().min(start + PART)));
        }
        parts.finish().await.map(drop)
    }

    /// The blobs whose digests begin with `first_byte` that were written at `time` or earlier, by the
    /// bucket's clock; none if there is no such time.
    pub async fn written_by(
        &self,
        first_byte: u8,
        time: Option<SystemTime>,
    ) -> Result<Vec<Digest>, StoreError> {
        let Some(time) = time else { return Ok(Vec::new()) };
        let below = self.path(&format!("{first_byte:02x}"));
        let listed = self.objects.list(Some(&below)).try_filter_map(|object| async move {
            // What has another name is not ours.
            let digest: Option<Digest> = object.location.filename().and_then(|name| name.parse().ok());
            Ok(digest.filter(|_| SystemTime::from(object.last_modified) <= time))
        });
        listed.try_collect().await.map_err(|error| self.unusable(error))
    }

    /// A URL from which anyone can read the object for an hour.
    pub async fn presign(&self, at: &ObjectPath) -> Result<String, StoreError> {
        let url = self.objects.signed_url(Method::GET, at, URL_GOOD_FOR).await;
        url.map(String::from).map_err(|error| self.unusable(error))
    }

    /// Says what is wrong with the bucket as a whole.
    fn unusable(&self, error: Error) -> StoreError {
        let (location, problem) = (self.location.clone(), deepest(&error));
        match &error {
            Error::NotFound { .. } => StoreError::NoBucket { location },
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                StoreError::Forbidden { location, problem }
            }
            // Of a failed list, object_store says the status only in words.
            _ if problem == "NoSuchBucket" => StoreError::NoBucket { location },
            _ if innermost(&error).contains("status code: 403") => {
                StoreError::Forbidden { location, problem }
            }
            _ => StoreError::Unreachable { location, problem },
        }
    }
}

/// The innermost cause, which says what happened; of an S3 answer its code.
pub(super) fn deepest(error: &dyn std::error::Error) -> String {
    let text = innermost(error);
    let between = |open: &str, close: &str| Some(text.split_once(open)?.1.split_once(close)?.0.to_owned());
    between("<Code>", "</Code>").unwrap_or(text)
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

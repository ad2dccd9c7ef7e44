use std::{error::Error, io, path::PathBuf};

use crate::types::{Digest, ErrorKind, OperationError};

use super::{BucketLocation, bucket};

/// How object_store calls its S3 client in its errors.
const S3: &str = "S3";

/// Why a blob can't be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory can't be made, read or swept: a matter of its path or permissions.
    #[error("cannot open the blob store in {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// The bytes on disk are not those that were stored. Nothing that needs them can go on
    /// until they are put again.
    #[error("blob {digest} is damaged: its {size} bytes hash to {actual}; restore it from a copy")]
    Damaged { digest: Digest, actual: Digest, size: u64 },
    /// The disk, or the quota on it, has no room. Worth another try once there is.
    #[error("no room for blob {digest} of {size} bytes: the disk is full")]
    Full { digest: Digest, size: u64 },
    /// The disk failed.
    #[error("cannot {action} blob {digest}: {source}")]
    Io { action: &'static str, digest: Digest, source: Box<dyn Error + Send + Sync> },
    /// A folder of blobs can't be read.
    #[error("cannot list the blobs that begin with {first_byte:02x}: {source}")]
    List { first_byte: u8, source: io::Error },
    /// `--store` is not what it should be.
    #[error("`--store` {given:?}: {problem}; write s3://BUCKET/PREFIX")]
    Location { given: String, problem: String },
    /// The data directory's blobs are somewhere else, and its journal names them.
    #[error(
        "the blobs of {} are in {is}, not in {asked}: start without --store, or with another --data-dir",
        data_dir.display()
    )]
    Elsewhere { is: String, asked: BucketLocation, data_dir: PathBuf },
    /// Another service sweeps this prefix.
    #[error("{location} holds the blobs of another data directory; choose another prefix")]
    Owned { location: BucketLocation },
    #[error("{location}: this bucket does not exist at AWS_ENDPOINT_URL in AWS_REGION")]
    NoBucket { location: BucketLocation },
    #[error(
        "{location}: the bucket's server refuses this process ({problem}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"
    )]
    Forbidden { location: BucketLocation, problem: String },
    /// Worth another try once the way to the bucket is open again.
    #[error("{location} can't be reached: {problem}; check AWS_ENDPOINT_URL, AWS_REGION and the credentials")]
    Unreachable { location: BucketLocation, problem: String },
    #[error("the system gives no random numbers: {0}")]
    Random(String),
    /// The bucket's server, or the way to it. Requests were repeated before this is said.
    #[error("cannot {action} blob {digest} in the bucket: {problem}")]
    Bucket { action: &'static str, digest: Digest, problem: String },
    /// The runtime shut down underneath.
    #[error("the runtime shut down before the blob store had answered")]
    Interrupted,
}

impl StoreError {
    /// Tells a full disk from other failures, however deep object_store has wrapped it.
    pub(super) fn object(
        action: &'static str,
        digest: Digest,
        size: u64,
        source: object_store::Error,
    ) -> Self {
        let mut cause: Option<&(dyn Error + 'static)> = Some(&source);
        while let Some(error) = cause {
            if error.downcast_ref().is_some_and(is_full) {
                return Self::Full { digest, size };
            }
            cause = error.source();
        }
        match source {
            object_store::Error::Generic { store: S3, .. } => {
                Self::Bucket { action, digest, problem: bucket::deepest(&source) }
            }
            source => Self::Io { action, digest, source: Box::new(source) },
        }
    }

    /// Whether another start would end the same way.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Unreachable { .. } | Self::Interrupted)
    }

    /// The same for a bare error of the file system.
    pub(super) fn io(action: &'static str, digest: Digest, size: u64, source: io::Error) -> Self {
        match is_full(&source) {
            true => Self::Full { digest, size },
            false => Self::Io { action, digest, source: Box::new(source) },
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<StoreError> for OperationError {
    fn from(error: StoreError) -> Self {
        let kind = match error {
            StoreError::Full { .. } => ErrorKind::ResourceExhausted,
            StoreError::Interrupted | StoreError::Unreachable { .. } | StoreError::Bucket { .. } => {
                ErrorKind::Unavailable
            }
            StoreError::Open { .. }
            | StoreError::Damaged { .. }
            | StoreError::Io { .. }
            | StoreError::List { .. }
            | StoreError::Location { .. }
            | StoreError::Elsewhere { .. }
            | StoreError::Owned { .. }
            | StoreError::NoBucket { .. }
            | StoreError::Forbidden { .. }
            | StoreError::Random(_) => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrapped(source: io::Error) -> object_store::Error {
        let source = object_store::Error::Generic { store: "inner", source: Box::new(source) };
        object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(source) }
    }

    #[test]
    fn a_full_disk_is_told_from_a_broken_one() {
        let digest = Digest::of(b"blob");
        let of = |source| StoreError::object("write", digest, 4, source);
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            assert!(matches!(of(wrapped(kind.into())), StoreError::Full { size: 4, .. }));
        }
        let broken = of(wrapped(io::ErrorKind::PermissionDenied.into()));
        assert!(matches!(broken, StoreError::Io { action: "write", .. }));
    }
}

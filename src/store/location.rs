use std::{fmt, str::FromStr};

use super::StoreError;

/// S3's bounds on a bucket's name, in bytes.
const BUCKET_BYTES: std::ops::RangeInclusive<usize> = 3..=63;

/// Longest prefix. A key has at most 1,024 bytes, of which a blob's name takes 68.
const PREFIX_BYTES_MAX: usize = 512;

/// A place in an S3-compatible bucket, written `s3://BUCKET/PREFIX`; the prefix may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketLocation {
    pub(super) bucket: String,
    /// Without slashes at its ends.
    pub(super) prefix: String,
}

impl FromStr for BucketLocation {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let refused = |problem| StoreError::Location { given: text.to_owned(), problem };
        let path = text.strip_prefix("s3://").ok_or_else(|| refused("it must begin with s3://".into()))?;
        let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
        let named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        if !BUCKET_BYTES.contains(&bucket.len()) || !bucket.bytes().all(named) {
            let problem = format!(
                "bucket {bucket:?} must have {} to {} lower-case letters, digits, dots or hyphens",
                BUCKET_BYTES.start(),
                BUCKET_BYTES.end()
            );
            return Err(refused(problem));
        }
        let prefix = prefix.trim_matches('/');
        // What needs no escape in a key or a URL, and no part that a path could lose.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.=/".contains(c);
        let parts = || prefix.split('/');
        if !prefix.chars().all(plain) || (!prefix.is_empty() && parts().any(|p| matches!(p, "" | "." | "..")))
        {
            let problem = "the prefix may have letters, digits, `-`, `_`, `.`, `=`, between single slashes";
            return Err(refused(problem.into()));
        }
        if prefix.len() > PREFIX_BYTES_MAX {
            let problem = format!("the prefix has {} bytes, at most {PREFIX_BYTES_MAX} fit", prefix.len());
            return Err(refused(problem));
        }
        Ok(Self { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

impl fmt::Display for BucketLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_read_and_written() {
        for (given, shown) in [
            ("s3://team-models", "s3://team-models"),
            ("s3://team-models/", "s3://team-models"),
            ("s3://team.models/runs/a=1/", "s3://team.models/runs/a=1"),
        ] {
            assert_eq!(given.parse::<BucketLocation>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn a_bad_location_is_refused_by_what_is_wrong_with_it() {
        for (given, problem) in [
            ("/var/blobs", "begin with s3://"),
            ("s3://", "3 to 63"),
            ("s3://Team/x", "lower-case"),
            ("s3://team/a//b", "single slashes"),
            ("s3://team/../b", "single slashes"),
            ("s3://team/a b", "single slashes"),
            (&format!("s3://team/{}", "x".repeat(513)), "513 bytes"),
        ] {
            let error = given.parse::<BucketLocation>().unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains(given), "{given}: {error}");
        }
    }
}

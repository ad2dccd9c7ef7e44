//! Which bucket holds a data directory's blobs, remembered beside its journal:
//!
//! ```text
//! DATA/store     s3://BUCKET/PREFIX
//!                OWNER                  32 hexadecimal digits, as in PREFIX/owner
//! ```
//!
//! A journal's rows name blobs in one place. Without this, a start that forgot `--store` would find none
//! of them, and two services that were given one prefix would sweep each other's.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use super::{BucketLocation, StoreError};

/// Name of the file.
const FILE: &str = "store";

/// Longest file that is read: a location and an owner.
const FILE_BYTES_MAX: u64 = 1 << 10;

/// A data directory's bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binding {
    pub location: BucketLocation,
    /// Tells this data directory, and its copies, from others.
    pub owner: String,
}

impl Binding {
    /// A binding to a bucket that nothing is in yet.
    pub fn new(location: BucketLocation) -> Result<Self, StoreError> {
        let mut owner = [0; 16];
        getrandom::fill(&mut owner).map_err(|e| StoreError::Random(e.to_string()))?;
        Ok(Self { location, owner: hex::encode(owner) })
    }

    /// What the data directory remembers; `None`: its blobs are beside the journal.
    pub fn read(data_dir: &Path) -> Result<Option<Self>, StoreError> {
        let path = data_dir.join(FILE);
        let failed = |source| StoreError::Open { path: path.clone(), source };
        let size = match fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(failed)?.len(),
        };
        let damaged =
            || failed(io::Error::new(io::ErrorKind::InvalidData, "a bucket and its owner expected"));
        if size > FILE_BYTES_MAX {
            return Err(damaged());
        }
        let text = fs::read_to_string(&path).map_err(failed)?;
        let mut lines = text.lines();
        let (Some(location), Some(owner), None) = (lines.next(), lines.next(), lines.next()) else {
            return Err(damaged());
        };
        let is_owner = owner.len() == 32 && owner.bytes().all(|b| b.is_ascii_hexdigit());
        match location.parse() {
            Ok(location) if is_owner => Ok(Some(Self { location, owner: owner.to_owned() })),
            _ => Err(damaged()),
        }
    }

    /// Remembers it durably.
    pub fn write(&self, data_dir: &Path) -> Result<(), StoreError> {
        let (path, beside) = (data_dir.join(FILE), data_dir.join("store.new"));
        let failed = |source| StoreError::Open { path: path.clone(), source };
        let mut file = File::create(&beside).map_err(failed)?;
        writeln!(file, "{}\n{}", self.location, self.owner).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        fs::rename(&beside, &path).map_err(failed)?;
        File::open(data_dir).and_then(|directory| directory.sync_all()).map_err(failed)
    }

    /// Forgets it: nothing was stored there yet.
    pub fn forget(data_dir: &Path) -> Result<(), StoreError> {
        let path = data_dir.join(FILE);
        fs::remove_file(&path).map_err(|source| StoreError::Open { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binding_is_remembered_and_damage_is_told() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Binding::read(directory.path()).unwrap(), None);
        let binding = Binding::new("s3://team/runs".parse().unwrap()).unwrap();
        binding.write(directory.path()).unwrap();
        assert_eq!(Binding::read(directory.path()).unwrap(), Some(binding));
        for damaged in ["", "s3://team/runs\n", "s3://team/runs\nzz\n", "s3://T\n0123\n"] {
            fs::write(directory.path().join(FILE), damaged).unwrap();
            assert!(Binding::read(directory.path()).is_err(), "{damaged:?}");
        }
        Binding::forget(directory.path()).unwrap();
        assert_eq!(Binding::read(directory.path()).unwrap(), None);
    }
}

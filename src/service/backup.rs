//! A data directory's copy while its coordinator works.
//!
//! ```text
//!   PATH/journal.sqlite    as of one moment; written last, so that only a whole backup has one
//!   PATH/blobs/            what it names, from wherever the service keeps it
//!   PATH/ca/, identity/, tokens/, presign.key     so that nodes, clients and URLs stay good
//! ```
//!
//! A coordinator is started on it as on any data directory. Models and logs are not in it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    client::{ConnectTarget, ServiceClient},
    journal,
    store::BlobStore,
};

use super::{DataDirectory, ServiceError};

/// What is copied as it lies there: whose cluster it is.
const TRUST: [&str; 4] = ["ca", "identity", "tokens", "presign.key"];

/// What a backup holds.
#[derive(Debug, Clone)]
pub struct BackedUp {
    pub blobs: usize,
    /// Of blobs and journal.
    pub bytes: u64,
    pub journal_bytes: u64,
    pub took: Duration,
}

/// Writes a backup of a running coordinator's data directory into `to`, which must be new or empty.
pub async fn back_up(data: &DataDirectory, to: &Path) -> Result<BackedUp, ServiceError> {
    let started = Instant::now();
    if !data.path().join("ca").is_dir() {
        let reason = format!(
            "{} has no cluster's `ca`: run it where the coordinator's data directory is",
            data.path().display()
        );
        return Err(ServiceError::Refused { part: "backup".into(), reason });
    }
    let to = DataDirectory::open(to)?;
    let to = to.path();
    if fs::read_dir(to).map_err(file(to))?.next().is_some() {
        let reason = format!("{} is not empty; give it a new directory", to.display());
        return Err(ServiceError::Refused { part: "backup".into(), reason });
    }
    let client = ServiceClient::connect(ConnectTarget::from(data.path())).await?;
    let copy = client.back_up_journal().await?;
    let beside = to.join("journal.new");
    fs::write(&beside, client.blob(copy).await?).map_err(file(&beside))?;

    let named: BTreeMap<_, _> =
        journal::named_blobs(&beside)?.into_iter().map(|blob| (blob.digest, blob)).collect();
    let store = BlobStore::open_local(&to.join("blobs"))?;
    let mut bytes = copy.size;
    for blob in named.values() {
        store.put(Bytes::from(client.blob(*blob).await?)).await?;
        bytes += blob.size;
    }
    for name in TRUST {
        copy_all(&data.path().join(name), &to.join(name))?;
    }
    let whole = to.join(journal::FILE);
    File::open(&beside).and_then(|copied| copied.sync_all()).map_err(file(&beside))?;
    fs::rename(&beside, &whole).map_err(file(&whole))?;
    File::open(to).and_then(|directory| directory.sync_all()).map_err(file(to))?;
    Ok(BackedUp { blobs: named.len(), bytes, journal_bytes: copy.size, took: started.elapsed() })
}

/// Copies a file, or a directory of files, with who may read it; nothing if it is not there.
fn copy_all(from: &Path, to: &Path) -> Result<(), ServiceError> {
    match fs::metadata(from) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(file(from)(e)),
        Ok(found) if found.is_dir() => {
            fs::create_dir(to).map_err(file(to))?;
            fs::set_permissions(to, found.permissions()).map_err(file(to))?;
            for entry in fs::read_dir(from).map_err(file(from))? {
                let name = entry.map_err(file(from))?.file_name();
                copy_all(&from.join(&name), &to.join(&name))?;
            }
            Ok(())
        }
        Ok(_) => {
            fs::copy(from, to).map_err(file(from))?;
            File::open(to).and_then(|copied| copied.sync_all()).map_err(file(to))
        }
    }
}

fn file(path: &Path) -> impl Fn(io::Error) -> ServiceError + use<> {
    let path: PathBuf = path.to_owned();
    move |source| ServiceError::File { path: path.clone(), source }
}

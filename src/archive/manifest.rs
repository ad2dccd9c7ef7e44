use std::{
    fs::{self, File},
    io::Write,
    path::{Component, Path},
};

use serde::{Deserialize, Serialize};

use crate::types::{Checkpoint, Digest};

use super::ArchiveError;

/// Name of the manifest.
pub const MANIFEST: &str = "checkpoint.json";

/// Version of the manifest's format.
const VERSION: u32 = 1;

/// Largest manifest that is read: a thousand files take a tenth of it.
const MANIFEST_MAX: u64 = 1 << 20;

/// What a checkpoint's directory holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    /// The checkpoint, as the service listed it.
    pub checkpoint: Checkpoint,
    /// Its files, by name.
    pub files: Vec<ManifestFile>,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    pub name: String,
    pub size_bytes: u64,
    /// Of its bytes; the digest under which the service keeps it.
    pub sha256: Digest,
}

impl Manifest {
    fn of(checkpoint: &Checkpoint, files: &[(String, Vec<u8>)]) -> Self {
        let file = |(name, bytes): &(String, Vec<u8>)| ManifestFile {
            name: name.clone(),
            size_bytes: bytes.len() as u64,
            sha256: Digest::of(bytes),
        };
        let mut files: Vec<ManifestFile> = files.iter().map(file).collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Self { version: VERSION, checkpoint: checkpoint.clone(), files }
    }

    /// The manifest of a directory; `None` if it has none.
    pub(super) fn read(directory: &Path) -> Result<Option<Self>, ArchiveError> {
        let path = directory.join(MANIFEST);
        let refused = |problem: String| ArchiveError::Manifest { file: MANIFEST.to_owned(), problem };
        let size = match fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(|e| ArchiveError::file(&path, e))?.len(),
        };
        if size > MANIFEST_MAX {
            return Err(refused(format!("{size} bytes are over the limit of {MANIFEST_MAX}")));
        }
        let json = fs::read(&path).map_err(|e| ArchiveError::file(&path, e))?;
        let manifest: Self = serde_json::from_slice(&json).map_err(|e| refused(e.to_string()))?;
        if manifest.version != VERSION {
            let problem = format!("it has version {}, this build reads {VERSION}", manifest.version);
            return Err(refused(problem));
        }
        match manifest.files.iter().find(|file| !is_plain(&file.name)) {
            Some(file) => Err(ArchiveError::Name { file: file.name.clone() }),
            None => Ok(Some(manifest)),
        }
    }
}

/// Writes a checkpoint's files into `directory`, which must be empty or not exist, and then the
/// manifest. Returns once everything is on disk.
pub fn write(
    directory: &Path,
    checkpoint: &Checkpoint,
    files: &[(String, Vec<u8>)],
) -> Result<Manifest, ArchiveError> {
    refuse_filled(directory)?;
    if let Some((file, _)) = files.iter().find(|(name, _)| !is_plain(name)) {
        return Err(ArchiveError::Name { file: file.clone() });
    }
    let manifest = Manifest::of(checkpoint, files);
    fs::create_dir_all(directory).map_err(|e| ArchiveError::file(directory, e))?;
    for (name, bytes) in files {
        write_durably(&directory.join(name), bytes)?;
    }
    // A struct of numbers and strings always has a JSON form.
    let mut json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    json.push(b'\n');
    write_durably(&directory.join(MANIFEST), &json)?;
    Ok(manifest)
}

/// Refuses a directory that holds something.
pub(super) fn refuse_filled(directory: &Path) -> Result<(), ArchiveError> {
    match fs::read_dir(directory) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(ArchiveError::file(directory, e)),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(ArchiveError::NotEmpty { path: directory.to_owned() }),
        },
    }
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), ArchiveError> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|e| ArchiveError::file(path, e))
}

/// Whether a name stays in its directory, and is not the manifest's.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(part)) if part == name);
    plain && components.next().is_none() && name != MANIFEST
}

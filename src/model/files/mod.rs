//! A model's files on disk, in either form: found, checked and described without reading the
//! weights into memory.

mod gguf;
mod hugging_face;
mod remote;

#[cfg(test)]
mod smollm2;
#[cfg(test)]
pub(super) mod tests;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(super) use remote::remote_system;

use memmap2::Mmap;
use serde_json::{Map, Value};

use super::{
    BaseWeights, ModelConfig, ModelError, TextCodec,
    weights::{self, FromSource, Gguf, Shards},
};
use crate::{
    kernels::{MatrixForm, WeightDtype},
    types::{Digest, Hasher},
};

/// Largest text file (tokenizer.json, an index, a template) that is read into memory; Llama
/// 3's tokenizer has 17 MB.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// A model whose files are all there and whose weights have the right names, types and shapes;
/// the weights themselves were not read.
pub(super) struct ModelFiles {
    pub config: ModelConfig,
    pub text: Arc<TextCodec>,
    /// Every file it is made of, sorted by name.
    files: Vec<PathBuf>,
    form: Form,
}

enum Form {
    HuggingFace(Shards),
    Gguf(PathBuf),
}

impl ModelFiles {
    /// Opens a Hugging Face directory or a GGUF file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let metadata = fs::metadata(path).map_err(|error| ModelError::unreadable(path, &error))?;
        match metadata.is_dir() {
            true => hugging_face::open(path),
            // Opening a pipe would wait for its writer.
            false if !metadata.is_file() => Err(ModelError::malformed(path, "it is no file")),
            false => gguf::open(path),
        }
    }

    /// Bytes of memory that [the weights](Self::load_weights) take.
    pub fn weight_bytes(&self, dtype: WeightDtype) -> Result<u64, ModelError> {
        Ok(weights::loaded_bytes(&self.config, &*self.read(dtype)?))
    }

    /// Reads the weights, which takes seconds. They have the values of `dtype`, and are held as the file has
    /// them where that loses nothing.
    pub fn load_weights(&self, dtype: WeightDtype) -> Result<BaseWeights, ModelError> {
        weights::assemble(&self.config, &*self.read(dtype)?)
    }

    /// The same, if no file has changed since these stamps were taken; looked at when all is read, because the files
    /// are opened anew by their names.
    pub fn load_unchanged(&self, dtype: WeightDtype, stamps: &[Stamp]) -> Result<BaseWeights, ModelError> {
        let weights = self.load_weights(dtype)?;
        self.check_unchanged(stamps)?;
        Ok(weights)
    }

    /// What each matrix is held as, `None` of a vector, in the order of [`Weight::all`](weights::Weight::all).
    pub fn weight_forms(&self, dtype: WeightDtype) -> Result<Vec<Option<MatrixForm>>, ModelError> {
        Ok(weights::loaded_forms(&self.config, &*self.read(dtype)?))
    }

    /// What reads the weights one by one.
    pub fn read(&self, dtype: WeightDtype) -> Result<Box<dyn weights::Read + '_>, ModelError> {
        Ok(match &self.form {
            Form::HuggingFace(shards) => Box::new(FromSource::new(&self.config, shards.open()?, dtype)?),
            Form::Gguf(path) => Box::new(FromSource::new(&self.config, Gguf::open(path)?, dtype)?),
        })
    }

    /// SHA-256 over each file's name and content, in the order of names; of a GGUF, the file's
    /// own. So the digest names the model wherever its directory stands.
    pub fn digest(&self) -> Result<Digest, ModelError> {
        let mut hasher = Hasher::default();
        for path in &self.files {
            if let Form::HuggingFace(_) = &self.form {
                let name = path.file_name().unwrap_or_default().as_encoded_bytes();
                hasher.update(&(name.len() as u64).to_le_bytes());
                hasher.update(name);
                hasher.update(&stamp(path)?.size.to_le_bytes());
            }
            hash_file(path, &mut hasher)?;
        }
        Ok(hasher.finish())
    }

    /// Every file it is made of, sorted by name.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter()
    }

    /// The stamp of every file, to see later whether one has changed.
    pub fn stamps(&self) -> Result<Vec<Stamp>, ModelError> {
        self.files.iter().map(|path| stamp(path)).collect()
    }

    /// Refuses files of which one isn't as it was when its stamp was taken.
    pub fn check_unchanged(&self, stamps: &[Stamp]) -> Result<(), ModelError> {
        let now = self.stamps()?;
        match stamps.iter().zip(&now).find(|(then, now)| then != now) {
            Some((changed, _)) => Err(ModelError::Changed { path: changed.path.clone() }),
            None => Ok(()),
        }
    }
}

/// What tells a changed file from an unchanged one without reading it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Stamp {
    pub path: PathBuf,
    /// Where the path leads, over links, which may come to lead elsewhere.
    pub target: PathBuf,
    pub size: u64,
    /// Since the Unix epoch.
    pub modified_ns: u64,
    /// On a disk of this machine: another file that came by a rename has another one. Elsewhere the same file may have
    /// another at the next look (FUSE), as a disk's own number may at the next start (overlayfs, btrfs).
    pub inode: Option<u64>,
}

impl Stamp {
    pub fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let modified = metadata.modified()?;
        let since_epoch = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            path: path.to_owned(),
            target: fs::canonicalize(path)?,
            size: metadata.len(),
            modified_ns: since_epoch.as_nanos().try_into().unwrap_or(u64::MAX),
            inode: remote_system(&file)?.is_none().then(|| metadata.ino()),
        })
    }
}

fn stamp(path: &Path) -> Result<Stamp, ModelError> {
    Stamp::of(path).map_err(|error| ModelError::unreadable(path, &error))
}

/// Maps a file of weights read-only.
pub(super) fn map_file(path: &Path) -> Result<Mmap, ModelError> {
    let unreadable = |error| ModelError::unreadable(path, &error);
    let file = File::open(path).map_err(unreadable)?;
    // SAFETY: the map is read-only and lives as long as one load. A file that somebody truncates
    // meanwhile kills the process (SIGBUS), as it does in every reader that maps weights; model
    // files are installed by rename and never rewritten in place.
    unsafe { Mmap::map(&file) }.map_err(unreadable)
}

/// A whole text file, refused when it is larger than any real one.
pub(super) fn read_text(path: &Path) -> Result<String, ModelError> {
    let unreadable = |error| ModelError::unreadable(path, &error);
    let file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    if size > MAX_TEXT_BYTES {
        return Err(ModelError::TooLarge { path: path.to_owned(), size, limit: MAX_TEXT_BYTES });
    }
    let mut text = String::new();
    file.take(MAX_TEXT_BYTES).read_to_string(&mut text).map_err(unreadable)?;
    Ok(text)
}

/// A file that holds one JSON object.
pub(super) fn read_json(path: &Path) -> Result<Map<String, Value>, ModelError> {
    serde_json::from_str(&read_text(path)?).map_err(|error| ModelError::malformed(path, error.to_string()))
}

fn hash_file(path: &Path, hasher: &mut Hasher) -> Result<(), ModelError> {
    /// Large enough that reading isn't bound by system calls.
    const PIECE_BYTES: usize = 1 << 20;
    let unreadable = |error| ModelError::unreadable(path, &error);
    let mut file = File::open(path).map_err(unreadable)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match file.read(&mut piece).map_err(unreadable)? {
            0 => return Ok(()),
            read => hasher.update(&piece[..read]),
        }
    }
}

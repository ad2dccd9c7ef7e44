//! A file of packed weights: a decoder's matrices as the kernels read them, to be mapped.
//!
//! ```text
//!   0    8   "LSPACK\r\n"
//!   8    4   LAYOUT of the kernels, as this machine writes a u32: another order of bytes is another layout
//!  12    4   length of the table, likewise
//!  16   32   SHA-256 of the table
//!  48   16   zeros
//!  64    …   the table: JSON; zeros to the next multiple of 64
//!   …    …   tensors in the table's order, each from a multiple of 64 on, zeros between them
//! ```
//!
//! The beginning is written last, so a file that isn't whole is none. Opening one proves all but the tensors'
//! values: those, [`Pack::verify`] compares with the digest that the table has of them.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufWriter, Read as _, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::{Advice, Mmap};
use serde::{Deserialize, Serialize};

use super::disk;
use crate::{
    kernels::{ALIGNMENT, LAYOUT, Matrix, MatrixForm},
    model::{
        BaseWeights, ModelConfig, ModelError,
        weights::{Read, Weight, assemble},
    },
    types::{Digest, Hasher},
};

const MAGIC: [u8; 8] = *b"LSPACK\r\n";

/// Bytes before the table.
const PREFIX: usize = 64;

/// Longest table that is read, in bytes: a mixture with 128 experts in each of 94 layers has 4 MB.
const MAX_TABLE: usize = 16 << 20;

/// What is written at a time, in bytes.
const PIECE: usize = 1 << 20;

/// Why a file is no use.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// On NFS and the like a map can be taken away.
    #[error("it is on {system}, which may take a mapped file away")]
    Remote { system: &'static str },
    /// Another user could write to it while it is mapped.
    #[error("it belongs to the user {uid}")]
    Owner { uid: u32 },
    /// The same, of this user's file.
    #[error("others may write to it: its mode is {mode:03o}")]
    Mode { mode: u32 },
    /// It has not got its name yet.
    #[error("it is being written, or its writer was killed")]
    Unfinished,
    /// It ends before its table does, or begins with something else.
    #[error("it is no file of packed weights")]
    Foreign,
    /// Written by another version of the kernels.
    #[error("it has layout {found}, this program has {LAYOUT}")]
    Layout { found: u32 },
    /// The table is damaged.
    #[error("its table {problem}")]
    Table { problem: String },
    /// Truncated, or something was appended.
    #[error("it has {found} bytes instead of {expected}")]
    Length { expected: u64, found: u64 },
    /// Another model's, or the same in another dtype.
    #[error("it holds the model {found}, not {expected}", found = .found.short(), expected = .expected.short())]
    Model { expected: Digest, found: Digest },
    /// A weight has another shape than the model's or another form than this program holds it in, or lies where
    /// none can.
    #[error("its tensor {index} {problem}")]
    Tensor { index: usize, problem: &'static str },
    /// The tensors' values are not those that were written.
    #[error("its content has the digest {found} instead of {expected}", found = .found.short(), expected = .expected.short())]
    Content { expected: Digest, found: Digest },
}

/// What is in a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    /// Identity of the base model, its dtype in it.
    pub model: Digest,
    /// Where the model's files stood, for people and for [tidying up](super::PackCache).
    pub source: PathBuf,
    pub dtype: String,
    /// Of everything behind the table.
    pub content: Digest,
    /// Bytes behind the table.
    pub bytes: u64,
    /// In the order of [`Weight::all`].
    tensors: Vec<Tensor>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tensor {
    /// Absent: a vector of f32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    form: Option<MatrixForm>,
    shape: Vec<usize>,
    /// First byte, counted from the first behind the table.
    start: usize,
}

/// A mapped file.
pub(super) struct Pack {
    path: PathBuf,
    pub table: Table,
    map: Arc<Mmap>,
    /// Where the tensors begin.
    data: usize,
}

/// What a file is made of, and for.
pub(super) struct Contents<'a> {
    pub model: Digest,
    pub source: &'a Path,
    pub dtype: String,
    pub config: &'a ModelConfig,
    pub weights: &'a dyn Read,
}

/// Why a file can't be written: the model is at fault, or the file system.
#[derive(Debug)]
pub(super) enum WriteError {
    Model(ModelError),
    Io(io::Error),
}

impl Pack {
    /// Maps the file and proves all but the values. It must be one that is replaced by a rename or removed, and
    /// never written to or shortened.
    pub fn open(path: &Path) -> Result<Self, PackError> {
        let (file, table, data) = open(path)?;
        disk::check_local(&file)?;
        disk::check_ours(&file.metadata()?)?;
        // SAFETY: the map is read-only. Nobody writes to or shortens the file: no other user may write to it, and
        // Lockstep, which gave it its name when it was whole, only ever renames another one over it or removes it.
        // That leaves a map as it is, because the file is on a disk of this machine, which keeps what is mapped.
        let map = unsafe { Mmap::map(&file) }?;
        let expected = (data as u64).saturating_add(table.bytes);
        if map.len() as u64 != expected {
            return Err(PackError::Length { expected, found: map.len() as u64 });
        }
        Ok(Self { path: path.to_owned(), table, map: Arc::new(map), data })
    }

    /// Reads every byte and compares.
    pub fn verify(&self) -> Result<(), PackError> {
        let mut hasher = Hasher::default();
        self.map[self.data..].chunks(PIECE).for_each(|piece| hasher.update(piece));
        match (self.table.content, hasher.finish()) {
            (expected, found) if expected == found => Ok(()),
            (expected, found) => Err(PackError::Content { expected, found }),
        }
    }

    /// The weights of this model, which stay where they are and are held in these forms (of
    /// [`ModelFiles::weight_forms`](crate::model::files::ModelFiles::weight_forms)).
    pub fn weights(
        &self,
        config: &ModelConfig,
        model: Digest,
        forms: &[Option<MatrixForm>],
    ) -> Result<BaseWeights, PackError> {
        if self.table.model != model {
            return Err(PackError::Model { expected: model, found: self.table.model });
        }
        let index: HashMap<Weight, usize> = Weight::all(config).zip(0..).collect();
        if index.len() != self.table.tensors.len() {
            let problem = format!("has {} tensors instead of {}", self.table.tensors.len(), index.len());
            return Err(PackError::Table { problem });
        }
        let mut end = 0;
        for (index, (weight, tensor)) in Weight::all(config).zip(&self.table.tensors).enumerate() {
            if tensor.shape != weight.shape(config) {
                return Err(PackError::Tensor { index, problem: "has another shape than the model's" });
            }
            if forms.get(index) != Some(&tensor.form) {
                return Err(PackError::Tensor {
                    index,
                    problem: "has another form than this program holds it in",
                });
            }
            let Some(length) = tensor.bytes().filter(|_| tensor.start == end) else {
                return Err(PackError::Tensor {
                    index,
                    problem: "begins where the one before it does not end",
                });
            };
            end = aligned(end + length);
        }
        if end as u64 != self.table.bytes {
            return Err(PackError::Table { problem: format!("ends at {end} of {} bytes", self.table.bytes) });
        }
        // Asked for soon; what isn't in memory is read from now on, and not page by page.
        let _ = self.map.advise(Advice::WillNeed);
        assemble(config, &Reader { pack: self, index })
            .map_err(|error| PackError::Table { problem: error.to_string() })
    }

    fn part(&self, index: usize) -> Option<(&Tensor, std::ops::Range<usize>)> {
        let tensor = self.table.tensors.get(index)?;
        let start = self.data.checked_add(tensor.start)?;
        Some((tensor, start..start.checked_add(tensor.bytes()?)?))
    }
}

/// Opens a file and reads what stands before the tensors; returns also where those begin.
fn open(path: &Path) -> Result<(File, Table, usize), PackError> {
    let foreign = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => PackError::Foreign,
        _ => error.into(),
    };
    let damaged = |problem: &str| PackError::Table { problem: problem.to_owned() };
    let mut file = File::open(path)?;
    let mut prefix = [0; PREFIX];
    file.read_exact(&mut prefix).map_err(foreign)?;
    let (magic, rest) = prefix.split_at(MAGIC.len());
    let number = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
    if magic != MAGIC {
        return Err(PackError::Foreign);
    }
    if number(0) != LAYOUT {
        return Err(PackError::Layout { found: number(0) });
    }
    let length = number(4) as usize;
    if length > MAX_TABLE {
        return Err(damaged("is longer than any"));
    }
    let mut table = vec![0; length];
    file.read_exact(&mut table).map_err(foreign)?;
    if Digest::of(&table).0 != rest[8..40] {
        return Err(damaged("has another digest than it should"));
    }
    let table: Table = serde_json::from_slice(&table).map_err(|error| damaged(&error.to_string()))?;
    Ok((file, table, aligned(PREFIX + length)))
}

/// What a file says that it holds.
pub(super) fn table_of(path: &Path) -> Result<Table, PackError> {
    open(path).map(|(_, table, _)| table)
}

/// Writes a file that isn't there yet, or is anybody's, and makes it durable: what is in it is then read from it.
pub(super) fn write(file: &File, contents: &Contents<'_>) -> Result<(), WriteError> {
    let Contents { config, weights, .. } = contents;
    let mut table = contents.table();
    let text = |table: &Table| serde_json::to_vec(table).map_err(|error| WriteError::Io(error.into()));
    // A digest's text has the same length whatever it is.
    let length = text(&table)?.len();
    let data = aligned(PREFIX + length);
    let mut to = BufWriter::with_capacity(PIECE, file);
    to.write_all(&vec![0; data])?;
    let mut hasher = Hasher::default();
    let mut write = |bytes: &[u8]| {
        for bytes in [bytes, &[0; ALIGNMENT][..aligned(bytes.len()) - bytes.len()]] {
            hasher.update(bytes);
            to.write_all(bytes)?;
        }
        Ok::<_, io::Error>(())
    };
    for (weight, tensor) in Weight::all(config).zip(&table.tensors) {
        if tensor.form.is_none() {
            let values = weights.vector(weight)?;
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
            write(&bytes)?;
            continue;
        }
        let matrix = weights.matrix(weight)?;
        debug_assert_eq!(Some(matrix.packed_bytes().len()), tensor.bytes());
        write(matrix.packed_bytes())?;
        if weight == Weight::Embed && config.tie_word_embeddings {
            // It is the embedding, or the model is refused.
            weights.tied_head(&matrix)?;
        }
    }
    to.flush()?;
    table.content = hasher.finish();
    let table = text(&table)?;
    let mut beginning = MAGIC.to_vec();
    beginning.extend_from_slice(&LAYOUT.to_ne_bytes());
    beginning.extend_from_slice(&(table.len() as u32).to_ne_bytes());
    beginning.extend_from_slice(&Digest::of(&table).0);
    beginning.resize(PREFIX, 0);
    beginning.extend_from_slice(&table);
    file.write_all_at(&beginning, 0)?;
    Ok(file.sync_all()?)
}

impl Contents<'_> {
    /// Its table, but for the digest.
    fn table(&self) -> Table {
        let mut end = 0;
        let tensors = Weight::all(self.config).map(|weight| {
            let shape = weight.shape(self.config);
            let form = (shape.len() == 2).then(|| self.weights.form(weight));
            let tensor = Tensor { form, shape, start: end };
            end = aligned(end + tensor.bytes().unwrap_or_default());
            tensor
        });
        let tensors = tensors.collect();
        Table {
            model: self.model,
            source: self.source.to_owned(),
            dtype: self.dtype.clone(),
            content: Digest([0; 32]),
            bytes: end as u64,
            tensors,
        }
    }

    /// Bytes that the tensors take.
    pub fn bytes(&self) -> u64 {
        self.table().bytes
    }
}

impl Tensor {
    /// `None` of a shape that nothing has.
    fn bytes(&self) -> Option<usize> {
        match (self.form, &self.shape[..]) {
            (None, [values]) => values.checked_mul(size_of::<f32>()),
            (Some(form), [outputs, inputs]) => Some(form.bytes_of(*outputs, *inputs)),
            _ => None,
        }
    }
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Gives out the weights of a mapped file.
struct Reader<'a> {
    pack: &'a Pack,
    index: HashMap<Weight, usize>,
}

impl Reader<'_> {
    fn damaged(&self, weight: Weight) -> ModelError {
        ModelError::malformed(&self.pack.path, format!("{weight:?} lies where none can"))
    }
}

impl Read for Reader<'_> {
    fn form(&self, weight: Weight) -> MatrixForm {
        let form = self.index.get(&weight).and_then(|index| self.pack.table.tensors[*index].form);
        form.unwrap_or(MatrixForm::F32)
    }

    fn vector(&self, weight: Weight) -> Result<Vec<f32>, ModelError> {
        let part = self.index.get(&weight).and_then(|index| self.pack.part(*index));
        let bytes = part.filter(|(tensor, _)| tensor.form.is_none());
        let bytes =
            bytes.and_then(|(_, bytes)| self.pack.map.get(bytes)).ok_or_else(|| self.damaged(weight))?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)).collect())
    }

    fn matrix(&self, weight: Weight) -> Result<Matrix, ModelError> {
        let part = self.index.get(&weight).and_then(|index| self.pack.part(*index));
        let matrix = part.and_then(|(tensor, bytes)| {
            let [outputs, inputs] = tensor.shape[..] else { return None };
            Matrix::from_file(tensor.form?, outputs, inputs, &self.pack.map, bytes)
        });
        matrix.ok_or_else(|| self.damaged(weight))
    }
}

impl From<ModelError> for WriteError {
    fn from(error: ModelError) -> Self {
        Self::Model(error)
    }
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

//! The header of a GGUF file, read from bytes that nobody vouches for.
//!
//! ```text
//! "GGUF" · version u32 · tensors u64 · pairs u64
//! pairs  ×  key: string · type u32 · value
//! tensors × name: string · dimensions u32 · each u64, innermost first · type u32 · offset u64
//! padding to the alignment · data, each tensor at its offset
//! ```
//!
//! (ggml, docs/gguf.md.) candle reads this format too, but divides by a forged alignment of 0,
//! lets a second tensor of one name replace the first, and takes 32 bytes of memory for each
//! byte of an array; so its reader is left to the tensors' contents. Here every length is
//! compared with the bytes that are left before anything is allocated, and what was allocated
//! is at most a few times the header.

use std::{collections::BTreeMap, fmt, ops::Range, path::Path};

use candle_core::quantized::GgmlDType;

use crate::model::ModelError;

/// Longest header: Llama 3's, with 128,256 tokens and 280,147 merges, has 8 MB.
const MAX_HEADER_BYTES: usize = 64 << 20;

/// Most dimensions of a tensor (GGML_MAX_DIMS).
const MAX_DIMENSIONS: u32 = 4;

/// Where a tensor may start, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// What a GGUF file says about itself.
#[derive(Debug)]
pub(in crate::model) struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// One value of the metadata; numbers in the widest type of their kind.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::model) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

impl Value {
    /// The value of a whole number of any width.
    pub fn integer(&self) -> Option<i128> {
        if let Self::Integer(integer) = self { Some(*integer) } else { None }
    }

    /// An empty array for scalars of a type.
    fn empty_array_of(kind: u32) -> Self {
        match kind {
            6 | 12 => Self::Floats(Vec::new()),
            7 => Self::Bools(Vec::new()),
            _ => Self::Integers(Vec::new()),
        }
    }

    /// Appends a scalar of the array's own type.
    fn push(&mut self, scalar: Self) {
        match (self, scalar) {
            // A u64 beyond i64 counts as the largest: no list of this format has such values.
            (Self::Integers(values), Self::Integer(value)) => {
                values.push(value.try_into().unwrap_or(i64::MAX))
            }
            (Self::Floats(values), Self::Float(value)) => values.push(value),
            (Self::Bools(values), Self::Bool(value)) => values.push(value),
            (array, scalar) => unreachable!("{scalar:?} read as an element of {array:?}"),
        }
    }
}

/// As a message shows it: a scalar in full, a list by its length.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = match self {
            Self::Integer(integer) => return write!(f, "{integer}"),
            Self::Float(float) => return write!(f, "{float}"),
            Self::Bool(bool) => return write!(f, "{bool}"),
            Self::Text(text) => return write!(f, "{text:?}"),
            Self::Integers(list) => list.len(),
            Self::Floats(list) => list.len(),
            Self::Bools(list) => list.len(),
            Self::Texts(list) => list.len(),
        };
        write!(f, "a list of {list}")
    }
}

/// Where a tensor stands.
#[derive(Debug)]
pub(in crate::model) struct TensorInfo {
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    pub format: GgmlDType,
    /// Bytes in the file.
    pub bytes: Range<usize>,
}

impl Header {
    /// Parses the header of `file`, the whole file at `path`.
    pub fn parse(path: &Path, file: &[u8]) -> Result<Self, ModelError> {
        let header = &file[..file.len().min(MAX_HEADER_BYTES)];
        Parser { path, header, position: 0, reading: "the header".to_owned() }.parse(file.len())
    }
}

struct Parser<'a> {
    path: &'a Path,
    header: &'a [u8],
    position: usize,
    /// What is being read, for messages.
    reading: String,
}

impl Parser<'_> {
    fn parse(mut self, file_bytes: usize) -> Result<Header, ModelError> {
        if self.take(4)? != b"GGUF" {
            return Err(self.malformed("it doesn't begin with GGUF"));
        }
        match self.u32()? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(ModelError::unsupported(self.path, "GGUF", "is big-endian"));
            }
            version => {
                let problem = format!("has version {version}; 2 and 3 are read");
                return Err(ModelError::unsupported(self.path, "GGUF", problem));
            }
        }
        // The smallest pair has an empty key and one byte, the smallest tensor no dimension.
        let tensor_count = self.count("tensors", 8 + 4 + 4 + 8)?;
        let pair_count = self.count("metadata pairs", 8 + 4 + 1)?;
        let metadata = self.metadata(pair_count)?;
        let alignment = self.alignment(&metadata)?;
        let tensors = self.tensors(tensor_count)?;
        let data_start = (self.position as u64).next_multiple_of(alignment);
        let tensors = tensors
            .into_iter()
            .map(|(name, tensor)| {
                Ok((name.clone(), self.place(&name, tensor, data_start, alignment, file_bytes)?))
            })
            .collect::<Result<_, _>>()?;
        Ok(Header { metadata, tensors })
    }

    fn metadata(&mut self, count: usize) -> Result<BTreeMap<String, Value>, ModelError> {
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            self.reading = "a metadata key".to_owned();
            let key = self.string()?;
            self.reading = format!("`{key}`");
            let value = self.value()?;
            if metadata.insert(key, value).is_some() {
                return Err(self.malformed(format!("{} stands in it twice", self.reading)));
            }
        }
        Ok(metadata)
    }

    fn alignment(&self, metadata: &BTreeMap<String, Value>) -> Result<u64, ModelError> {
        match metadata.get("general.alignment") {
            None => Ok(DEFAULT_ALIGNMENT),
            // 8 at least, so that blocks can be read in place.
            Some(&Value::Integer(bytes @ 8..=65_536)) if (bytes as u64).is_power_of_two() => Ok(bytes as u64),
            Some(other) => {
                let problem = format!("is {other}; it must be a power of two from 8 to 65536");
                Err(ModelError::invalid_field(self.path, "general.alignment", problem))
            }
        }
    }

    fn tensors(&mut self, count: usize) -> Result<BTreeMap<String, Unplaced>, ModelError> {
        let mut tensors = BTreeMap::new();
        for _ in 0..count {
            self.reading = "a tensor's name".to_owned();
            let name = self.string()?;
            self.reading = format!("tensor `{name}`");
            let dimensions = self.u32()?;
            if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
                let problem =
                    format!("tensor `{name}` has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}");
                return Err(self.malformed(problem));
            }
            let mut shape = (0..dimensions).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
            shape.reverse();
            let tensor = Unplaced { shape, format: self.u32()?, offset: self.u64()? };
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(ModelError::DuplicateTensor { path: self.path.to_owned(), tensor: name });
            }
        }
        Ok(tensors)
    }

    /// The tensor with its bytes' place, which must lie inside the file.
    fn place(
        &self,
        name: &str,
        tensor: Unplaced,
        data_start: u64,
        alignment: u64,
        file_bytes: usize,
    ) -> Result<TensorInfo, ModelError> {
        let damaged = |problem: &str| self.malformed(format!("tensor `{name}` {problem}"));
        let format = format_of(tensor.format).map_err(|found| ModelError::TensorType {
            path: self.path.to_owned(),
            tensor: name.to_owned(),
            found,
            supported: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K",
        })?;
        let block = format.block_size() as u64;
        let row = tensor.shape.last().copied().unwrap_or(0);
        if tensor.shape.contains(&0) || !row.is_multiple_of(block) {
            return Err(damaged(&format!("has the shape {:?}, not whole blocks of {block}", tensor.shape)));
        }
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(damaged("isn't aligned"));
        }
        let elements = tensor.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let length = elements.and_then(|elements| (elements / block).checked_mul(format.type_size() as u64));
        let start = data_start.checked_add(tensor.offset);
        let end = start.zip(length).and_then(|(start, length)| start.checked_add(length));
        match (start, end) {
            // Both are below the file's length, a usize; and the product of the shape is below it
            // times the block, so each dimension is one too.
            (Some(start), Some(end)) if end <= file_bytes as u64 => Ok(TensorInfo {
                shape: tensor.shape.iter().map(|&size| size as usize).collect(),
                format,
                bytes: start as usize..end as usize,
            }),
            _ => Err(damaged(&format!(
                "reaches past the end of the file, {file_bytes} bytes: it is truncated"
            ))),
        }
    }

    fn value(&mut self) -> Result<Value, ModelError> {
        const STRING: u32 = 8;
        const ARRAY: u32 = 9;
        match self.u32()? {
            STRING => self.string().map(Value::Text),
            ARRAY => self.array(),
            kind => self.scalar(kind),
        }
    }

    fn array(&mut self) -> Result<Value, ModelError> {
        let kind = self.u32()?;
        let smallest = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.malformed(format!("{} is an array of arrays", self.reading))),
            _ => return Err(self.unknown_type(kind)),
        };
        let count = self.count("elements", smallest)?;
        Ok(match kind {
            8 => Value::Texts((0..count).map(|_| self.string()).collect::<Result<_, _>>()?),
            kind => {
                let mut array = Value::empty_array_of(kind);
                for _ in 0..count {
                    let scalar = self.scalar(kind)?;
                    array.push(scalar);
                }
                array
            }
        })
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.bytes()?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Integer(u32::from_le_bytes(self.bytes()?).into()),
            5 => Value::Integer(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            7 => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.malformed(format!("{} is {other}, no bool", self.reading))),
            },
            10 => Value::Integer(u64::from_le_bytes(self.bytes()?).into()),
            11 => Value::Integer(i64::from_le_bytes(self.bytes()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(self.unknown_type(kind)),
        })
    }

    fn string(&mut self) -> Result<String, ModelError> {
        let length = self.count("bytes of text", 1)?;
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.malformed(format!("{} is no UTF-8", self.reading)))
    }

    /// A number of things that take at least `smallest` bytes each, checked against what is left.
    fn count(&mut self, what: &str, smallest: u64) -> Result<usize, ModelError> {
        let count = self.u64()?;
        let left = (self.header.len() - self.position) as u64;
        if count > left / smallest {
            let problem = format!("{}: {count} {what} are announced, {left} bytes are left", self.reading);
            return Err(self.malformed(problem));
        }
        Ok(count as usize)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn take(&mut self, length: usize) -> Result<&[u8], ModelError> {
        let rest = &self.header[self.position..];
        match rest.get(..length) {
            Some(bytes) => {
                self.position += length;
                Ok(bytes)
            }
            None => Err(self.malformed(format!("it ends inside {}", self.reading))),
        }
    }

    fn malformed(&self, problem: impl Into<String>) -> ModelError {
        ModelError::malformed(self.path, problem)
    }

    fn unknown_type(&self, kind: u32) -> ModelError {
        self.malformed(format!("{} has the unknown type {kind}", self.reading))
    }
}

struct Unplaced {
    shape: Vec<u64>,
    format: u32,
    /// From the start of the data.
    offset: u64,
}

/// The number format of this number in ggml.h, or the name of one that isn't read.
fn format_of(number: u32) -> Result<GgmlDType, String> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        9 => return Err("Q8_1".to_owned()),
        15 => return Err("Q8_K".to_owned()),
        16 => return Err("IQ2_XXS".to_owned()),
        17 => return Err("IQ2_XS".to_owned()),
        18 => return Err("IQ3_XXS".to_owned()),
        19 => return Err("IQ1_S".to_owned()),
        20 => return Err("IQ4_NL".to_owned()),
        21 => return Err("IQ3_S".to_owned()),
        22 => return Err("IQ2_S".to_owned()),
        23 => return Err("IQ4_XS".to_owned()),
        28 => return Err("F64".to_owned()),
        29 => return Err("IQ1_M".to_owned()),
        39 => return Err("MXFP4".to_owned()),
        _ => return Err(format!("ggml's type {number}")),
    })
}

#[cfg(test)]
mod tests;

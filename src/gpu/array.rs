use std::{fmt, ops::Range, sync::Arc};

use half::bf16;

use super::{Gpu, GpuError, heap::Memory};

/// What an [`Array`] holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F32,
    Bf16,
    /// Indices: tokens, rows, positions.
    U32,
    /// Offsets of pages, and words of eight bytes whatever they hold.
    U64,
}

/// Values in a GPU's memory; clones and ranges share them.
///
/// Nothing keeps two kernels from writing to the same values: like a kernel's pointers, an array is a
/// place. Operations say which of their arrays they write.
#[derive(Clone)]
pub struct Array {
    memory: Arc<Memory>,
    element: Element,
    /// In elements.
    range: Range<usize>,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 | Self::U32 => 4,
            Self::U64 => 8,
        }
    }

    /// As kernels are named.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::U32 => "u32",
            Self::U64 => "u64",
        }
    }
}

impl Array {
    pub fn element(&self) -> Element {
        self.element
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Bytes of its values.
    pub fn bytes(&self) -> usize {
        self.len() * self.element.bytes()
    }

    /// A part of it, in the same memory.
    ///
    /// # Panics
    ///
    /// If the range ends beyond the array.
    pub fn range(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {} values", self.len());
        let range = self.range.start + range.start..self.range.start + range.end;
        Self { memory: self.memory.clone(), element: self.element, range }
    }

    /// `len` values of another type from byte `from` on, in the same memory.
    ///
    /// # Panics
    ///
    /// If they begin between two values, or end beyond the array.
    pub(super) fn part(&self, from: usize, element: Element, len: usize) -> Self {
        let (size, begin) = (element.bytes(), self.range.start * self.element.bytes() + from);
        assert!(
            begin.is_multiple_of(size) && from + len * size <= self.bytes(),
            "{len} values from {from} on"
        );
        let range = begin / size..begin / size + len;
        Self { memory: self.memory.clone(), element, range }
    }

    /// Where its first value is, as a kernel takes it.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address() + (self.range.start * self.element.bytes()) as u64
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array({} {})", self.len(), self.element.name())
    }
}

impl Gpu {
    /// Memory whose content is not said: whoever asks writes before reading.
    pub fn array(&self, element: Element, len: usize) -> Result<Array, GpuError> {
        let memory = Arc::new(self.allocate(len * element.bytes())?);
        Ok(Array { memory, element, range: 0..len })
    }

    /// Zeros.
    pub fn zeros(&self, element: Element, len: usize) -> Result<Array, GpuError> {
        let memory = Arc::new(self.allocate_zeros(len * element.bytes())?);
        Ok(Array { memory, element, range: 0..len })
    }

    /// The values in the GPU's memory, rounded to `element`, which is a number format.
    pub fn upload(&self, element: Element, values: &[f32]) -> Result<Array, GpuError> {
        match element {
            Element::F32 => self.upload_bytes(element, bytes_of(values)),
            Element::Bf16 => {
                let rounded: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
                self.upload_bytes(element, bytes_of(&rounded))
            }
            Element::U32 | Element::U64 => unreachable!("numbers are f32 or bf16"),
        }
    }

    pub(crate) fn upload_u32(&self, values: &[u32]) -> Result<Array, GpuError> {
        self.upload_bytes(Element::U32, bytes_of(values))
    }

    pub(crate) fn upload_u64(&self, values: &[u64]) -> Result<Array, GpuError> {
        self.upload_bytes(Element::U64, bytes_of(values))
    }

    fn upload_bytes(&self, element: Element, bytes: &[u8]) -> Result<Array, GpuError> {
        let memory = Arc::new(self.allocate(bytes.len())?);
        self.write(&memory, bytes)?;
        Ok(Array { memory, element, range: 0..bytes.len() / element.bytes() })
    }

    /// Fills an array from its memory's beginning on, once what was asked before is done with it.
    ///
    /// # Panics
    ///
    /// If it is a part of its memory that begins further on, or has another size.
    pub(super) fn overwrite(&self, array: &Array, bytes: &[u8]) -> Result<(), GpuError> {
        assert_eq!((array.range.start, array.bytes()), (0, bytes.len()), "an array is overwritten whole");
        self.write(&array.memory, bytes)
    }

    /// The values of an array of numbers, once the GPU has computed them.
    pub fn download(&self, array: &Array) -> Result<Vec<f32>, GpuError> {
        let bytes = self.download_bytes(array)?;
        Ok(match array.element {
            Element::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect(),
            Element::Bf16 => {
                bytes.as_chunks().0.iter().map(|bytes| bf16::from_ne_bytes(*bytes).to_f32()).collect()
            }
            Element::U32 | Element::U64 => unreachable!("numbers are f32 or bf16"),
        })
    }

    /// Fills `to` with the values of an array of f32, with no copy in between.
    ///
    /// # Panics
    ///
    /// If there are more or fewer of them.
    pub(crate) fn download_to(&self, array: &Array, to: &mut [f32]) -> Result<(), GpuError> {
        assert_eq!((array.element, array.len()), (Element::F32, to.len()));
        self.read(&array.memory, array.range.start * array.element.bytes(), bytes_of_mut(to))
    }

    /// The words of an array of U64.
    pub(crate) fn download_u64(&self, array: &Array) -> Result<Vec<u64>, GpuError> {
        assert_eq!(array.element, Element::U64);
        let bytes = self.download_bytes(array)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect())
    }

    fn download_bytes(&self, array: &Array) -> Result<Vec<u8>, GpuError> {
        let mut bytes = vec![0; array.bytes()];
        self.read(&array.memory, array.range.start * array.element.bytes(), &mut bytes)?;
        Ok(bytes)
    }
}

/// Plain numbers: every one of their bytes is written, and any is read.
trait Plain: Copy {}

impl Plain for f32 {}
impl Plain for bf16 {}
impl Plain for u32 {}
impl Plain for u64 {}

/// The bytes of numbers, as they lie in memory.
fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding, and bytes no alignment; the length is that of the same memory.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The same, to be written.
fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`, and any bytes are numbers.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

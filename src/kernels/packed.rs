//! Where a matrix's packed weights lie: in memory of their own, or in a file that is mapped.
//!
//! A mapped file is one physical copy for all processes of a machine that map it, and nothing has to be read,
//! converted or brought into order when it is. The kernels see a slice either way.

use std::{
    marker::PhantomData,
    ops::{Deref, Range},
    slice,
    sync::Arc,
};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::{
    BLOCK, CodeBits, Matrix, WeightDtype,
    blocks::{EightBits, FiveBits, FourBits, SixBits},
    matrix::{PairLine, Panels, ValueLine},
};

/// Version of the order and elements of panels: weights that were written by another one are of no use.
pub const LAYOUT: u32 = 1;

/// What the first byte of a mapped matrix is aligned to, as that of one in memory is.
pub const ALIGNMENT: usize = 64;

/// What panels are made of.
///
/// # Safety
///
/// It has no padding, every pattern of bits is a value of it, and it asks for no more than [`ALIGNMENT`].
pub(super) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: 32 f32, aligned to and a multiple of 64 bytes.
unsafe impl Plain for ValueLine {}
// SAFETY: 32 pairs, each transparently a u32, aligned to and a multiple of 64 bytes.
unsafe impl Plain for PairLine {}
// SAFETY: 64 f32 and 512 bytes of codes, 768 bytes in all: aligned to and a multiple of 64.
unsafe impl Plain for FourBits {}
// SAFETY: 64 f32, 512 bytes and 32 u32 of codes, 896 bytes in all: aligned to and a multiple of 64.
unsafe impl Plain for FiveBits {}
// SAFETY: 64 f32, 512 bytes and 64 u32 of codes, 1024 bytes in all: aligned to and a multiple of 64.
unsafe impl Plain for SixBits {}
// SAFETY: 64 f32 and 1024 bytes of codes, 1280 bytes in all: aligned to and a multiple of 64.
unsafe impl Plain for EightBits {}

const _: () = assert!(size_of::<ValueLine>() == 4 * 32 && size_of::<PairLine>() == 4 * 32);
const _: () = assert!(size_of::<FourBits>() == 2 * 128 + 512 && size_of::<EightBits>() == 2 * 128 + 1024);
const _: () = assert!(size_of::<FiveBits>() == 3 * 128 + 512 && size_of::<SixBits>() == 4 * 128 + 512);

/// Elements that nobody changes; clones share them.
pub(super) enum Packed<T> {
    Memory(Arc<Vec<T>>),
    /// Whole elements in a range of bytes that begins at an [aligned](ALIGNMENT) address.
    File(Arc<Mmap>, Range<usize>, PhantomData<T>),
}

/// How a matrix's weights are held, which with its shape says how many bytes they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatrixForm {
    F32,
    /// Multiplied with rows as they are.
    Bf16,
    /// Multiplied with rows that are rounded to bf16.
    RoundedBf16,
    Blocks(CodeBits),
}

impl<T: Plain> Packed<T> {
    /// Part of a map; `None` if it isn't in there, not whole elements, or not aligned.
    fn of_file(map: &Arc<Mmap>, bytes: Range<usize>) -> Option<Self> {
        let part = map.get(bytes.clone())?;
        let fits =
            part.len().is_multiple_of(size_of::<T>()) && part.as_ptr().addr().is_multiple_of(ALIGNMENT);
        fits.then(|| Self::File(map.clone(), bytes, PhantomData))
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: a plain element has no padding, so all of its bytes are initialised.
        unsafe { slice::from_raw_parts(self.as_ptr().cast(), size_of_val::<[T]>(self)) }
    }
}

impl<T> Packed<T> {
    /// Whether both are the same memory.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Memory(ours), Self::Memory(theirs)) => Arc::ptr_eq(ours, theirs),
            (Self::File(ours, at, _), Self::File(theirs, there, _)) => {
                Arc::ptr_eq(ours, theirs) && at == there
            }
            _ => false,
        }
    }
}

impl<T> From<Vec<T>> for Packed<T> {
    fn from(elements: Vec<T>) -> Self {
        Self::Memory(Arc::new(elements))
    }
}

impl<T> Clone for Packed<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Memory(elements) => Self::Memory(elements.clone()),
            Self::File(map, bytes, _) => Self::File(map.clone(), bytes.clone(), PhantomData),
        }
    }
}

impl<T: Plain> Deref for Packed<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match self {
            Self::Memory(elements) => elements,
            Self::File(map, bytes, _) => {
                let part = &map[bytes.clone()];
                // SAFETY: `of_file` has found the part aligned and made of whole elements, of which any bits are
                // values; the map is read-only and lives as long as `self`. That nobody writes to or shortens the
                // file meanwhile is promised by who mapped it.
                unsafe { slice::from_raw_parts(part.as_ptr().cast(), part.len() / size_of::<T>()) }
            }
        }
    }
}

impl MatrixForm {
    /// Bytes of a matrix of this form, missing outputs included.
    pub fn bytes_of(self, out_features: usize, in_features: usize) -> usize {
        match self {
            Self::F32 => Matrix::bytes_of(out_features, in_features, WeightDtype::F32),
            Self::Bf16 | Self::RoundedBf16 => Matrix::bytes_of(out_features, in_features, WeightDtype::Bf16),
            Self::Blocks(bits) => Matrix::bytes_of_blocks(out_features, in_features, bits),
        }
    }
}

impl Matrix {
    /// How its weights are held.
    pub fn form(&self) -> MatrixForm {
        match &self.panels {
            Panels::F32(_) => MatrixForm::F32,
            Panels::Bf16(_) if self.rounds_inputs() => MatrixForm::RoundedBf16,
            Panels::Bf16(_) => MatrixForm::Bf16,
            Panels::FourBits(_) => MatrixForm::Blocks(CodeBits::Four),
            Panels::FiveBits(_) => MatrixForm::Blocks(CodeBits::Five),
            Panels::SixBits(_) => MatrixForm::Blocks(CodeBits::Six),
            Panels::EightBits(_) => MatrixForm::Blocks(CodeBits::Eight),
        }
    }

    /// Its weights as they lie in memory, in this machine's order of bytes.
    pub fn packed_bytes(&self) -> &[u8] {
        match &self.panels {
            Panels::F32(panels) => panels.bytes(),
            Panels::Bf16(panels) => panels.bytes(),
            Panels::FourBits(panels) => panels.bytes(),
            Panels::FiveBits(panels) => panels.bytes(),
            Panels::SixBits(panels) => panels.bytes(),
            Panels::EightBits(panels) => panels.bytes(),
        }
    }

    /// The matrix whose [bytes](Self::packed_bytes) lie in this part of a file. `None` if they can't be: the
    /// part is none of the file, has another length than form and shape ask for, or begins at no multiple of 64.
    ///
    /// Nobody may write to the file, or shorten it, as long as it is mapped.
    pub fn from_file(
        form: MatrixForm,
        out_features: usize,
        in_features: usize,
        map: &Arc<Mmap>,
        bytes: Range<usize>,
    ) -> Option<Self> {
        let coded = matches!(form, MatrixForm::Blocks(_));
        if bytes.len() != form.bytes_of(out_features, in_features)
            || coded && !in_features.is_multiple_of(BLOCK)
        {
            return None;
        }
        let panels = match form {
            MatrixForm::F32 => Panels::F32(Packed::of_file(map, bytes)?),
            MatrixForm::Bf16 | MatrixForm::RoundedBf16 => Panels::Bf16(Packed::of_file(map, bytes)?),
            MatrixForm::Blocks(CodeBits::Four) => Panels::FourBits(Packed::of_file(map, bytes)?),
            MatrixForm::Blocks(CodeBits::Five) => Panels::FiveBits(Packed::of_file(map, bytes)?),
            MatrixForm::Blocks(CodeBits::Six) => Panels::SixBits(Packed::of_file(map, bytes)?),
            MatrixForm::Blocks(CodeBits::Eight) => Panels::EightBits(Packed::of_file(map, bytes)?),
        };
        let inputs = match form {
            MatrixForm::RoundedBf16 => WeightDtype::Bf16,
            MatrixForm::F32 | MatrixForm::Bf16 | MatrixForm::Blocks(_) => WeightDtype::F32,
        };
        Some(Self { out_features, in_features, inputs, panels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kernels::BlockRows, types::Digest};

    /// Outputs: a whole panel and a part of one.
    const OUTPUTS: usize = 40;
    const INPUTS: usize = 2 * BLOCK;

    fn plain() -> Vec<f32> {
        let mut values: Vec<f32> =
            (0..OUTPUTS * INPUTS).map(|index| (index * 37 % 4099) as f32 / 1024.0 - 2.0).collect();
        // Just above and just below the least that a rounded weight is, 2⁻⁴⁰: the second one is zero.
        (values[5], values[6]) = (-1e-12, 8e-13);
        values
    }

    fn coded(bits: CodeBits) -> BlockRows {
        let (count, least) = match bits {
            CodeBits::Four => (16, 0),
            CodeBits::Five => (32, 0),
            CodeBits::Six => (64, -32),
            CodeBits::Eight => (256, -128),
        };
        let codes = (0..OUTPUTS * INPUTS).map(|index| ((index * 37 % 4099) as i32 % count + least) as i8);
        let numbers = |factor: usize| {
            let runs = 0..OUTPUTS * INPUTS / bits.run();
            runs.map(move |run| (run * factor % 211) as f32 / 512.0 - 0.125)
        };
        let offsets = match bits {
            CodeBits::Six => numbers(0).map(|_| 0.0).collect(),
            _ => numbers(53).collect(),
        };
        BlockRows { bits, codes: codes.collect(), scales: numbers(31).collect(), offsets }
    }

    /// Files that were written stay on the disks of who runs this. If these digests change, what is mapped from such
    /// a file would be other weights: raise [`LAYOUT`], then put the new digests here beside the new number.
    #[test]
    fn panels_are_those_of_the_layouts_number() {
        let values = plain();
        let matrices = [
            Matrix::from_rows(OUTPUTS, INPUTS, &values),
            Matrix::from_bf16(OUTPUTS, INPUTS, &values),
            Matrix::with_dtype(WeightDtype::Bf16, OUTPUTS, INPUTS, &values),
        ];
        let coded = [CodeBits::Four, CodeBits::Five, CodeBits::Six, CodeBits::Eight]
            .map(|bits| Matrix::from_blocks(OUTPUTS, INPUTS, &coded(bits)));
        let found: Vec<_> = matrices
            .iter()
            .chain(&coded)
            .map(|matrix| (matrix.form(), Digest::of(matrix.packed_bytes()).to_string()[..16].to_owned()))
            .collect();
        let expected = [
            (MatrixForm::F32, "f7cf9aec3880f1f9"),
            (MatrixForm::Bf16, "36cdf6ffca17dbad"),
            (MatrixForm::RoundedBf16, "a3aa8e7b6e3bb300"),
            (MatrixForm::Blocks(CodeBits::Four), "ac95481e80f4468e"),
            (MatrixForm::Blocks(CodeBits::Five), "d83451fab105f84e"),
            (MatrixForm::Blocks(CodeBits::Six), "d44b7993328c4269"),
            (MatrixForm::Blocks(CodeBits::Eight), "e9d9b17972642fce"),
        ];
        assert_eq!((LAYOUT, found), (1, expected.map(|(form, digest)| (form, digest.to_owned())).to_vec()));
    }
}

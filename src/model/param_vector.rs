use std::{
    fmt,
    ops::Deref,
    sync::{Arc, OnceLock, Weak},
};

use crate::types::{Digest, Hasher};

/// One f32 per LoRA parameter, in the order of a [`LoraLayout`](super::LoraLayout): weights,
/// a moment, or a gradient.
///
/// Immutable and shared by `clone`, so a state's successor keeps what did not change; hashed
/// at most once, so an operation pays only for the vectors that it made.
#[derive(Clone)]
pub struct ParamVector(Arc<Inner>);

struct Inner {
    values: Vec<f32>,
    digest: OnceLock<Digest>,
}

impl ParamVector {
    /// SHA-256 over the values as little-endian bytes.
    pub fn digest(&self) -> Digest {
        *self.0.digest.get_or_init(|| {
            let mut hasher = Hasher::default();
            for chunk in self.0.values.chunks(HASH_CHUNK) {
                hasher.update(&little_endian(chunk));
            }
            hasher.finish()
        })
    }
}

/// Tells whether a vector is the one that it was made of, and keeps none alive.
pub(super) struct VectorWatch(Weak<Inner>);

impl ParamVector {
    pub(super) fn watch(&self) -> VectorWatch {
        VectorWatch(Arc::downgrade(&self.0))
    }
}

impl VectorWatch {
    /// Whether it is this vector, or a clone of it.
    pub(super) fn is(&self, vector: &ParamVector) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&vector.0))
    }

    /// Whether nobody holds the vector any more.
    pub(super) fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// The values' bytes, as files and digests have them.
pub(super) fn little_endian(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; 4 * values.len()];
    // Word by word rather than byte by byte: the compiler makes a plain copy of it.
    for (word, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *word = value.to_le_bytes();
    }
    bytes
}

/// Values turned into bytes at a time: large enough to hash at full speed, small enough to
/// stay in the first-level cache.
const HASH_CHUNK: usize = 4096;

impl From<Vec<f32>> for ParamVector {
    fn from(values: Vec<f32>) -> Self {
        Self(Arc::new(Inner { values, digest: OnceLock::new() }))
    }
}

impl Deref for ParamVector {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0.values
    }
}

/// Equality of bits: what replay and ranks promise. (`==` on f32 would call −0 and 0 equal.)
impl PartialEq for ParamVector {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || self.len() == other.len()
                && self.iter().zip(other.iter()).all(|(a, b)| a.to_bits() == b.to_bits())
    }
}

impl fmt::Debug for ParamVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParamVector({} values, {})", self.len(), self.digest().short())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_sha256_of_the_little_endian_bytes() {
        let values: Vec<f32> = (0..HASH_CHUNK + 3).map(|i| i as f32 * 0.5 - 7.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(ParamVector::from(values).digest(), Digest::of(&bytes));
    }

    #[test]
    fn bytes_are_little_endian() {
        assert_eq!(little_endian(&[1.0, -2.5]), [0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]);
    }

    #[test]
    fn equality_is_of_bits() {
        assert_ne!(ParamVector::from(vec![0.0]), ParamVector::from(vec![-0.0]));
        assert_eq!(ParamVector::from(vec![f32::NAN]), ParamVector::from(vec![f32::NAN]));
        assert_ne!(ParamVector::from(vec![1.0]), ParamVector::from(vec![1.0, 2.0]));
    }
}

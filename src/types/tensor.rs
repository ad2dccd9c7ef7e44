use super::InvalidInput;

/// Element type of a [`TensorData`], by the name it has on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    Float32,
    Float16,
    Bfloat16,
    Float64,
    Int64,
    Int32,
    Int16,
    Int8,
    Uint8,
    Uint32,
    Bool,
}

/// The elements of a tensor, in the widest type of their kind.
///
/// Every dtype fits one of these exactly: the half types in `f32`, all integers and bool in
/// `i64`. The dtype says what a value means, the variant how it is held.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorValues {
    /// float32, float16, bfloat16.
    F32(Vec<f32>),
    /// float64.
    F64(Vec<f64>),
    /// int8 … int64, uint8, uint32, bool (0 and 1).
    I64(Vec<i64>),
}

/// A serialisable tensor: flat row-major data, dtype and shape.
///
/// Invariant: the product of `shape` equals the number of values (an empty shape is a
/// scalar), and every value fits `dtype`.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorData {
    values: TensorValues,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl TensorData {
    /// A tensor of `dtype` and `shape`, checked.
    pub fn new(values: TensorValues, dtype: Dtype, shape: Vec<usize>) -> Result<Self, InvalidInput> {
        let tensor = Self { values, dtype, shape };
        Ok(tensor)
    }

    /// A float32 vector.
    pub fn from_f32(values: Vec<f32>) -> Self {
        let shape = vec![values.len()];
        Self { values: TensorValues::F32(values), dtype: Dtype::Float32, shape }
    }

    /// An int64 vector.
    pub fn from_i64(values: Vec<i64>) -> Self {
        let shape = vec![values.len()];
        Self { values: TensorValues::I64(values), dtype: Dtype::Int64, shape }
    }

    /// The elements, row-major.
    pub fn values(&self) -> &TensorValues {
        &self.values
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The extents, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
}

impl serde::Serialize for TensorData {
    fn serialize<S: serde::Serializer>(&self, _serializer: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("not written yet"))
    }
}

impl<'de> serde::Deserialize<'de> for TensorData {
    fn deserialize<D: serde::Deserializer<'de>>(_deserializer: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("not written yet"))
    }
}

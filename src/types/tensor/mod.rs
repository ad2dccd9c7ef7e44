mod candle;
mod dtype;
mod json;

use super::InvalidInput;

pub use dtype::Dtype;

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

impl TensorValues {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::I64(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A serialisable tensor: flat row-major data, dtype and shape.
///
/// Invariant: the product of `shape` equals the number of values (an empty shape is a
/// scalar), and every value fits `dtype` exactly.
///
/// # JSON
///
/// `{"data": [1.0, null], "dtype": "float32", "shape": [2]}`. Reading takes `data` flat or
/// nested (the nesting is flattened; `shape` decides), integers and floats in either kind of
/// tensor, `true` and `false` in a bool one; `shape` may be absent if `data` is flat. `null` is
/// NaN in a float tensor and refused in others. A decimal is rounded to the nearest value of the
/// dtype, and refused beyond its range. Writing gives a flat list, 0 and 1 for bool, and `null` for
/// NaN. JSON has no infinity: it is written as `null` as well and comes back as NaN, as in
/// the Python clients.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorData {
    values: TensorValues,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl TensorData {
    /// A tensor of `dtype` and `shape`, checked.
    ///
    /// Refused: values held in another kind than `dtype`'s, a shape whose product is not the
    /// number of values, a value outside the dtype's range or, for the half types, between
    /// two of its values. NaN and infinities fit every float dtype.
    pub fn new(values: TensorValues, dtype: Dtype, shape: Vec<usize>) -> Result<Self, InvalidInput> {
        let elements = shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
        if elements != Some(values.len()) {
            let problem = match elements {
                Some(elements) => {
                    format!("{shape:?} makes {elements} elements, the data has {}", values.len())
                }
                None => format!("{shape:?} makes more elements than there can be"),
            };
            return Err(InvalidInput::new("shape", problem));
        }
        match (&values, dtype) {
            (TensorValues::F64(_), Dtype::Float64) | (TensorValues::F32(_), Dtype::Float32) => {}
            (TensorValues::F32(values), Dtype::Float16 | Dtype::Bfloat16) => {
                let odd = |value: &f32| !value.is_nan() && dtype.round(*value) != *value;
                refuse_at(values, odd, |value| format!("{value} is no {dtype}"))?;
            }
            (TensorValues::I64(values), dtype) => {
                let Some((least, most)) = dtype.integer_range() else { return Err(wrong_kind(dtype)) };
                refuse_at(
                    values,
                    |value| !(least..=most).contains(value),
                    |value| format!("{value} is outside the range of {dtype}, {least} to {most}"),
                )?;
            }
            (TensorValues::F32(_) | TensorValues::F64(_), dtype) => return Err(wrong_kind(dtype)),
        }
        Ok(Self { values, dtype, shape })
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

    /// A float32 scalar: one value, shape `[]`.
    pub fn scalar(value: f32) -> Self {
        Self { values: TensorValues::F32(vec![value]), dtype: Dtype::Float32, shape: Vec::new() }
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

    /// How many elements there are: the product of the shape.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether some extent is 0.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The elements of a float32, float16 or bfloat16 tensor, row-major.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.values {
            TensorValues::F32(values) => Some(values),
            TensorValues::F64(_) | TensorValues::I64(_) => None,
        }
    }

    /// The elements of an integer or bool tensor, row-major.
    pub fn as_i64(&self) -> Option<&[i64]> {
        match &self.values {
            TensorValues::I64(values) => Some(values),
            TensorValues::F32(_) | TensorValues::F64(_) => None,
        }
    }

    /// The elements as f32, whatever their dtype: float64 and integers past 2²⁴ are rounded.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match &self.values {
            TensorValues::F32(values) => values.clone(),
            TensorValues::F64(values) => values.iter().map(|value| *value as f32).collect(),
            TensorValues::I64(values) => values.iter().map(|value| *value as f32).collect(),
        }
    }
}

fn wrong_kind(dtype: Dtype) -> InvalidInput {
    let held = match dtype {
        Dtype::Float64 => "TensorValues::F64",
        dtype if dtype.is_float() => "TensorValues::F32",
        _ => "TensorValues::I64",
    };
    InvalidInput::new("dtype", format!("values of {dtype} are held as {held}"))
}

/// Names the first value that is `odd`, by its position in the flat data.
fn refuse_at<T>(
    values: &[T],
    odd: impl Fn(&T) -> bool,
    problem: impl Fn(&T) -> String,
) -> Result<(), InvalidInput> {
    match values.iter().position(odd) {
        None => Ok(()),
        Some(i) => Err(InvalidInput::new(format!("data[{i}]"), problem(&values[i]))),
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::any_tensor;

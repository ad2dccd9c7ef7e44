use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::{Dtype, TensorData, TensorValues};
use crate::types::InvalidInput;

impl TensorData {
    /// The same tensor on a device, exactly. candle has no bool and no int8: bool becomes U8 (0
    /// and 1), int8 becomes I16; [`from_tensor_as`](Self::from_tensor_as) goes back.
    ///
    /// Fails only as the device does (no memory, lost).
    pub fn to_tensor(&self, device: &Device) -> candle_core::Result<Tensor> {
        let shape = self.shape.as_slice();
        match (&self.values, self.dtype) {
            (TensorValues::F32(values), Dtype::Float16) => {
                Tensor::from_vec(map(values, |v| f16::from_f32(*v)), shape, device)
            }
            (TensorValues::F32(values), Dtype::Bfloat16) => {
                Tensor::from_vec(map(values, |v| bf16::from_f32(*v)), shape, device)
            }
            (TensorValues::F32(values), _) => Tensor::from_slice(values, shape, device),
            (TensorValues::F64(values), _) => Tensor::from_slice(values, shape, device),
            // No cast loses anything: `new` has checked the range.
            (TensorValues::I64(values), Dtype::Int32) => {
                Tensor::from_vec(map(values, |v| *v as i32), shape, device)
            }
            (TensorValues::I64(values), Dtype::Int16 | Dtype::Int8) => {
                Tensor::from_vec(map(values, |v| *v as i16), shape, device)
            }
            (TensorValues::I64(values), Dtype::Uint8 | Dtype::Bool) => {
                Tensor::from_vec(map(values, |v| *v as u8), shape, device)
            }
            (TensorValues::I64(values), Dtype::Uint32) => {
                Tensor::from_vec(map(values, |v| *v as u32), shape, device)
            }
            (TensorValues::I64(values), _) => Tensor::from_slice(values, shape, device),
        }
    }

    /// Copies a tensor, under candle's own dtype (uint8 for what was bool, int16 for int8).
    /// Refuses the 8-, 6- and 4-bit float types.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self, InvalidInput> {
        let dtype = match tensor.dtype() {
            DType::F32 => Dtype::Float32,
            DType::F16 => Dtype::Float16,
            DType::BF16 => Dtype::Bfloat16,
            DType::F64 => Dtype::Float64,
            DType::I64 => Dtype::Int64,
            DType::I32 => Dtype::Int32,
            DType::I16 => Dtype::Int16,
            DType::U8 => Dtype::Uint8,
            DType::U32 => Dtype::Uint32,
            other => return Err(InvalidInput::new("dtype", format!("{other:?} has no name on the wire"))),
        };
        Self::from_tensor_as(tensor, dtype)
    }

    /// Copies a tensor under a dtype of the same kind, `bool` and `int8` among them. A value
    /// that doesn't fit it exactly is refused, and so are floats as integers or the other way round.
    pub fn from_tensor_as(tensor: &Tensor, dtype: Dtype) -> Result<Self, InvalidInput> {
        let shape = tensor.dims().to_vec();
        let flat = tensor.flatten_all().map_err(unreadable)?;
        let values = match tensor.dtype() {
            DType::F32 => TensorValues::F32(flat.to_vec1().map_err(unreadable)?),
            DType::F16 => TensorValues::F32(read(&flat, f16::to_f32)?),
            DType::BF16 => TensorValues::F32(read(&flat, bf16::to_f32)?),
            DType::F64 => TensorValues::F64(flat.to_vec1().map_err(unreadable)?),
            DType::I64 => TensorValues::I64(flat.to_vec1().map_err(unreadable)?),
            DType::I32 => TensorValues::I64(read(&flat, i32::into)?),
            DType::I16 => TensorValues::I64(read(&flat, i16::into)?),
            DType::U8 => TensorValues::I64(read(&flat, u8::into)?),
            DType::U32 => TensorValues::I64(read(&flat, u32::into)?),
            other => return Err(InvalidInput::new("dtype", format!("{other:?} can't be copied"))),
        };
        Self::new(values.held_as(dtype)?, dtype, shape)
    }
}

impl TensorValues {
    /// The same floats in the width that `dtype` is held in.
    fn held_as(self, dtype: Dtype) -> Result<Self, InvalidInput> {
        match self {
            Self::F32(values) if dtype == Dtype::Float64 => Ok(Self::F64(map(&values, |v| f64::from(*v)))),
            Self::F64(values) if dtype.is_float() && dtype != Dtype::Float64 => {
                let inexact = |v: &f64| !v.is_nan() && f64::from(*v as f32) != *v;
                super::refuse_at(&values, inexact, |v| format!("{v} is no {dtype}"))?;
                Ok(Self::F32(map(&values, |v| *v as f32)))
            }
            values => Ok(values),
        }
    }
}

fn map<T, U>(values: &[T], convert: impl Fn(&T) -> U) -> Vec<U> {
    values.iter().map(convert).collect()
}

fn read<T: candle_core::WithDType, U>(
    flat: &Tensor,
    convert: impl Fn(T) -> U,
) -> Result<Vec<U>, InvalidInput> {
    let values = flat.to_vec1().map_err(unreadable)?;
    Ok(values.into_iter().map(convert).collect())
}

fn unreadable(error: candle_core::Error) -> InvalidInput {
    InvalidInput::new("tensor", format!("can't be read: {error}"))
}

use std::{fmt, str::FromStr};

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::types::InvalidInput;

/// Element type of a [`TensorData`](super::TensorData), by the name it has on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE 754 binary32.
    Float32,
    /// IEEE 754 binary16.
    Float16,
    /// The upper half of a binary32.
    Bfloat16,
    /// IEEE 754 binary64.
    Float64,
    /// −2⁶³ … 2⁶³ − 1.
    Int64,
    /// −2³¹ … 2³¹ − 1.
    Int32,
    /// −32,768 … 32,767.
    Int16,
    /// −128 … 127.
    Int8,
    /// 0 … 255.
    Uint8,
    /// 0 … 2³² − 1.
    Uint32,
    /// 0 (false) and 1 (true).
    Bool,
}

impl Dtype {
    /// Every one.
    pub const ALL: [Self; 11] = [
        Self::Float32,
        Self::Float16,
        Self::Bfloat16,
        Self::Float64,
        Self::Int64,
        Self::Int32,
        Self::Int16,
        Self::Int8,
        Self::Uint8,
        Self::Uint32,
        Self::Bool,
    ];

    /// The name on the wire: torch's, without `torch.`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Float64 => "float64",
            Self::Int64 => "int64",
            Self::Int32 => "int32",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
            Self::Uint8 => "uint8",
            Self::Uint32 => "uint32",
            Self::Bool => "bool",
        }
    }

    /// Whether values have a fraction, and may be NaN or infinite.
    pub fn is_float(self) -> bool {
        matches!(self, Self::Float32 | Self::Float16 | Self::Bfloat16 | Self::Float64)
    }

    /// Smallest and largest value of an integer type or bool.
    pub(super) fn integer_range(self) -> Option<(i64, i64)> {
        match self {
            Self::Float32 | Self::Float16 | Self::Bfloat16 | Self::Float64 => None,
            Self::Int64 => Some((i64::MIN, i64::MAX)),
            Self::Int32 => Some((i32::MIN.into(), i32::MAX.into())),
            Self::Int16 => Some((i16::MIN.into(), i16::MAX.into())),
            Self::Int8 => Some((i8::MIN.into(), i8::MAX.into())),
            Self::Uint8 => Some((u8::MIN.into(), u8::MAX.into())),
            Self::Uint32 => Some((u32::MIN.into(), u32::MAX.into())),
            Self::Bool => Some((0, 1)),
        }
    }

    /// The nearest value of this type to `value`; itself for the types that aren't narrower.
    pub(super) fn round(self, value: f32) -> f32 {
        match self {
            Self::Float16 => f16::from_f32(value).to_f32(),
            Self::Bfloat16 => bf16::from_f32(value).to_f32(),
            _ => value,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = InvalidInput;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            InvalidInput::new("dtype", format!("{name:?} is none of {known}"))
        })
    }
}

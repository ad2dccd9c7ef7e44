use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeSeed, Error, SeqAccess, Visitor},
    ser::{SerializeSeq, SerializeStruct},
};

use super::{Dtype, TensorData, TensorValues};
use crate::types::InvalidInput;

/// Deepest nesting of `data` that is read. serde_json has a bound of its own; this one holds
/// for every format.
const MAX_NESTING: usize = 32;

impl Serialize for TensorData {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tensor = serializer.serialize_struct("TensorData", 3)?;
        tensor.serialize_field("data", &Flat(&self.values))?;
        tensor.serialize_field("dtype", &self.dtype)?;
        tensor.serialize_field("shape", &self.shape)?;
        tensor.end()
    }
}

/// The elements as one list, without the tokens that are no JSON.
struct Flat<'a>(&'a TensorValues);

impl Serialize for Flat<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        match self.0 {
            TensorValues::F32(values) => {
                values.iter().try_for_each(|v| list.serialize_element(&v.is_finite().then_some(v)))?
            }
            TensorValues::F64(values) => {
                values.iter().try_for_each(|v| list.serialize_element(&v.is_finite().then_some(v)))?
            }
            TensorValues::I64(values) => values.iter().try_for_each(|v| list.serialize_element(v))?,
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for TensorData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename = "TensorData")]
        struct Parts {
            data: Elements,
            dtype: Dtype,
            #[serde(default)]
            shape: Option<Vec<usize>>,
        }
        let Parts { data, dtype, shape } = Parts::deserialize(deserializer)?;
        data.into_tensor(dtype, shape).map_err(D::Error::custom)
    }
}

/// One written number. What it becomes is known only when `dtype` is, which may come later.
#[derive(Debug, Clone, Copy)]
enum Element {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
}

/// `data` as it was written, flattened.
struct Elements {
    values: Vec<Element>,
    nested: bool,
}

impl Elements {
    fn into_tensor(self, dtype: Dtype, shape: Option<Vec<usize>>) -> Result<TensorData, InvalidInput> {
        let shape = match shape {
            Some(shape) => shape,
            None if self.nested => return Err(InvalidInput::new("shape", "missing, and the data is nested")),
            None => vec![self.values.len()],
        };
        let values = match dtype {
            Dtype::Float64 => TensorValues::F64(self.convert(|element| float(element, dtype))?),
            dtype if dtype.is_float() => {
                TensorValues::F32(self.convert(|element| narrow_float(element, dtype))?)
            }
            _ => TensorValues::I64(self.convert(|element| integer(element, dtype))?),
        };
        TensorData::new(values, dtype, shape)
    }

    fn convert<T>(&self, one: impl Fn(Element) -> Result<T, String>) -> Result<Vec<T>, InvalidInput> {
        let converted = self.values.iter().enumerate();
        converted
            .map(|(i, element)| one(*element).map_err(|e| InvalidInput::new(format!("data[{i}]"), e)))
            .collect()
    }
}

fn float(element: Element, dtype: Dtype) -> Result<f64, String> {
    match element {
        Element::Null => Ok(f64::NAN),
        Element::Int(value) => Ok(value as f64),
        Element::Float(value) => Ok(value),
        Element::Bool(value) => Err(format!("{value} in a {dtype} tensor")),
    }
}

fn narrow_float(element: Element, dtype: Dtype) -> Result<f32, String> {
    let wide = float(element, dtype)?;
    // By way of float32, which is exact for what was a half type before it was written.
    let narrow = dtype.round(wide as f32);
    match wide.is_finite() && !narrow.is_finite() {
        true => Err(format!("{wide} is outside the range of {dtype}")),
        false => Ok(narrow),
    }
}

fn integer(element: Element, dtype: Dtype) -> Result<i64, String> {
    /// 2⁶³: the first float past the integers.
    const END: f64 = 9_223_372_036_854_775_808.0;
    match element {
        Element::Int(value) => Ok(value),
        Element::Float(value) if value.fract() == 0.0 && (-END..END).contains(&value) => Ok(value as i64),
        Element::Float(value) => Err(format!("{value} is no {dtype}")),
        Element::Bool(value) if dtype == Dtype::Bool => Ok(value.into()),
        Element::Bool(value) => Err(format!("{value} in a {dtype} tensor")),
        Element::Null => Err(format!("null in a {dtype} tensor")),
    }
}

impl<'de> Deserialize<'de> for Elements {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut elements = Self { values: Vec::new(), nested: false };
        Collect { into: &mut elements, depth: 0 }.deserialize(deserializer)?;
        Ok(elements)
    }
}

/// Reads a number, or a list of what it reads, into one flat list.
struct Collect<'a> {
    into: &'a mut Elements,
    depth: usize,
}

impl Collect<'_> {
    fn push<E>(self, element: Element) -> Result<(), E> {
        self.into.values.push(element);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Collect<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Collect<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, null, or a list of them")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.push(Element::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.push(Element::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.push(Element::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        // Past an i64 it fits no integer tensor, and a float one rounds it in any case.
        self.push(i64::try_from(value).map_or(Element::Float(value as f64), Element::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.push(Element::Float(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if self.depth == MAX_NESTING {
            return Err(A::Error::custom(format!("data is nested deeper than {MAX_NESTING}")));
        }
        self.into.nested |= self.depth > 0;
        let depth = self.depth + 1;
        while list.next_element_seed(Collect { into: self.into, depth })?.is_some() {}
        Ok(())
    }
}

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn f32s(values: &[f32]) -> TensorValues {
    TensorValues::F32(values.to_vec())
}

fn ints(values: &[i64]) -> TensorValues {
    TensorValues::I64(values.to_vec())
}

/// The field and problem of a refusal.
fn refused(result: Result<TensorData, InvalidInput>) -> (String, String) {
    let error = result.unwrap_err();
    (error.field, error.problem)
}

/// The message of a refusal in JSON.
fn refused_json(value: serde_json::Value) -> String {
    serde_json::from_value::<TensorData>(value).unwrap_err().to_string()
}

fn read(value: serde_json::Value) -> TensorData {
    serde_json::from_value(value).unwrap()
}

/// Equal, with a NaN equal to a NaN.
fn same(a: &TensorData, b: &TensorData) -> bool {
    let values = match (a.values(), b.values()) {
        (TensorValues::F32(a), TensorValues::F32(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || a.is_nan() && b.is_nan())
        }
        (TensorValues::F64(a), TensorValues::F64(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || a.is_nan() && b.is_nan())
        }
        (a, b) => a == b,
    };
    values && a.dtype() == b.dtype() && a.shape() == b.shape()
}

// ---- new ----

#[test]
fn a_shape_must_make_as_many_elements_as_there_are() {
    for shape in [vec![], vec![4], vec![2, 2], vec![3, 0]] {
        let (field, problem) = refused(TensorData::new(f32s(&[1.0; 3]), Dtype::Float32, shape.clone()));
        assert_eq!(field, "shape");
        assert!(problem.contains(&format!("{shape:?}")) && problem.contains('3'), "{problem}");
    }
}

#[test]
fn a_shape_whose_product_overflows_is_refused() {
    let shape = vec![usize::MAX, 2, 0];
    assert_eq!(refused(TensorData::new(f32s(&[]), Dtype::Float32, shape)).0, "shape");
}

#[test]
fn values_must_be_held_in_the_kind_of_their_dtype() {
    for dtype in Dtype::ALL {
        let wrong = match dtype {
            Dtype::Float64 => vec![f32s(&[1.0]), ints(&[1])],
            dtype if dtype.is_float() => vec![TensorValues::F64(vec![1.0]), ints(&[1])],
            _ => vec![f32s(&[1.0]), TensorValues::F64(vec![1.0])],
        };
        for values in wrong {
            let (field, problem) = refused(TensorData::new(values, dtype, vec![1]));
            assert_eq!(field, "dtype");
            assert!(problem.contains(dtype.name()), "{problem}");
        }
    }
}

#[test]
fn an_integer_beyond_the_range_of_its_dtype_is_refused() {
    let narrow = Dtype::ALL.into_iter().filter(|dtype| !dtype.is_float() && *dtype != Dtype::Int64);
    for dtype in narrow {
        let (least, most) = dtype.integer_range().unwrap();
        TensorData::new(ints(&[least, most]), dtype, vec![2]).unwrap();
        for value in [least - 1, most + 1] {
            let (field, problem) = refused(TensorData::new(ints(&[0, value]), dtype, vec![2]));
            assert_eq!(field, "data[1]", "{dtype}");
            assert!(problem.contains(&value.to_string()), "{problem}");
        }
    }
}

#[test]
fn a_value_between_two_half_values_is_refused() {
    for (dtype, exact) in [(Dtype::Float16, 65504.0), (Dtype::Bfloat16, f32::from(bf16::MAX))] {
        let fine = [exact, 0.5, -0.0, f32::NAN, f32::INFINITY];
        TensorData::new(f32s(&fine), dtype, vec![5]).unwrap();
        assert_eq!(refused(TensorData::new(f32s(&[0.5, 0.1]), dtype, vec![2])).0, "data[1]");
        assert_eq!(refused(TensorData::new(f32s(&[f32::MAX]), dtype, vec![1])).0, "data[0]");
    }
}

// ---- JSON ----

#[test]
fn nested_data_is_flattened() {
    let tensor = read(json!({"data": [[1, 2.5], [3, 4]], "dtype": "float32", "shape": [2, 2]}));
    assert_eq!((tensor.values(), tensor.shape()), (&f32s(&[1.0, 2.5, 3.0, 4.0]), &[2, 2][..]));
}

#[test]
fn a_bare_number_is_a_scalar() {
    assert_eq!(read(json!({"data": 2, "dtype": "float32", "shape": []})), TensorData::scalar(2.0));
    assert_eq!(read(json!({"data": [2], "dtype": "float32", "shape": []})), TensorData::scalar(2.0));
}

#[test]
fn fields_may_come_in_any_order_and_unknown_ones_are_ignored() {
    let text = r#"{"shape": [1], "layout": "strided", "dtype": "int64", "data": [7]}"#;
    assert_eq!(serde_json::from_str::<TensorData>(text).unwrap(), TensorData::from_i64(vec![7]));
}

#[test]
fn integers_written_as_floats_are_integers() {
    assert_eq!(
        read(json!({"data": [3.0, -100.0, 7], "dtype": "int64", "shape": [3]})),
        TensorData::from_i64(vec![3, -100, 7])
    );
}

#[test]
fn bools_are_read_in_each_writing_and_written_as_numbers() {
    let tensor = read(json!({"data": [true, false, 1, 0.0], "dtype": "bool", "shape": [4]}));
    assert_eq!(tensor.values(), &ints(&[1, 0, 1, 0]));
    let written = serde_json::to_value(&tensor).unwrap();
    assert_eq!(written, json!({"data": [1, 0, 1, 0], "dtype": "bool", "shape": [4]}));
}

#[test]
fn a_missing_shape_is_that_of_a_flat_list() {
    assert_eq!(read(json!({"data": [1, 2], "dtype": "int64"})), TensorData::from_i64(vec![1, 2]));
    assert_eq!(read(json!({"data": [1], "dtype": "int64", "shape": null})).shape(), [1]);
}

#[test]
fn a_missing_shape_of_nested_data_is_refused() {
    assert!(refused_json(json!({"data": [[1, 2]], "dtype": "int64"})).contains("`shape`"));
}

#[test]
fn a_length_that_does_not_fit_the_shape_is_refused() {
    let message = refused_json(json!({"data": [[1, 2], [3]], "dtype": "int64", "shape": [2, 2]}));
    assert!(message.contains("4 elements") && message.contains('3'), "{message}");
}

#[test]
fn null_is_nan_in_a_float_tensor() {
    let tensor = read(json!({"data": [null, 1.0], "dtype": "float32", "shape": [2]}));
    assert!(tensor.as_f32().unwrap()[0].is_nan());
    let tensor = read(json!({"data": [null], "dtype": "float64", "shape": [1]}));
    assert!(matches!(tensor.values(), TensorValues::F64(values) if values[0].is_nan()));
}

#[test]
fn null_in_an_integer_tensor_is_refused() {
    for dtype in ["int64", "int8", "uint32", "bool"] {
        let message = refused_json(json!({"data": [0, null], "dtype": dtype, "shape": [2]}));
        assert!(message.contains("data[1]") && message.contains("null"), "{message}");
    }
}

#[test]
fn nan_and_infinities_are_written_as_null() {
    let wide = TensorValues::F64(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.5]);
    let wide = TensorData::new(wide, Dtype::Float64, vec![4]).unwrap();
    let narrow = TensorData::from_f32(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.5]);
    for tensor in [wide, narrow] {
        assert_eq!(serde_json::to_value(&tensor).unwrap()["data"], json!([null, null, null, 1.5]));
    }
}

#[test]
fn a_fraction_in_an_integer_tensor_is_refused() {
    assert!(refused_json(json!({"data": [0.5], "dtype": "int64", "shape": [1]})).contains("0.5"));
}

#[test]
fn integers_past_64_bits_are_refused() {
    for value in [json!(u64::MAX), json!(9.3e18), json!(-1e300)] {
        assert!(refused_json(json!({"data": [value], "dtype": "int64", "shape": [1]})).contains("data[0]"));
    }
}

#[test]
fn true_in_a_tensor_of_numbers_is_refused() {
    for dtype in ["float32", "int64"] {
        assert!(refused_json(json!({"data": [true], "dtype": dtype, "shape": [1]})).contains("true"));
    }
}

#[test]
fn text_in_the_data_is_refused() {
    assert!(refused_json(json!({"data": ["NaN"], "dtype": "float32", "shape": [1]})).contains("NaN"));
}

#[test]
fn a_decimal_beyond_the_range_is_refused() {
    for (dtype, value) in [("float32", 1e39), ("float16", 65520.0), ("bfloat16", 3.4e38)] {
        let message = refused_json(json!({"data": [value], "dtype": dtype, "shape": [1]}));
        assert!(message.contains(dtype), "{message}");
    }
}

#[test]
fn a_decimal_is_rounded_to_the_nearest_value() {
    let half = read(json!({"data": [0.1], "dtype": "float16", "shape": [1]}));
    assert_eq!(half.as_f32().unwrap(), [f16::from_f32(0.1).to_f32()]);
    let single = read(json!({"data": [0.1], "dtype": "float32", "shape": [1]}));
    assert_eq!(single.as_f32().unwrap(), [0.1]);
}

#[test]
fn an_unknown_dtype_is_refused_by_name() {
    let message = refused_json(json!({"data": [1], "dtype": "complex64", "shape": [1]}));
    assert!(message.contains("complex64") && message.contains("bfloat16"), "{message}");
    assert_eq!("complex64".parse::<Dtype>().unwrap_err().field, "dtype");
}

#[test]
fn a_negative_extent_is_refused() {
    refused_json(json!({"data": [1], "dtype": "int64", "shape": [-1]}));
}

#[test]
fn nesting_past_the_bound_is_refused() {
    let text = format!("{{\"dtype\":\"int64\",\"data\":{}{}}}", "[".repeat(40), "]".repeat(40));
    assert!(serde_json::from_str::<TensorData>(&text).unwrap_err().to_string().contains("deeper"));
}

#[test]
fn dtype_names_are_the_same_everywhere() {
    for dtype in Dtype::ALL {
        assert_eq!(serde_json::to_value(dtype).unwrap(), json!(dtype.name()));
        assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
    }
}

// ---- candle ----

#[test]
fn bool_and_int8_go_to_wider_types_and_come_back() {
    let flags = TensorData::new(ints(&[1, 0]), Dtype::Bool, vec![2]).unwrap();
    let bytes = TensorData::new(ints(&[-128, 127]), Dtype::Int8, vec![1, 2]).unwrap();
    for (tensor, wide) in [(flags, DType::U8), (bytes, DType::I16)] {
        let there = tensor.to_tensor(&Device::Cpu).unwrap();
        assert_eq!(there.dtype(), wide);
        assert_eq!(TensorData::from_tensor_as(&there, tensor.dtype()).unwrap(), tensor);
        assert_ne!(TensorData::from_tensor(&there).unwrap().dtype(), tensor.dtype());
    }
}

#[test]
fn a_two_is_no_bool_and_128_no_int8() {
    let two = Tensor::new(&[1u8, 2], &Device::Cpu).unwrap();
    assert_eq!(refused(TensorData::from_tensor_as(&two, Dtype::Bool)).0, "data[1]");
    let wide = Tensor::new(&[128i16], &Device::Cpu).unwrap();
    assert_eq!(refused(TensorData::from_tensor_as(&wide, Dtype::Int8)).0, "data[0]");
}

#[test]
fn floats_are_not_taken_for_integers_nor_the_other_way_round() {
    let float = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    assert_eq!(refused(TensorData::from_tensor_as(&float, Dtype::Int64)).0, "dtype");
    let int = Tensor::new(&[1i64], &Device::Cpu).unwrap();
    assert_eq!(refused(TensorData::from_tensor_as(&int, Dtype::Float32)).0, "dtype");
}

#[test]
fn a_float_that_does_not_fit_the_narrower_type_is_refused() {
    let wide = Tensor::new(&[0.5f64, 0.1], &Device::Cpu).unwrap();
    assert_eq!(refused(TensorData::from_tensor_as(&wide, Dtype::Float32)).0, "data[1]");
    assert_eq!(refused(TensorData::from_tensor_as(&wide, Dtype::Float16)).0, "data[1]");
    let exact = Tensor::new(&[0.5f64], &Device::Cpu).unwrap();
    assert_eq!(TensorData::from_tensor_as(&exact, Dtype::Bfloat16).unwrap().as_f32(), Some(&[0.5][..]));
    let single = Tensor::new(&[0.1f32], &Device::Cpu).unwrap();
    assert_eq!(TensorData::from_tensor_as(&single, Dtype::Float64).unwrap().dtype(), Dtype::Float64);
}

#[test]
fn a_strided_tensor_is_copied_in_row_major_order() {
    let tensor = Tensor::new(&[[1i64, 2], [3, 4]], &Device::Cpu).unwrap().t().unwrap();
    assert_eq!(TensorData::from_tensor(&tensor).unwrap().values(), &ints(&[1, 3, 2, 4]));
}

#[test]
fn scalars_keep_their_empty_shape() {
    let there = TensorData::scalar(2.5).to_tensor(&Device::Cpu).unwrap();
    assert_eq!(there.rank(), 0);
    assert_eq!(TensorData::from_tensor(&there).unwrap(), TensorData::scalar(2.5));
}

// ---- properties ----

/// A tensor of any dtype with up to three extents.
pub(crate) fn any_tensor() -> impl Strategy<Value = TensorData> {
    (prop::sample::select(&Dtype::ALL[..]), prop::collection::vec(0usize..4, 0..4)).prop_flat_map(
        |(dtype, shape)| {
            let count: usize = shape.iter().product();
            let finite = prop::num::f32::ANY;
            let values = match dtype {
                Dtype::Float64 => {
                    prop::collection::vec(prop::num::f64::ANY, count).prop_map(TensorValues::F64).boxed()
                }
                dtype if dtype.is_float() => {
                    prop::collection::vec(finite.prop_map(move |value| dtype.round(value)), count)
                        .prop_map(TensorValues::F32)
                        .boxed()
                }
                _ => {
                    let (least, most) = dtype.integer_range().unwrap_or_default();
                    prop::collection::vec(least..=most, count).prop_map(TensorValues::I64).boxed()
                }
            };
            values.prop_map(move |values| TensorData::new(values, dtype, shape.clone()).unwrap())
        },
    )
}

/// What JSON keeps of a tensor: everything but infinities.
fn without_infinities(tensor: &TensorData) -> TensorData {
    let values = match tensor.values().clone() {
        TensorValues::F32(values) => TensorValues::F32(
            values.into_iter().map(|v| if v.is_infinite() { f32::NAN } else { v }).collect(),
        ),
        TensorValues::F64(values) => TensorValues::F64(
            values.into_iter().map(|v| if v.is_infinite() { f64::NAN } else { v }).collect(),
        ),
        values => values,
    };
    TensorData::new(values, tensor.dtype(), tensor.shape().to_vec()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn json_keeps_every_tensor(tensor in any_tensor()) {
        let text = serde_json::to_string(&tensor).unwrap();
        let back: TensorData = serde_json::from_str(&text).unwrap();
        prop_assert!(same(&back, &without_infinities(&tensor)), "{text}");
    }

    #[test]
    fn candle_keeps_every_tensor(tensor in any_tensor()) {
        let there = tensor.to_tensor(&Device::Cpu).unwrap();
        prop_assert_eq!(there.dims(), tensor.shape());
        let back = TensorData::from_tensor_as(&there, tensor.dtype()).unwrap();
        prop_assert!(same(&back, &tensor));
    }
}

//! What the client does with data: cutting a large call, joining its outputs, and the loss of
//! the caller's own.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};

use crate::types::{
    Datum, ErrorKind, ForwardBackwardOutput, InvalidInput, ModelInputChunk, OperationError, TensorData,
};

/// A call is cut where its datums pass this many bytes of tokens and loss inputs, so that no
/// payload outgrows what the service takes and the parts are computed while later ones travel.
const PART_BYTES: usize = 24 << 20;

/// Which pass a call makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Forward,
    ForwardBackward,
}

/// What a custom loss returns.
pub struct CustomLoss {
    /// A scalar that depends on the log-probabilities through candle operations that have a
    /// gradient (mind that candle's fused ones, `softmax_last_dim` and others, have none).
    pub loss: Tensor,
    /// Further figures, reported among the metrics.
    pub metrics: BTreeMap<String, f64>,
}

/// A loss over the log-probabilities of each datum's targets, float32 `[N]` each.
pub type CustomLossFn = Box<dyn FnOnce(&[Datum], &[Tensor]) -> candle_core::Result<CustomLoss> + Send>;

/// Cuts a call's data, in order, into parts of about [`PART_BYTES`]; at least one datum each.
/// `together` consecutive datums are never parted ([`LossFn::datums_together`]).
pub fn split(data: Vec<Datum>, together: usize) -> Vec<Vec<Datum>> {
    let mut parts: Vec<Vec<Datum>> = Vec::new();
    let mut filled = usize::MAX;
    let mut data = data.into_iter().peekable();
    while data.peek().is_some() {
        let group: Vec<Datum> = data.by_ref().take(together).collect();
        let bytes: usize = group.iter().map(size).sum();
        if filled.saturating_add(bytes) > PART_BYTES {
            parts.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(part) = parts.last_mut() {
            part.extend(group);
        }
    }
    parts
}

/// Bytes of a datum's numbers before compression, about.
fn size(datum: &Datum) -> usize {
    let chunk = |chunk: &ModelInputChunk| match chunk {
        ModelInputChunk::EncodedText(text) => 4 * text.tokens.len(),
        ModelInputChunk::Image(image) => image.data.len(),
    };
    let input: usize = datum.model_input.chunks.iter().map(chunk).sum();
    let inputs: usize = datum.loss_fn_inputs.values().map(|t| 8 * t.shape().iter().product::<usize>()).sum();
    input + inputs
}

/// One output of a call that was cut: outputs in order, sums added, means weighted by the
/// active tokens (or pairs) of each part, maxima kept.
pub fn join_parts(parts: Vec<ForwardBackwardOutput>, summed: bool) -> ForwardBackwardOutput {
    let counted =
        |p: &ForwardBackwardOutput| p.metrics.get("tokens").or_else(|| p.metrics.get("pairs")).copied();
    let weights: Vec<f64> = parts.iter().map(|p| counted(p).unwrap_or(0.0)).collect();
    let total: f64 = weights.iter().sum();
    let mean = |value: &dyn Fn(&ForwardBackwardOutput) -> f64| match total > 0.0 {
        true => parts.iter().zip(&weights).map(|(p, w)| value(p) * w).sum::<f64>() / total,
        false => 0.0,
    };
    let sum = |value: &dyn Fn(&ForwardBackwardOutput) -> f64| parts.iter().map(value).sum::<f64>();
    let loss = if summed { sum(&|p| p.loss) } else { mean(&|p| p.loss) };

    let mut metrics = BTreeMap::new();
    for name in parts.iter().flat_map(|p| p.metrics.keys()) {
        let of = |p: &ForwardBackwardOutput| p.metrics.get(name).copied().unwrap_or(0.0);
        let joined = match name.as_str() {
            "loss" => loss,
            "skip_token_normalization" => 1.0,
            "tokens" | "pairs" => sum(&of),
            name if name.starts_with("max_") => parts.iter().map(of).fold(f64::NEG_INFINITY, f64::max),
            _ => mean(&of),
        };
        metrics.insert(name.clone(), joined);
    }
    ForwardBackwardOutput {
        loss,
        loss_fn_output_type: parts.first().map(|p| p.loss_fn_output_type.clone()).unwrap_or_default(),
        loss_fn_outputs: parts.into_iter().flat_map(|p| p.loss_fn_outputs).collect(),
        metrics,
    }
}

/// The same targets with weight 0 everywhere: cross-entropy then only scores them.
pub fn without_weights(data: &[Datum]) -> Result<Vec<Datum>, OperationError> {
    let zeros = |n: usize| TensorData::from_f32(vec![0.0; n]);
    data.iter().enumerate().map(|(i, datum)| weighted(i, datum, &zeros)).collect()
}

/// Datum `i` for cross-entropy with the weights that `weights(N)` makes.
fn weighted(i: usize, datum: &Datum, weights: &dyn Fn(usize) -> TensorData) -> Result<Datum, OperationError> {
    let targets = datum.loss_fn_inputs.get("target_tokens").ok_or_else(|| {
        let field = format!("data[{i}].loss_fn_inputs.target_tokens");
        InvalidInput::new(
            field,
            "is missing; a custom loss needs the tokens whose log-probabilities it reads",
        )
    })?;
    let &[n] = targets.shape() else {
        let field = format!("data[{i}].loss_fn_inputs.target_tokens");
        let problem = format!("must have one dimension for a custom loss, has shape {:?}", targets.shape());
        return Err(InvalidInput::new(field, problem).into());
    };
    let inputs = [("target_tokens".to_owned(), targets.clone()), ("weights".to_owned(), weights(n))];
    Ok(Datum { model_input: datum.model_input.clone(), loss_fn_inputs: inputs.into() })
}

/// Runs the caller's loss over the log-probabilities of `output`.
///
/// Returns the data for the backward pass and the metrics. Cross-entropy's sum
/// `S = Σ −w·lp` has ∂S/∂lp = −w, so weights of `−∂loss/∂lp` give it the custom loss's
/// gradient.
pub fn evaluate(
    data: Vec<Datum>,
    output: &ForwardBackwardOutput,
    loss_fn: CustomLossFn,
) -> Result<(Vec<Datum>, BTreeMap<String, f64>), OperationError> {
    let failed = |what: &str, e: candle_core::Error| {
        OperationError::new(ErrorKind::InvalidInput, format!("the custom loss failed {what}: {e}"))
    };
    let logprobs = output
        .loss_fn_outputs
        .iter()
        .map(|outputs| {
            let tensor = outputs.get("logprobs").map(|t| t.to_tensor(&Device::Cpu));
            let tensor = tensor.ok_or_else(|| internal("a forward pass without log-probabilities"))?;
            // A target of -100 has no log-probability; 0 keeps it out of a masked sum.
            let tensor = tensor.map_err(|e| internal(&e.to_string()))?;
            Var::from_tensor(&zero_nan(&tensor).map_err(|e| failed("on its inputs", e))?)
                .map_err(|e| failed("on its inputs", e))
        })
        .collect::<Result<Vec<Var>, OperationError>>()?;
    let inputs: Vec<Tensor> = logprobs.iter().map(|var| var.as_tensor().clone()).collect();

    let CustomLoss { loss, mut metrics } = loss_fn(&data, &inputs).map_err(|e| failed("to compute", e))?;
    let value = loss.to_dtype(candle_core::DType::F64).and_then(|t| t.to_scalar::<f64>());
    let value = value.map_err(|e| failed("to give a scalar", e))?;
    if !value.is_finite() {
        return Err(OperationError::new(ErrorKind::NotFinite, format!("the custom loss is {value}")));
    }
    let gradients = loss.backward().map_err(|e| failed("its backward pass", e))?;
    if inputs.iter().all(|tensor| gradients.get(tensor).is_none()) {
        let message = "the custom loss does not depend on the log-probabilities through operations that have a \
                       gradient; candle's fused operations have none";
        return Err(OperationError::new(ErrorKind::InvalidInput, message));
    }
    let mut weighted_data = Vec::with_capacity(data.len());
    for (i, (datum, tensor)) in data.iter().zip(&inputs).enumerate() {
        let gradient = match gradients.get(tensor) {
            Some(gradient) => {
                gradient.neg().and_then(|g| g.to_vec1::<f32>()).map_err(|e| failed("its gradient", e))?
            }
            None => vec![0.0; tensor.elem_count()],
        };
        if let Some(position) = gradient.iter().position(|g| !g.is_finite()) {
            let message =
                format!("the custom loss's gradient at data[{i}], position {position} is not finite");
            return Err(OperationError::new(ErrorKind::NotFinite, message));
        }
        weighted_data.push(weighted(i, datum, &|_| TensorData::from_f32(gradient.clone()))?);
    }
    metrics.insert("loss".into(), value);
    Ok((weighted_data, metrics))
}

/// 0 where the tensor is NaN.
fn zero_nan(tensor: &Tensor) -> candle_core::Result<Tensor> {
    let values: Vec<f32> = tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?;
    let values: Vec<f32> = values.into_iter().map(|v| if v.is_nan() { 0.0 } else { v }).collect();
    Tensor::from_vec(values, tensor.shape(), &Device::Cpu)
}

fn internal(message: &str) -> OperationError {
    OperationError::new(ErrorKind::Internal, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ModelInput;

    fn datum(tokens: usize) -> Datum {
        let targets = TensorData::from_i64(vec![1; tokens]);
        Datum {
            model_input: ModelInput::from_ints(vec![1; tokens]),
            loss_fn_inputs: [("target_tokens".to_owned(), targets)].into(),
        }
    }

    fn output(logprobs: &[&[f32]]) -> ForwardBackwardOutput {
        ForwardBackwardOutput {
            loss: 0.0,
            loss_fn_output_type: "cross_entropy".into(),
            loss_fn_outputs: logprobs
                .iter()
                .map(|lp| [("logprobs".to_owned(), TensorData::from_f32(lp.to_vec()))].into())
                .collect(),
            metrics: BTreeMap::new(),
        }
    }

    #[test]
    fn a_custom_gradient_becomes_negative_weights() {
        // loss = Σ lp² over both datums, so ∂loss/∂lp = 2 lp and the weights are −2 lp.
        let loss_fn: CustomLossFn = Box::new(|_, logprobs| {
            let squares =
                logprobs.iter().map(|lp| lp.sqr()?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
            Ok(CustomLoss { loss: Tensor::stack(&squares, 0)?.sum_all()?, metrics: BTreeMap::new() })
        });
        let data = vec![datum(2), datum(1)];
        let (weighted, metrics) =
            evaluate(data, &output(&[&[-1.0, -2.0], &[-0.5]]), loss_fn).expect("a differentiable loss");
        assert_eq!(weighted[0].loss_fn_inputs["weights"], TensorData::from_f32(vec![2.0, 4.0]));
        assert_eq!(weighted[1].loss_fn_inputs["weights"], TensorData::from_f32(vec![1.0]));
        assert_eq!(metrics["loss"], 5.25);
    }

    #[test]
    fn a_custom_loss_without_gradient_is_refused() {
        let loss_fn: CustomLossFn = Box::new(|_, _| {
            Ok(CustomLoss { loss: Tensor::new(1f32, &Device::Cpu)?, metrics: BTreeMap::new() })
        });
        let refused = evaluate(vec![datum(1)], &output(&[&[-1.0]]), loss_fn);
        assert_eq!(refused.map_err(|e| e.kind).map(|_| ()), Err(ErrorKind::InvalidInput));
    }

    #[test]
    fn missing_targets_of_a_custom_loss_are_named() {
        let mut bare = datum(1);
        bare.loss_fn_inputs.clear();
        let refused = without_weights(&[datum(1), bare]).expect_err("no targets to score");
        assert!(refused.message.contains("data[1].loss_fn_inputs.target_tokens"), "{refused}");
    }

    #[test]
    fn large_calls_are_cut_between_datums_and_joined_by_tokens() {
        // 12 bytes a token: 4 of the input, 8 of the targets.
        let half = PART_BYTES / 12 / 2;
        let parts = split(vec![datum(half), datum(half), datum(half), datum(1)], 1);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
        assert_eq!(split(vec![datum(3 * half), datum(1)], 1).len(), 2);
        let pairs = split(vec![datum(1), datum(half), datum(1), datum(half), datum(1), datum(1)], 2);
        assert_eq!(pairs.iter().map(Vec::len).collect::<Vec<_>>(), [2, 4]);

        let part = |loss: f64, tokens: f64| ForwardBackwardOutput {
            loss,
            metrics: [("loss".to_owned(), loss), ("tokens".to_owned(), tokens)].into(),
            ..output(&[&[-1.0]])
        };
        let joined = join_parts(vec![part(1.0, 3.0), part(2.0, 1.0)], false);
        assert_eq!((joined.loss, joined.metrics["tokens"]), (1.25, 4.0));
        assert_eq!(joined.loss_fn_outputs.len(), 2);
        assert_eq!(join_parts(vec![part(1.0, 3.0), part(2.0, 1.0)], true).loss, 3.0);
    }
}

use crate::{
    model::{
        ModelConfig,
        loss::{Loss, LossInputs},
    },
    types::{Datum, InvalidInput, LossFn, LossSpec, ModelInputChunk, TensorData, TensorValues},
};

use super::{Example, Target};

/// A target that stands for none: the position is inactive, its output NaN.
const NO_TARGET: i64 = -100;

/// Checks `data` (the whole call) and makes examples of it.
///
/// Logits at position i are scored against `target_tokens[i]`; without `target_tokens` against
/// the next token, and the last position has none. Refused, each by the name of its field:
/// no data, an empty sequence or one that is too long, tokens outside the vocabulary, images,
/// loss inputs that are missing, unknown, wrongly shaped, fractional (tokens) or not finite at
/// an active position, unknown settings of the loss. What stands at inactive positions is not
/// read.
pub fn prepare(
    config: &ModelConfig,
    max_seq_len: usize,
    loss: &LossSpec,
    data: &[Datum],
) -> Result<Vec<Example>, InvalidInput> {
    loss.validate()?;
    if loss.top_k_logprobs as usize > config.vocab_size {
        let problem = format!(
            "must be at most {}, the size of the vocabulary, got {}",
            config.vocab_size, loss.top_k_logprobs
        );
        return Err(InvalidInput::new("top_k_logprobs", problem));
    }
    if data.is_empty() {
        return Err(InvalidInput::new("data", "must hold at least one datum, got none"));
    }
    let call = Call { config, max_seq_len: max_seq_len.min(config.max_position_embeddings), loss };
    let mut examples = Vec::with_capacity(data.len());
    for (i, datum) in data.iter().enumerate() {
        let example = call.example(i, datum).map_err(|error| error.within(format!("data[{i}]")))?;
        refuse_mixed_targets(&examples, &example)?;
        examples.push(example);
    }
    Ok(examples)
}

/// All datums of a call share rank and K of their targets.
fn refuse_mixed_targets(before: &[Example], example: &Example) -> Result<(), InvalidInput> {
    let Some(first) = before.first() else { return Ok(()) };
    let (expected, found) = (&first.logprobs_shape[1..], &example.logprobs_shape[1..]);
    if expected == found {
        return Ok(());
    }
    let per_position = |shape: &[usize]| match shape {
        [] => "one target".to_owned(),
        [k, ..] => format!("a row of {k} targets"),
    };
    Err(InvalidInput::new(
        format!("data[{}].loss_fn_inputs.target_tokens", example.datum),
        format!(
            "must have as many targets a position as `data[0]`, which has {}, got {}",
            per_position(expected),
            per_position(found)
        ),
    ))
}

/// What all datums of a call are checked against.
struct Call<'a> {
    config: &'a ModelConfig,
    max_seq_len: usize,
    loss: &'a LossSpec,
}

impl Call<'_> {
    fn example(&self, index: usize, datum: &Datum) -> Result<Example, InvalidInput> {
        let tokens = self.sequence(datum)?;
        let loss = Loss::new(self.loss.loss_fn);
        self.refuse_wrong_names(loss, datum)?;
        let grid = self.targets(datum, &tokens)?;
        let inputs = Inputs::read(datum, &grid)?;
        let mut example = Example {
            datum: index,
            targets: Vec::new(),
            logprobs: vec![0.0; grid.tokens.len()],
            logprobs_shape: grid.shape.clone(),
            active: 0,
            tokens,
        };
        let width = grid.width();
        for row in 0..example.tokens.len() {
            let before = example.targets.len();
            let mut is_active = false;
            for slot in row * width..(row + 1) * width {
                let token = match grid.tokens[slot] {
                    Slot::Token(token) => token,
                    Slot::Ignored => {
                        example.logprobs[slot] = f32::NAN;
                        continue;
                    }
                    Slot::End => continue,
                };
                let active = inputs.at(slot, row)?;
                is_active |= active.is_some();
                // Cross-entropy scores every target: callers read log-probabilities at weight 0.
                if active.is_some() || self.loss.loss_fn == LossFn::CrossEntropy {
                    example.targets.push(Target { row, token, slot: Some(slot), loss: active });
                }
            }
            example.active += u64::from(is_active);
            if self.loss.top_k_logprobs > 0 && example.targets.len() == before {
                example.targets.push(Target { row, token: 0, slot: None, loss: None });
            }
        }
        Ok(example)
    }

    /// The token ids of the datum's sequence.
    fn sequence(&self, datum: &Datum) -> Result<Vec<u32>, InvalidInput> {
        let mut tokens = Vec::new();
        for (i, chunk) in datum.model_input.chunks.iter().enumerate() {
            match chunk {
                ModelInputChunk::EncodedText(text) => tokens.extend(&text.tokens),
                ModelInputChunk::Image(_) => {
                    return Err(InvalidInput::new(
                        format!("model_input.chunks[{i}]"),
                        "is an image, and this model has no vision",
                    ));
                }
            }
        }
        if tokens.is_empty() {
            return Err(InvalidInput::new("model_input", "must hold at least one token, got none"));
        }
        if tokens.len() > self.max_seq_len {
            return Err(InvalidInput::new(
                "model_input",
                format!("must have at most {} tokens, got {}", self.max_seq_len, tokens.len()),
            ));
        }
        match tokens.iter().position(|&token| token as usize >= self.config.vocab_size) {
            Some(position) => Err(InvalidInput::new(
                "model_input",
                format!(
                    "token ids must be below {}, the size of the vocabulary, got {} at position {position}",
                    self.config.vocab_size, tokens[position]
                ),
            )),
            None => Ok(tokens),
        }
    }

    fn refuse_wrong_names(&self, loss: Loss, datum: &Datum) -> Result<(), InvalidInput> {
        let (required, optional) = (loss.required_inputs(), loss.optional_inputs());
        let given = &datum.loss_fn_inputs;
        if let Some(name) = required.iter().find(|name| !given.contains_key(**name)) {
            return Err(InvalidInput::new(
                format!("loss_fn_inputs.{name}"),
                format!("is missing, and `{}` needs it", self.loss.loss_fn),
            ));
        }
        let is_known = |name: &str| required.contains(&name) || optional.contains(&name);
        if let Some(name) = given.keys().find(|name| !is_known(name)) {
            let known = [required, optional].concat().join(", ");
            return Err(InvalidInput::new(
                format!("loss_fn_inputs.{name}"),
                format!("is no input of `{}`; it knows {known}", self.loss.loss_fn),
            ));
        }
        Ok(())
    }

    /// The targets of each position: those given, or the next token.
    fn targets(&self, datum: &Datum, tokens: &[u32]) -> Result<Grid, InvalidInput> {
        let n = tokens.len();
        let Some(given) = datum.loss_fn_inputs.get("target_tokens") else {
            let next = tokens[1..].iter().map(|&token| Slot::Token(token));
            return Ok(Grid { tokens: next.chain([Slot::End]).collect(), shape: vec![n] });
        };
        let several = self.loss.loss_fn == LossFn::CrossEntropy;
        let is_fitting = match given.shape() {
            [rows] => *rows == n,
            [rows, k] => *rows == n && *k > 0 && several,
            _ => false,
        };
        if !is_fitting {
            let wanted = if several { format!("[{n}] or [{n}, K]") } else { format!("[{n}]") };
            return Err(InvalidInput::new(
                "loss_fn_inputs.target_tokens",
                format!("must have shape {wanted}, got {:?}", given.shape()),
            ));
        }
        let width = given.shape().get(1).copied().unwrap_or(1);
        let slots = (0..n * width).map(|slot| self.target(given, slot, slot / width));
        Ok(Grid { tokens: slots.collect::<Result<_, _>>()?, shape: given.shape().to_vec() })
    }

    fn target(&self, given: &TensorData, slot: usize, row: usize) -> Result<Slot, InvalidInput> {
        let refused = |got: String| {
            let bound = self.config.vocab_size;
            let problem = format!(
                "must be whole token ids below {bound}, the size of the vocabulary, or {NO_TARGET} for no \
                 target, got {got} at position {row}"
            );
            InvalidInput::new("loss_fn_inputs.target_tokens", problem)
        };
        // Clients declare an integer dtype and write 3.0, or the reverse: the value counts.
        let whole = |value: f64| {
            if value.fract() == 0.0 { Ok(value as i64) } else { Err(refused(value.to_string())) }
        };
        let token = match given.values() {
            TensorValues::I64(values) => values[slot],
            TensorValues::F32(values) => whole(f64::from(values[slot]))?,
            TensorValues::F64(values) => whole(values[slot])?,
        };
        if token == NO_TARGET {
            return Ok(Slot::Ignored);
        }
        match u32::try_from(token) {
            Ok(id) if (id as usize) < self.config.vocab_size => Ok(Slot::Token(id)),
            _ => Err(refused(token.to_string())),
        }
    }
}

/// The targets of a datum, `[N]` or `[N, K]` row-major.
struct Grid {
    tokens: Vec<Slot>,
    shape: Vec<usize>,
}

impl Grid {
    /// Targets a position.
    fn width(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }
}

#[derive(Clone, Copy)]
enum Slot {
    Token(u32),
    /// −100.
    Ignored,
    /// The last position, when targets are the next tokens.
    End,
}

/// The loss inputs of a datum besides its targets, their shapes checked.
struct Inputs<'a> {
    /// Like the targets.
    weights: Option<&'a TensorData>,
    mask: Option<&'a TensorData>,
    logprobs: Option<&'a TensorData>,
    /// `[N]`, or one value for the whole sequence.
    advantages: Option<&'a TensorData>,
}

impl<'a> Inputs<'a> {
    fn read(datum: &'a Datum, grid: &Grid) -> Result<Self, InvalidInput> {
        let of_shape = |name: &str, shape: &[usize], may_broadcast: bool| {
            let Some(tensor) = datum.loss_fn_inputs.get(name) else { return Ok(None) };
            if tensor.shape() == shape || may_broadcast && tensor.shape().iter().product::<usize>() == 1 {
                return Ok(Some(tensor));
            }
            let or_one = if may_broadcast { " or hold one value" } else { "" };
            Err(InvalidInput::new(
                format!("loss_fn_inputs.{name}"),
                format!("must have shape {shape:?}{or_one}, got {:?}", tensor.shape()),
            ))
        };
        let rows = &grid.shape[..1];
        Ok(Self {
            weights: of_shape("weights", &grid.shape, false)?,
            mask: of_shape("mask", rows, false)?,
            logprobs: of_shape("logprobs", rows, false)?,
            advantages: of_shape("advantages", rows, true)?,
        })
    }

    /// What the loss reads at a target; absent if that is inactive: a weight or advantage of
    /// 0, or a mask that is not above 0. Everything read must then be finite.
    fn at(&self, slot: usize, row: usize) -> Result<Option<LossInputs>, InvalidInput> {
        let weight = self.weights.map_or(1.0, |tensor| float(tensor, slot));
        let mask = self.mask.map_or(1.0, |tensor| float(tensor, row));
        let advantage = self.advantages.map(|tensor| match tensor.shape().iter().product::<usize>() {
            1 => float(tensor, 0),
            _ => float(tensor, row),
        });
        if weight == 0.0 || mask <= 0.0 || advantage == Some(0.0) {
            return Ok(None);
        }
        let sampler_logprob = self.logprobs.map(|tensor| float(tensor, row));
        let read = [
            ("weights", Some(weight)),
            ("mask", Some(mask)),
            ("advantages", advantage),
            ("logprobs", sampler_logprob),
        ];
        for (name, value) in read {
            if let Some(value) = value.filter(|value| !value.is_finite()) {
                return Err(InvalidInput::new(
                    format!("loss_fn_inputs.{name}"),
                    format!("must be finite where the position is active, got {value} at position {row}"),
                ));
            }
        }
        Ok(Some(LossInputs {
            weight,
            sampler_logprob: sampler_logprob.unwrap_or(0.0),
            advantage: advantage.unwrap_or(0.0),
        }))
    }
}

/// Element `i` in the type that losses compute with.
fn float(tensor: &TensorData, i: usize) -> f32 {
    match tensor.values() {
        TensorValues::F32(values) => values[i],
        TensorValues::F64(values) => values[i] as f32,
        TensorValues::I64(values) => values[i] as f32,
    }
}

#[cfg(test)]
#[path = "prepare_test.rs"]
mod tests;

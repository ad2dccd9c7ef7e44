//! Checks of a call's data against its loss, as far as they need no weights.
//!
//! Whoever takes a call may check it at once; whoever computes it reads it through the same
//! checks. What stands at inactive positions is not looked at.

mod inputs;
mod targets;

use crate::types::{Datum, InvalidInput, ModelInputChunk};

use super::{LossFn, LossSpec};

use inputs::Inputs;
use targets::{Grid, Slot};

/// What a run and its model allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataLimits {
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Most positions of a sequence: the run's limit, or the model's if that is smaller.
    pub max_seq_len: usize,
}

/// A datum that its loss can be computed of.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckedDatum {
    /// The sequence of N positions.
    pub tokens: Vec<u32>,
    /// Shape of the targets, `[N]` or `[N, K]`.
    pub shape: Vec<usize>,
    /// The targets, row-major.
    pub targets: Vec<CheckedTarget>,
}

/// One target of a position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CheckedTarget {
    /// The caller wrote −100: there is none.
    Ignored,
    /// Targets are the next tokens, and this is the last position.
    End,
    /// A token to score.
    Token {
        /// Its id.
        token: u32,
        /// Absent where it is inactive: it then adds nothing to loss, gradient and count.
        loss: Option<LossInputs>,
        /// For `gspo`: the sampler's log-probability, where the position counts in its
        /// sequence's ratio.
        ratio_logprob: Option<f32>,
    },
}

/// What an active position brings to its loss besides the target; all finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossInputs {
    /// `w`: multiplies value and derivative; 1 where the caller gives none.
    pub weight: f32,
    /// `q`: the target's log-probability under the policy to compare with, which is the
    /// sampler's, or the reference's for `dpo`; 0 for losses that read none.
    pub logprob: f32,
    /// `A`; 0 for losses that read none.
    pub advantage: f32,
    /// Bounds of the ratio given for this position, which replace the loss's settings.
    pub clip: Option<[f32; 2]>,
}

impl LossSpec {
    /// Checks a whole call. Refused, each by the name of its field (`data[3].model_input`):
    /// settings that [`LossSpec::validate`] refuses, no data, an odd number of datums for
    /// `dpo`, an empty sequence or one that is too long, tokens outside the vocabulary, images,
    /// loss inputs that are missing, unknown, wrongly shaped, fractional (tokens) or not finite
    /// at an active position.
    pub fn check_data(&self, limits: DataLimits, data: &[Datum]) -> Result<(), InvalidInput> {
        self.visit_data(limits, data, |_| ())
    }

    /// [`check_data`](Self::check_data), and hands over each datum as it was read, in order.
    pub fn visit_data(
        &self,
        limits: DataLimits,
        data: &[Datum],
        mut visit: impl FnMut(CheckedDatum),
    ) -> Result<(), InvalidInput> {
        self.check_call(limits, data)?;
        let reader = Reader { loss_fn: self.loss_fn, limits };
        let mut first: Option<Vec<usize>> = None;
        for (i, datum) in data.iter().enumerate() {
            let checked = reader.datum(datum).map_err(|error| error.within(format!("data[{i}]")))?;
            let per_position = &checked.shape[1..];
            refuse_mixed_targets(i, first.get_or_insert_with(|| per_position.to_vec()), per_position)?;
            visit(checked);
        }
        Ok(())
    }

    /// What concerns the call as a whole.
    fn check_call(&self, limits: DataLimits, data: &[Datum]) -> Result<(), InvalidInput> {
        self.validate()?;
        if self.top_k_logprobs as usize > limits.vocab_size {
            let problem = format!(
                "must be at most {}, the size of the vocabulary, got {}",
                limits.vocab_size, self.top_k_logprobs
            );
            return Err(InvalidInput::new("top_k_logprobs", problem));
        }
        if data.is_empty() {
            return Err(InvalidInput::new("data", "must hold at least one datum, got none"));
        }
        if !data.len().is_multiple_of(self.loss_fn.datums_together()) {
            let problem = format!(
                "must alternate chosen and rejected datums for `{}`, an even number of them, got {}",
                self.loss_fn,
                data.len()
            );
            return Err(InvalidInput::new("data", problem));
        }
        Ok(())
    }
}

/// All datums of a call share rank and K of their targets.
fn refuse_mixed_targets(datum: usize, expected: &[usize], found: &[usize]) -> Result<(), InvalidInput> {
    if expected == found {
        return Ok(());
    }
    let per_position = |shape: &[usize]| match shape {
        [] => "one target".to_owned(),
        [k, ..] => format!("a row of {k} targets"),
    };
    Err(InvalidInput::new(
        format!("data[{datum}].loss_fn_inputs.target_tokens"),
        format!(
            "must have as many targets a position as `data[0]`, which has {}, got {}",
            per_position(expected),
            per_position(found)
        ),
    ))
}

/// Reads datum after datum of a call.
struct Reader {
    loss_fn: LossFn,
    limits: DataLimits,
}

impl Reader {
    fn datum(&self, datum: &Datum) -> Result<CheckedDatum, InvalidInput> {
        let tokens = self.sequence(datum)?;
        self.refuse_wrong_names(datum)?;
        let grid = Grid::read(self.loss_fn, self.limits.vocab_size, datum, &tokens)?;
        let inputs = Inputs::read(self.loss_fn, datum, &grid)?;
        let width = grid.width();
        let mut targets = Vec::with_capacity(grid.slots.len());
        for (slot, target) in grid.slots.iter().enumerate() {
            let row = slot / width;
            targets.push(match *target {
                Slot::Ignored => CheckedTarget::Ignored,
                Slot::End => CheckedTarget::End,
                Slot::Token(token) => {
                    let loss = inputs.at(slot, row)?;
                    let ratio_logprob = inputs.ratio_logprob(row, loss.is_some())?;
                    CheckedTarget::Token { token, loss, ratio_logprob }
                }
            });
        }
        Ok(CheckedDatum { tokens, shape: grid.shape, targets })
    }

    /// The token ids of the datum's sequence.
    fn sequence(&self, datum: &Datum) -> Result<Vec<u32>, InvalidInput> {
        let DataLimits { vocab_size, max_seq_len } = self.limits;
        let refused = |problem| Err(InvalidInput::new("model_input", problem));
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
            return refused("must hold at least one token, got none".to_owned());
        }
        if tokens.len() > max_seq_len {
            return refused(format!("must have at most {max_seq_len} tokens, got {}", tokens.len()));
        }
        match tokens.iter().position(|&token| token as usize >= vocab_size) {
            Some(position) => refused(format!(
                "token ids must be below {vocab_size}, the size of the vocabulary, got {} at position {position}",
                tokens[position]
            )),
            None => Ok(tokens),
        }
    }

    fn refuse_wrong_names(&self, datum: &Datum) -> Result<(), InvalidInput> {
        let (required, optional) = (self.loss_fn.required_inputs(), self.loss_fn.optional_inputs());
        let given = &datum.loss_fn_inputs;
        if let Some(name) = required.iter().find(|name| !given.contains_key(**name)) {
            return Err(InvalidInput::new(
                format!("loss_fn_inputs.{name}"),
                format!("is missing, and `{}` needs it", self.loss_fn),
            ));
        }
        let is_known = |name: &str| required.contains(&name) || optional.contains(&name);
        if let Some(name) = given.keys().find(|name| !is_known(name)) {
            let known = [required, optional].concat().join(", ");
            return Err(InvalidInput::new(
                format!("loss_fn_inputs.{name}"),
                format!("is no input of `{}`; it knows {known}", self.loss_fn),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

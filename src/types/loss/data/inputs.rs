use crate::types::{Datum, InvalidInput, LossFn, TensorData, TensorValues};

use super::{Grid, LossInputs};

/// The loss inputs of a datum besides its targets, their shapes checked: `[N]`, except where
/// said.
pub(super) struct Inputs<'a> {
    /// Like the targets.
    weights: Option<&'a TensorData>,
    mask: Option<&'a TensorData>,
    /// `logprobs` or `ref_logprobs`, with its name.
    logprobs: Option<(&'static str, &'a TensorData)>,
    /// `[N]`, or one value for the whole sequence.
    advantages: Option<&'a TensorData>,
    clip_low: Option<&'a TensorData>,
    clip_high: Option<&'a TensorData>,
    sequence_ratio_mask: Option<&'a TensorData>,
    /// Whether the loss has one ratio a sequence.
    has_sequence_ratio: bool,
}

impl<'a> Inputs<'a> {
    pub(super) fn read(loss_fn: LossFn, datum: &'a Datum, grid: &Grid) -> Result<Self, InvalidInput> {
        let rows = &grid.shape[..1];
        let of_rows = |name| input(datum, name, rows, false);
        let logprobs_name = if loss_fn == LossFn::Dpo { "ref_logprobs" } else { "logprobs" };
        let inputs = Self {
            weights: input(datum, "weights", &grid.shape, false)?,
            mask: of_rows("mask")?,
            logprobs: of_rows(logprobs_name)?.map(|tensor| (logprobs_name, tensor)),
            advantages: input(datum, "advantages", rows, true)?,
            clip_low: of_rows("clip_low_threshold")?,
            clip_high: of_rows("clip_high_threshold")?,
            sequence_ratio_mask: of_rows("sequence_ratio_mask")?,
            has_sequence_ratio: loss_fn == LossFn::Gspo,
        };
        // One threshold alone would mix with the other's setting in ways nobody asked for.
        let missing = match (inputs.clip_low, inputs.clip_high) {
            (Some(_), None) => "clip_high_threshold",
            (None, Some(_)) => "clip_low_threshold",
            _ => return Ok(inputs),
        };
        let problem = "is missing; `clip_low_threshold` and `clip_high_threshold` go together";
        Err(InvalidInput::new(format!("loss_fn_inputs.{missing}"), problem))
    }

    /// What the loss reads at a target; absent if that is inactive: a weight or advantage of
    /// 0, or a mask that is not above 0. Everything read must then be finite.
    pub(super) fn at(&self, slot: usize, row: usize) -> Result<Option<LossInputs>, InvalidInput> {
        let weight = self.weights.map_or(1.0, |tensor| float(tensor, slot));
        let mask = self.mask.map_or(1.0, |tensor| float(tensor, row));
        let advantage = self.advantages.map(|tensor| match tensor.len() {
            1 => float(tensor, 0),
            _ => float(tensor, row),
        });
        if weight == 0.0 || mask <= 0.0 || advantage == Some(0.0) {
            return Ok(None);
        }
        finite("weights", weight, row)?;
        finite("mask", mask, row)?;
        let logprob = match self.logprobs {
            Some((name, tensor)) => finite(name, float(tensor, row), row)?,
            None => 0.0,
        };
        let advantage = finite("advantages", advantage.unwrap_or(0.0), row)?;
        Ok(Some(LossInputs { weight, logprob, advantage, clip: self.clip(row)? }))
    }

    /// The thresholds given for an active position.
    fn clip(&self, row: usize) -> Result<Option<[f32; 2]>, InvalidInput> {
        let (Some(low), Some(high)) = (self.clip_low, self.clip_high) else { return Ok(None) };
        let low = finite("clip_low_threshold", float(low, row), row)?;
        let high = finite("clip_high_threshold", float(high, row), row)?;
        if low < 0.0 || low > high {
            let problem = format!(
                "must lie between 0 and `clip_high_threshold`, which is {high}, got {low} at position {row}"
            );
            return Err(InvalidInput::new("loss_fn_inputs.clip_low_threshold", problem));
        }
        Ok(Some([low, high]))
    }

    /// The sampler's log-probability, where the position counts in its sequence's ratio: as
    /// `sequence_ratio_mask` says, without one where it is active.
    pub(super) fn ratio_logprob(&self, row: usize, is_active: bool) -> Result<Option<f32>, InvalidInput> {
        let (true, Some((name, logprobs))) = (self.has_sequence_ratio, self.logprobs) else {
            return Ok(None);
        };
        let counts = match self.sequence_ratio_mask {
            Some(mask) => finite("sequence_ratio_mask", float(mask, row), row)? != 0.0,
            None => is_active,
        };
        counts.then(|| finite(name, float(logprobs, row), row)).transpose()
    }
}

/// An input by name, its shape checked.
fn input<'a>(
    datum: &'a Datum,
    name: &str,
    shape: &[usize],
    may_broadcast: bool,
) -> Result<Option<&'a TensorData>, InvalidInput> {
    let Some(tensor) = datum.loss_fn_inputs.get(name) else { return Ok(None) };
    if tensor.shape() == shape || may_broadcast && tensor.len() == 1 {
        return Ok(Some(tensor));
    }
    let or_one = if may_broadcast { " or hold one value" } else { "" };
    Err(InvalidInput::new(
        format!("loss_fn_inputs.{name}"),
        format!("must have shape {shape:?}{or_one}, got {:?}", tensor.shape()),
    ))
}

/// The value, unless it is NaN or infinite.
fn finite(name: &str, value: f32, row: usize) -> Result<f32, InvalidInput> {
    if value.is_finite() {
        return Ok(value);
    }
    Err(InvalidInput::new(
        format!("loss_fn_inputs.{name}"),
        format!("must be finite where the position is active, got {value} at position {row}"),
    ))
}

/// Element `i` in the type that losses compute with.
fn float(tensor: &TensorData, i: usize) -> f32 {
    match tensor.values() {
        TensorValues::F32(values) => values[i],
        TensorValues::F64(values) => values[i] as f32,
        TensorValues::I64(values) => values[i] as f32,
    }
}

use crate::types::{Datum, InvalidInput, LossFn, TensorData, TensorValues};

/// A target that stands for none: the position is inactive, its output NaN.
const NO_TARGET: i64 = -100;

/// The targets of a datum.
pub(super) struct Grid {
    /// Row-major.
    pub(super) slots: Vec<Slot>,
    /// `[N]` or `[N, K]`.
    pub(super) shape: Vec<usize>,
}

#[derive(Clone, Copy)]
pub(super) enum Slot {
    Token(u32),
    /// [`NO_TARGET`].
    Ignored,
    /// The last position, when targets are the next tokens.
    End,
}

impl Grid {
    /// The targets of each position: those given, or the next token.
    ///
    /// Logits at position i are scored against `target_tokens[i]`: callers have shifted.
    pub(super) fn read(
        loss_fn: LossFn,
        vocab_size: usize,
        datum: &Datum,
        tokens: &[u32],
    ) -> Result<Self, InvalidInput> {
        let n = tokens.len();
        let Some(given) = datum.loss_fn_inputs.get("target_tokens") else {
            let next = tokens[1..].iter().map(|&token| Slot::Token(token));
            return Ok(Self { slots: next.chain([Slot::End]).collect(), shape: vec![n] });
        };
        let several = loss_fn == LossFn::CrossEntropy;
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
        let slots = (0..n * width).map(|slot| target(given, slot, slot / width, vocab_size));
        Ok(Self { slots: slots.collect::<Result<_, _>>()?, shape: given.shape().to_vec() })
    }

    /// Targets a position.
    pub(super) fn width(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }
}

fn target(given: &TensorData, slot: usize, row: usize, vocab_size: usize) -> Result<Slot, InvalidInput> {
    let refused = |got: String| {
        let problem = format!(
            "must be whole token ids below {vocab_size}, the size of the vocabulary, or {NO_TARGET} for no \
             target, got {got} at position {row}"
        );
        InvalidInput::new("loss_fn_inputs.target_tokens", problem)
    };
    // Clients declare an integer dtype and write 3.0, or the reverse: the value counts.
    let whole =
        |value: f64| if value.fract() == 0.0 { Ok(value as i64) } else { Err(refused(value.to_string())) };
    let token = match given.values() {
        TensorValues::I64(values) => values[slot],
        TensorValues::F32(values) => whole(f64::from(values[slot]))?,
        TensorValues::F64(values) => whole(values[slot])?,
    };
    if token == NO_TARGET {
        return Ok(Slot::Ignored);
    }
    match u32::try_from(token) {
        Ok(id) if (id as usize) < vocab_size => Ok(Slot::Token(id)),
        _ => Err(refused(token.to_string())),
    }
}

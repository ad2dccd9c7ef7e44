use crate::{
    model::ModelConfig,
    types::{CheckedDatum, CheckedTarget, DataLimits, Datum, InvalidInput, LossFn, LossSpec},
};

use super::{Example, Target};

/// Checks `data` (the whole call) and makes examples of it. Refuses what
/// [`LossSpec::check_data`] refuses.
///
/// Logits at position i are scored against `target_tokens[i]`; without `target_tokens` against
/// the next token, and the last position has none.
pub fn prepare(
    config: &ModelConfig,
    max_seq_len: usize,
    loss: &LossSpec,
    data: &[Datum],
) -> Result<Vec<Example>, InvalidInput> {
    let max_seq_len = max_seq_len.min(config.max_position_embeddings);
    let limits = DataLimits { vocab_size: config.vocab_size, max_seq_len };
    let wanted = Wanted {
        // Callers read log-probabilities of cross-entropy at weight 0.
        scores_inactive: loss.loss_fn == LossFn::CrossEntropy || loss.setting("score_inactive") == Some(1.0),
        alternatives: loss.top_k_logprobs > 0,
    };
    let together = loss.loss_fn.datums_together();
    let mut examples: Vec<Example> = Vec::with_capacity(data.len());
    loss.visit_data(limits, data, |datum| {
        let index = examples.len();
        examples.push(wanted.example(index, !index.is_multiple_of(together), datum));
    })?;
    if together > 1 {
        examples.chunks_mut(together).for_each(count_once);
    }
    Ok(examples)
}

/// Datums with one loss between them count as one, if anything of them is active.
fn count_once(group: &mut [Example]) {
    let is_active = group.iter().any(|example| example.active > 0);
    group.iter_mut().for_each(|example| example.active = 0);
    group[0].active = u64::from(is_active);
}

/// What a call wants to know beside its loss.
struct Wanted {
    /// Log-probabilities of inactive targets.
    scores_inactive: bool,
    /// The most likely tokens of every row.
    alternatives: bool,
}

impl Wanted {
    fn example(&self, datum: usize, continues: bool, checked: CheckedDatum) -> Example {
        let CheckedDatum { tokens, shape, targets: cells } = checked;
        let width = shape.get(1).copied().unwrap_or(1);
        let mut example = Example {
            datum,
            continues,
            targets: Vec::new(),
            logprobs: vec![0.0; cells.len()],
            logprobs_shape: shape,
            active: 0,
            tokens,
        };
        for (row, cells) in cells.chunks(width).enumerate() {
            let before = example.targets.len();
            for (slot, cell) in (row * width..).zip(cells) {
                match *cell {
                    CheckedTarget::Ignored => example.logprobs[slot] = f32::NAN,
                    CheckedTarget::End => {}
                    CheckedTarget::Token { token, loss, ratio_logprob } => {
                        if self.scores_inactive || loss.is_some() || ratio_logprob.is_some() {
                            let slot = Some(slot);
                            example.targets.push(Target { row, token, slot, loss, ratio_logprob });
                        }
                    }
                }
            }
            let is_active = example.targets[before..].iter().any(|target| target.loss.is_some());
            example.active += u64::from(is_active);
            if self.alternatives && example.targets.len() == before {
                let of_the_row_alone = Target { row, token: 0, slot: None, loss: None, ratio_logprob: None };
                example.targets.push(of_the_row_alone);
            }
        }
        example
    }
}

#[cfg(test)]
#[path = "prepare_test.rs"]
mod tests;

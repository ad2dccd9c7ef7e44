use std::collections::BTreeMap;

use crate::{
    kernels::Team,
    model::{
        AdapterRows, BaseModel, Batch, BatchSequence, Tape, Workspace,
        decoder::{backward, forward, head_logprobs},
        loss::{Loss, LossAt, PolicyGap},
    },
    types::{DatumOutput, Dtype, ErrorKind, LossSpec, OperationError, TensorData, TensorValues},
};

use super::{Example, MicroBatchOutput, Target};

/// Loss and log-probabilities of one micro-batch; with `gradient` (`layout.len()` zeroed
/// values) also the gradient of the loss's sum.
///
/// Outputs, one per example: `logprobs` (float32, `[N]` or `[N, K]`), and with
/// `top_k_logprobs` also `top_k_token_ids` (int64, `[N, k]`) and `top_k_logprobs` (float32,
/// `[N, k]`), descending. Fails with `NotFinite`, naming the datum, if a loss or its
/// derivative leaves the range of f32; `gradient` is then of no use.
pub fn run_micro_batch(
    model: &BaseModel,
    adapter: AdapterRows<'_>,
    loss: &LossSpec,
    examples: &[Example],
    gradient: Option<&mut [f32]>,
    workspace: &mut Workspace,
    team: &Team,
) -> Result<MicroBatchOutput, OperationError> {
    let scorer = Scorer { loss: Loss::new(loss.loss_fn), top_k: loss.top_k_logprobs as usize };
    let packed = Packed::new(examples);
    let scores = if packed.targets.is_empty() {
        Scores::default()
    } else {
        scorer.score(model, adapter, &packed, gradient, workspace, team)?
    };
    Ok(scorer.output(examples, &packed, scores))
}

/// Examples end to end, without those of which nothing is wanted.
struct Packed<'a> {
    examples: Vec<&'a Example>,
    /// Every target with its row in the packed batch, by row.
    targets: Vec<(usize, &'a Target)>,
    /// Which datum each target is of.
    datums: Vec<usize>,
}

impl<'a> Packed<'a> {
    fn new(examples: &'a [Example]) -> Self {
        let examples: Vec<&Example> = examples.iter().filter(|example| !example.targets.is_empty()).collect();
        let (mut targets, mut datums) = (Vec::new(), Vec::new());
        let mut first_row = 0;
        for example in &examples {
            targets.extend(example.targets.iter().map(|target| (first_row + target.row, target)));
            datums.resize(targets.len(), example.datum);
            first_row += example.tokens.len();
        }
        Self { examples, targets, datums }
    }
}

/// What was computed, one entry per packed target.
#[derive(Default)]
struct Scores {
    logprobs: Vec<f32>,
    alternatives: Vec<Vec<(u32, f32)>>,
    losses: Vec<Option<LossAt>>,
}

struct Scorer {
    loss: Loss,
    top_k: usize,
}

impl Scorer {
    /// Forward, loss, and if a gradient is wanted, backward.
    fn score(
        &self,
        model: &BaseModel,
        adapter: AdapterRows<'_>,
        packed: &Packed<'_>,
        gradient: Option<&mut [f32]>,
        workspace: &mut Workspace,
        team: &Team,
    ) -> Result<Scores, OperationError> {
        let sequence = |example: &&'_ Example| -> usize { example.tokens.len() };
        let rows: usize = packed.examples.iter().map(sequence).sum();
        let sequences = packed.examples.iter().map(|example| BatchSequence {
            tokens: &example.tokens,
            kv_cache: None,
            adapter: Some(adapter),
        });
        let mut batch = Batch { sequences: sequences.collect() };
        let mut tape = gradient.is_some().then(Tape::default);
        let hidden = forward(model, &mut batch, tape.as_mut(), workspace, team);

        let targets: Vec<(usize, u32)> = packed.targets.iter().map(|(row, t)| (*row, t.token)).collect();
        let mut d_hidden = gradient.is_some().then(|| vec![0.0; rows * model.config.hidden_size]);
        let mut is_flat = true;
        let mut factor = |i: usize, logprob: f32| {
            let derivative = self.at(packed.targets[i].1, logprob).map_or(0.0, |at| at.derivative as f32);
            is_flat &= derivative == 0.0;
            derivative
        };
        let mut scores = Scores::default();
        head_logprobs(
            model,
            &hidden,
            &targets,
            &mut factor,
            &mut scores.logprobs,
            d_hidden.as_deref_mut(),
            self.top_k,
            &mut scores.alternatives,
            workspace,
            team,
        );
        let losses = packed.targets.iter().zip(&scores.logprobs);
        scores.losses = losses.map(|((_, target), logprob)| self.at(target, *logprob)).collect();
        refuse_infinite(packed, &scores)?;
        if let (Some(gradient), Some(tape), Some(d_hidden), false) = (gradient, &mut tape, d_hidden, is_flat)
        {
            backward(model, adapter, tape, &d_hidden, gradient, workspace, team);
        }
        Ok(scores)
    }

    /// The loss of an active target.
    fn at(&self, target: &Target, logprob: f32) -> Option<LossAt> {
        target.loss.as_ref().map(|inputs| self.loss.at(logprob, inputs))
    }

    /// Sums in the order of the targets, outputs in that of the examples.
    fn output(&self, examples: &[Example], packed: &Packed<'_>, scores: Scores) -> MicroBatchOutput {
        let mut output = MicroBatchOutput {
            loss_sum: scores.losses.iter().flatten().map(|at| at.value).sum(),
            active: examples.iter().map(|example| example.active).sum(),
            ..MicroBatchOutput::default()
        };
        if self.loss.is_of_sampled_data() {
            add_policy_gap(packed, &scores, &mut output);
        }
        let mut scored = 0;
        for example in examples {
            let range = scored..scored + example.targets.len();
            scored = range.end;
            let alternatives = scores.alternatives.get(range.clone()).unwrap_or_default();
            output.outputs.push(self.datum_output(example, &scores.logprobs[range], alternatives));
        }
        output
    }

    fn datum_output(
        &self,
        example: &Example,
        logprobs: &[f32],
        alternatives: &[Vec<(u32, f32)>],
    ) -> DatumOutput {
        let mut values = example.logprobs.clone();
        for (target, logprob) in example.targets.iter().zip(logprobs) {
            if let Some(slot) = target.slot {
                values[slot] = *logprob;
            }
        }
        let mut output = BTreeMap::new();
        output.insert("logprobs".to_owned(), float_tensor(values, example.logprobs_shape.clone()));
        if self.top_k > 0 {
            // Every row has a target then; the first of a row speaks for it.
            let mut ids = Vec::with_capacity(example.tokens.len() * self.top_k);
            let mut best = Vec::with_capacity(ids.capacity());
            let mut next_row = 0;
            for (target, row) in example.targets.iter().zip(alternatives) {
                if target.row == next_row {
                    next_row += 1;
                    ids.extend(row.iter().map(|(token, _)| i64::from(*token)));
                    best.extend(row.iter().map(|(_, logprob)| *logprob));
                }
            }
            let shape = vec![example.tokens.len(), self.top_k];
            let ids = TensorData::new(TensorValues::I64(ids), Dtype::Int64, shape.clone());
            // `prepare` bounds k by the vocabulary, so the head has k for each row.
            output.insert("top_k_token_ids".to_owned(), ids.expect("k alternatives a row"));
            output.insert("top_k_logprobs".to_owned(), float_tensor(best, shape));
        }
        output
    }
}

/// Refuses losses whose value or derivative is beyond f32, in which gradients are kept.
fn refuse_infinite(packed: &Packed<'_>, scores: &Scores) -> Result<(), OperationError> {
    let is_infinite = |at: &LossAt| !at.value.is_finite() || !(at.derivative as f32).is_finite();
    match scores.losses.iter().position(|at| at.as_ref().is_some_and(is_infinite)) {
        None => Ok(()),
        Some(i) => {
            let (target, logprob) = (packed.targets[i].1, scores.logprobs[i]);
            let q = target.loss.map_or(0.0, |inputs| inputs.sampler_logprob);
            Err(OperationError::new(
                ErrorKind::NotFinite,
                format!(
                    "the loss of `data[{}]` is not finite at position {}: log-probability {logprob}, input \
                     logprob {q}; nothing was accumulated",
                    packed.datums[i], target.row
                ),
            ))
        }
    }
}

/// How far trainer and sampler are apart over the active positions.
fn add_policy_gap(packed: &Packed<'_>, scores: &Scores, output: &mut MicroBatchOutput) {
    let (mut sums, mut largest) = ([0.0; 5], 0.0f64);
    for ((_, target), logprob) in packed.targets.iter().zip(&scores.logprobs) {
        let Some(inputs) = target.loss else { continue };
        let at = PolicyGap::at(*logprob, inputs.sampler_logprob);
        let terms = [at.k1, at.k2, at.k3, at.ratio, at.ratio * at.ratio];
        sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        largest = largest.max(at.gap);
    }
    let names = ["kl_k1", "kl_k2", "kl_k3", "ratio", "ratio_squared"];
    output.sums = names.map(str::to_owned).into_iter().zip(sums).collect();
    output.maxima.insert("max_token_gap".to_owned(), largest);
}

fn float_tensor(values: Vec<f32>, shape: Vec<usize>) -> TensorData {
    // Both come from one example, whose grid of targets `prepare` checked.
    TensorData::new(TensorValues::F32(values), Dtype::Float32, shape).expect("one value per target")
}

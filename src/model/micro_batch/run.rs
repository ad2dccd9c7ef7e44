use std::collections::BTreeMap;

use crate::{
    kernels::Team,
    model::{
        AdapterRows, BaseModel, Batch, BatchSequence, ComputeOptions, HeadGradient, HeadRequest, HeadScores,
        Place, Tape, Workspace,
        decoder::{backward, forward, head_logprobs},
        device::{self, DeviceModel, DeviceSequence, DeviceTape},
        loss::{Loss, LossAt, Scored},
    },
    types::{DatumOutput, Dtype, ErrorKind, LossSpec, OperationError, TensorData, TensorValues},
};

use super::{Example, MicroBatchOutput, Target, groups, metrics};

/// Loss and log-probabilities of one micro-batch; with `gradient` (`layout.len()` zeroed
/// values) also the gradient of the loss's sum.
///
/// Outputs, one per example: `logprobs` (float32, `[N]` or `[N, K]`), and with
/// `top_k_logprobs` also `top_k_token_ids` (int64, `[N, k]`) and `top_k_logprobs` (float32,
/// `[N, k]`), descending. Fails with `NotFinite`, naming the datum, if a loss or its
/// derivative leaves the range of f32; `gradient` is then of no use.
///
/// # Panics
///
/// If the examples begin or end within a pair, which [`cut_micro_batches`](super::cut_micro_batches)
/// never does.
pub fn run_micro_batch(
    model: &BaseModel,
    adapter: AdapterRows<'_>,
    loss: &LossSpec,
    examples: &[Example],
    gradient: Option<&mut [f32]>,
    workspace: &mut Workspace,
    team: &Team,
) -> Result<MicroBatchOutput, OperationError> {
    let scorer = Scorer {
        loss: Loss::new(loss),
        is_of_sampled_data: loss.loss_fn.is_of_sampled_data(),
        top_k: loss.top_k_logprobs as usize,
    };
    let packed = Packed::new(examples);
    let scores = if packed.targets.is_empty() {
        Scores::default()
    } else {
        match &model.place {
            Place::Cpu(_) => scorer.score(model, adapter, &packed, gradient, workspace, team)?,
            Place::Gpu(device) => {
                scorer.score_on_gpu(device, adapter, &packed, gradient, workspace.options())?
            }
        }
    };
    Ok(scorer.output(examples, &packed, scores))
}

/// Examples end to end, without those of which nothing is wanted.
pub(super) struct Packed<'a> {
    all: &'a [Example],
    examples: Vec<&'a Example>,
    /// Every target with its row in the packed batch, by row.
    pub(super) targets: Vec<(usize, &'a Target)>,
    /// Which datum each target is of.
    datums: Vec<usize>,
}

impl<'a> Packed<'a> {
    fn new(all: &'a [Example]) -> Self {
        let examples: Vec<&Example> = all.iter().filter(|example| !example.targets.is_empty()).collect();
        let (mut targets, mut datums) = (Vec::new(), Vec::new());
        let mut first_row = 0;
        for example in &examples {
            targets.extend(example.targets.iter().map(|target| (first_row + target.row, target)));
            datums.resize(targets.len(), example.datum);
            first_row += example.tokens.len();
        }
        Self { all, examples, targets, datums }
    }
}

/// What was computed, one entry per packed target.
#[derive(Default)]
pub(super) struct Scores {
    pub(super) head: HeadScores,
    pub(super) losses: Vec<Option<LossAt>>,
    /// Rewards of the chosen and the rejected sequence, of each active pair.
    pub(super) rewards: Vec<[f64; 2]>,
}

struct Scorer {
    loss: Loss,
    is_of_sampled_data: bool,
    top_k: usize,
}

impl Scorer {
    /// Forward, loss, and if a gradient is wanted, backward.
    fn score(
        &self,
        model: &BaseModel,
        adapter: AdapterRows<'_>,
        packed: &Packed<'_>,
        mut gradient: Option<&mut [f32]>,
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

        let mut d_hidden = gradient.is_some().then(|| vec![0.0; rows * model.config.hidden_size]);
        let scores = self.losses(packed, gradient.is_some(), &mut |request, factor| {
            let places = gradient.as_deref_mut().zip(d_hidden.as_deref_mut()).zip(factor);
            let onward =
                places.map(|((adapter, d_hidden), factor)| HeadGradient { adapter, factor, d_hidden });
            Ok(head_logprobs(model, Some(adapter), &hidden, request, onward, workspace, team))
        })?;
        refuse_infinite(packed, &scores)?;
        if let (Some(gradient), Some(tape), Some(d_hidden), false) =
            (gradient, &mut tape, d_hidden, is_flat(&scores))
        {
            backward(model, adapter, tape, &d_hidden, gradient, workspace, team);
        }
        Ok(scores)
    }

    /// The same on a GPU, of which it takes a turn. The gradient comes back once, at the end.
    fn score_on_gpu(
        &self,
        model: &DeviceModel,
        adapter: AdapterRows<'_>,
        packed: &Packed<'_>,
        gradient: Option<&mut [f32]>,
        options: ComputeOptions,
    ) -> Result<Scores, OperationError> {
        let _turn = model.gpu().turn();
        let on_gpu = model.adapter(adapter)?;
        let sequences = packed.examples.iter().map(|example| DeviceSequence {
            tokens: &example.tokens,
            cache: None,
            adapter: Some(on_gpu.clone()),
        });
        let recomputes = options.activation_checkpointing;
        let mut tape = gradient.is_some().then(|| DeviceTape::new(recomputes));
        let hidden = device::forward(model, &mut sequences.collect::<Vec<_>>(), tape.as_mut())?;

        let mut places = None;
        if gradient.is_some() {
            let d_hidden = model.gpu().zeros(hidden.element(), hidden.len())?;
            places = Some((model.gradient(adapter.layout)?, d_hidden));
        }
        let scores = self.losses(packed, gradient.is_some(), &mut |request, factor| {
            let onward = places.as_ref().zip(factor).map(|((adapter, d_hidden), factor)| {
                device::DeviceHeadGradient { adapter, factor, d_hidden }
            });
            Ok(device::head_logprobs(model, Some(&on_gpu), &hidden, request, onward)?)
        })?;
        refuse_infinite(packed, &scores)?;
        if let (Some(gradient), Some(tape), Some((on_device, d_hidden)), false) =
            (gradient, &mut tape, places, is_flat(&scores))
        {
            device::backward(model, &on_gpu, tape, &d_hidden, &on_device)?;
            gradient.copy_from_slice(&model.gpu().download(&on_device)?);
        }
        Ok(scores)
    }

    /// Log-probabilities and losses of the targets. `head` answers a request, and takes the gradient on where
    /// it is given the derivatives; if a gradient is wanted, it is so once.
    fn losses(
        &self,
        packed: &Packed<'_>,
        wants_gradient: bool,
        head: &mut AskHead<'_>,
    ) -> Result<Scores, OperationError> {
        let targets: Vec<(usize, u32)> = packed.targets.iter().map(|(row, t)| (*row, t.token)).collect();
        let request = HeadRequest { targets: &targets, top_k: self.top_k, entropy: self.is_of_sampled_data };
        let mut scores = Scores::default();
        if let Loss::Position(loss) = self.loss {
            let at = |i: usize, logprob: f32| {
                packed.targets[i].1.loss.as_ref().map(|inputs| loss.at(logprob, inputs))
            };
            let mut factor = |i, logprob| at(i, logprob).map_or(0.0, |at| at.derivative as f32);
            let factor: Option<&mut Factor<'_>> = if wants_gradient { Some(&mut factor) } else { None };
            scores.head = head(request, factor)?;
            scores.losses = (0..).zip(&scores.head.logprobs).map(|(i, logprob)| at(i, *logprob)).collect();
            return Ok(scores);
        }
        // No derivative is known before a whole sequence, or pair, is scored; keeping its logits
        // meanwhile would take more memory than all else, so they are computed a second time.
        scores.head = head(request, None)?;
        self.coupled_losses(packed, &mut scores);
        if wants_gradient {
            let again = HeadRequest { targets: &targets, top_k: 0, entropy: false };
            let mut factor = |i: usize, _: f32| scores.losses[i].map_or(0.0, |at| at.derivative as f32);
            head(again, Some(&mut factor))?;
        }
        Ok(scores)
    }

    /// The losses of sequences or pairs, from the log-probabilities of all their targets.
    fn coupled_losses(&self, packed: &Packed<'_>, scores: &mut Scores) {
        let mut scored = packed.targets.iter().zip(&scores.head.logprobs).map(|((_, target), logprob)| {
            Scored { logprob: *logprob, loss: target.loss, ratio_logprob: target.ratio_logprob }
        });
        for group in groups(packed.all) {
            let mut of =
                |example: &Example| -> Vec<Scored> { scored.by_ref().take(example.targets.len()).collect() };
            match (self.loss, group) {
                (Loss::Pair(preference), [chosen, rejected]) => {
                    let (chosen, rejected) = (of(chosen), of(rejected));
                    let Some(pair) = preference.of_pair(&chosen, &rejected) else {
                        scores.losses.resize(scores.losses.len() + chosen.len() + rejected.len(), None);
                        continue;
                    };
                    scores.rewards.push(pair.rewards);
                    scores.losses.extend(pair.at);
                }
                (Loss::Sequence(clip), [example]) => scores.losses.extend(clip.of_sequence(&of(example))),
                // `cut_micro_batches` never parts what `prepare` made a pair.
                _ => unreachable!("a micro-batch has whole pairs, and single examples"),
            }
        }
    }

    /// Sums in the order of the targets, outputs in that of the examples.
    fn output(&self, examples: &[Example], packed: &Packed<'_>, scores: Scores) -> MicroBatchOutput {
        let mut output = MicroBatchOutput {
            loss_sum: scores.losses.iter().flatten().map(|at| at.value).sum(),
            active: examples.iter().map(|example| example.active).sum(),
            ..MicroBatchOutput::default()
        };
        if self.is_of_sampled_data {
            metrics::add_policy(packed, &scores, &mut output);
        }
        match self.loss {
            Loss::Pair(_) => metrics::add_rewards(&scores, &mut output),
            loss if loss.has_bounds() => metrics::add_clipping(&scores, &mut output),
            _ => {}
        }
        let mut scored = 0;
        for example in examples {
            let range = scored..scored + example.targets.len();
            scored = range.end;
            let alternatives = scores.head.alternatives.get(range.clone()).unwrap_or_default();
            output.outputs.push(self.datum_output(example, &scores.head.logprobs[range], alternatives));
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

/// ∂loss/∂logprob of a target, given its number and log-probability.
type Factor<'a> = dyn FnMut(usize, f32) -> f32 + 'a;

/// The head of a pass that has been computed, wherever.
type AskHead<'a> =
    dyn FnMut(HeadRequest<'_>, Option<&mut Factor<'_>>) -> Result<HeadScores, OperationError> + 'a;

/// Whether no target's loss changes with its log-probability.
fn is_flat(scores: &Scores) -> bool {
    scores.losses.iter().flatten().all(|at| at.derivative as f32 == 0.0)
}

/// Refuses losses whose value or derivative is beyond f32, in which gradients are kept.
fn refuse_infinite(packed: &Packed<'_>, scores: &Scores) -> Result<(), OperationError> {
    let is_infinite = |at: &LossAt| !at.value.is_finite() || !(at.derivative as f32).is_finite();
    match scores.losses.iter().position(|at| at.as_ref().is_some_and(is_infinite)) {
        None => Ok(()),
        Some(i) => {
            let (target, logprob) = (packed.targets[i].1, scores.head.logprobs[i]);
            let q = target.loss.map_or(0.0, |inputs| inputs.logprob);
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

fn float_tensor(values: Vec<f32>, shape: Vec<usize>) -> TensorData {
    // Both come from one example, whose grid of targets `prepare` checked.
    TensorData::new(TensorValues::F32(values), Dtype::Float32, shape).expect("one value per target")
}

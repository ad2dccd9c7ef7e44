//! What is computed of data; `types::loss` tests what is refused.

use super::*;
use crate::{
    model::lora::layout::tests::tiny_model,
    types::{ModelInput, TensorData},
};

use LossFn::{CrossEntropy, Dpo, Gspo, ImportanceSampling};

/// A text of 4 tokens with these inputs.
fn datum<const M: usize>(inputs: [(&str, Vec<f32>); M]) -> Datum {
    let named = inputs.map(|(name, values)| (name.to_owned(), TensorData::from_f32(values)));
    Datum { model_input: ModelInput::from_ints(vec![1, 2, 3, 4]), loss_fn_inputs: named.into() }
}

fn sampled(advantages: [f32; 4]) -> Datum {
    datum([
        ("target_tokens", vec![2.0, 3.0, 4.0, 5.0]),
        ("logprobs", vec![-1.0; 4]),
        ("advantages", advantages.into()),
    ])
}

fn examples(loss: &LossSpec, data: &[Datum]) -> Vec<Example> {
    prepare(&tiny_model(), 16, loss, data).unwrap()
}

fn example(loss_fn: LossFn, datum: Datum) -> Example {
    examples(&LossSpec::new(loss_fn), &[datum]).remove(0)
}

fn rows(example: &Example) -> Vec<usize> {
    example.targets.iter().map(|target| target.row).collect()
}

#[test]
fn the_last_position_has_no_next_token() {
    let example = example(CrossEntropy, datum([]));
    assert_eq!(rows(&example), [0, 1, 2]);
    assert_eq!(example.active, 3);
    assert_eq!(example.logprobs, [0.0; 4]);
}

#[test]
fn the_log_probability_of_no_target_is_nan() {
    let example = example(CrossEntropy, datum([("target_tokens", vec![2.0, -100.0, 4.0, 5.0])]));
    assert_eq!((rows(&example), example.active), (vec![0, 2, 3], 3));
    let is_nan: Vec<bool> = example.logprobs.iter().map(|value| value.is_nan()).collect();
    assert_eq!(is_nan, [false, true, false, false]);
}

#[test]
fn cross_entropy_scores_positions_of_weight_zero_without_counting_them() {
    let weights = ("weights", vec![0.0, -0.5, 0.25, 0.0]);
    let example = example(CrossEntropy, datum([("target_tokens", vec![2.0, 3.0, 4.0, 5.0]), weights]));
    assert_eq!((rows(&example), example.active), (vec![0, 1, 2, 3], 2));
}

#[test]
fn several_targets_a_position_count_once() {
    let pair = |values: Vec<f32>| {
        TensorData::new(crate::types::TensorValues::F32(values), crate::types::Dtype::Float32, vec![4, 2])
            .unwrap()
    };
    let mut datum = datum([]);
    let targets = pair(vec![2.0, 3.0, 3.0, -100.0, 4.0, 5.0, -100.0, -100.0]);
    datum.loss_fn_inputs.insert("target_tokens".into(), targets);
    datum.loss_fn_inputs.insert("weights".into(), pair(vec![1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]));
    let example = example(CrossEntropy, datum);
    assert_eq!((example.active, example.logprobs_shape.clone()), (2, vec![4, 2]));
    let slots: Vec<_> = example.targets.iter().map(|target| target.slot.unwrap()).collect();
    assert_eq!(slots, [0, 1, 2, 4, 5]);
}

#[test]
fn sampled_data_is_scored_where_it_is_active_or_everywhere() {
    let datum = sampled([1.0, 0.0, 0.0, 2.0]);
    assert_eq!(rows(&example(ImportanceSampling, datum.clone())), [0, 3]);
    let mut loss = LossSpec::new(ImportanceSampling);
    loss.config.insert("score_inactive".into(), 1.0);
    let everywhere = examples(&loss, &[datum]).remove(0);
    assert_eq!((rows(&everywhere), everywhere.active), (vec![0, 1, 2, 3], 2));
}

#[test]
fn a_sequences_ratio_needs_scores_of_its_own() {
    let mut datum = sampled([1.0, 0.0, 0.0, 2.0]);
    let mask = TensorData::from_f32(vec![0.0, 1.0, 0.0, 1.0]);
    datum.loss_fn_inputs.insert("sequence_ratio_mask".into(), mask);
    let example = example(Gspo, datum);
    assert_eq!((rows(&example), example.active), (vec![0, 1, 3], 2));
}

#[test]
fn nothing_active_leaves_nothing_to_compute() {
    let example = example(ImportanceSampling, sampled([0.0; 4]));
    assert_eq!((example.active, example.targets.len(), example.tokens()), (0, 0, 1));
}

#[test]
fn alternatives_are_wanted_at_every_position() {
    let mut loss = LossSpec::new(ImportanceSampling);
    loss.top_k_logprobs = 3;
    let example = examples(&loss, &[sampled([0.0, 1.0, 0.0, 0.0])]).remove(0);
    let rows: Vec<_> = example.targets.iter().map(|target| (target.row, target.slot)).collect();
    assert_eq!(rows, [(0, None), (1, Some(1)), (2, None), (3, None)]);
    assert_eq!(example.active, 1);
}

#[test]
fn a_pair_counts_once_if_anything_of_it_is_active() {
    let of = |weight: f32| datum([("ref_logprobs", vec![-1.0; 4]), ("weights", vec![weight; 4])]);
    let examples = examples(&LossSpec::new(Dpo), &[of(1.0), of(1.0), of(0.0), of(1.0), of(0.0), of(0.0)]);
    let counts: Vec<_> = examples.iter().map(|example| (example.continues, example.active)).collect();
    assert_eq!(counts, [(false, 1), (true, 0), (false, 1), (true, 0), (false, 0), (true, 0)]);
}

#[test]
fn refuses_a_sequence_past_the_models_context() {
    let long = Datum { model_input: ModelInput::from_ints(vec![1; 65]), ..datum([]) };
    let error = prepare(&tiny_model(), 1000, &LossSpec::new(CrossEntropy), &[long]).unwrap_err();
    assert_eq!(error.to_string(), "`data[0].model_input`: must have at most 64 tokens, got 65");
}

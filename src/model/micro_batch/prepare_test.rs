//! One named test per refusal, and what stays allowed beside it.

use std::collections::BTreeMap;

use super::*;
use crate::{
    model::lora::layout::tests::tiny_model,
    types::{Dtype, EncodedTextChunk, ImageChunk, ImageFormat, ModelInput},
};

/// A text of 4 tokens with these inputs.
fn datum<const M: usize>(inputs: [(&str, TensorData); M]) -> Datum {
    let chunk = ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![1, 2, 3, 4] });
    Datum {
        model_input: ModelInput { chunks: vec![chunk] },
        loss_fn_inputs: inputs.map(|(name, tensor)| (name.to_owned(), tensor)).into(),
    }
}

fn floats(values: &[f32]) -> TensorData {
    TensorData::from_f32(values.to_vec())
}

fn integers(values: &[i64]) -> TensorData {
    TensorData::from_i64(values.to_vec())
}

fn shaped(values: Vec<i64>, shape: &[usize]) -> TensorData {
    TensorData::new(TensorValues::I64(values), Dtype::Int64, shape.to_vec()).unwrap()
}

/// Valid inputs of importance sampling, all positions active.
fn sampled() -> Datum {
    datum([
        ("target_tokens", integers(&[2, 3, 4, 5])),
        ("logprobs", floats(&[-1.0; 4])),
        ("advantages", floats(&[1.0; 4])),
    ])
}

fn with(mut datum: Datum, name: &str, tensor: TensorData) -> Datum {
    datum.loss_fn_inputs.insert(name.to_owned(), tensor);
    datum
}

fn prepared(loss_fn: LossFn, data: &[Datum]) -> Result<Vec<Example>, InvalidInput> {
    prepare(&tiny_model(), 16, &LossSpec::new(loss_fn), data)
}

fn example(loss_fn: LossFn, datum: Datum) -> Example {
    prepared(loss_fn, &[datum]).unwrap().remove(0)
}

/// The message for a call whose second datum is at fault.
fn refusal(loss_fn: LossFn, bad: Datum) -> String {
    let good = match loss_fn {
        LossFn::CrossEntropy => datum([]),
        LossFn::ImportanceSampling => sampled(),
    };
    prepared(loss_fn, &[good, bad]).unwrap_err().to_string()
}

use LossFn::{CrossEntropy, ImportanceSampling};

#[test]
fn missing_targets_are_the_next_tokens_and_the_last_position_has_none() {
    let example = example(CrossEntropy, datum([]));
    let targets: Vec<_> = example.targets.iter().map(|target| (target.row, target.token)).collect();
    assert_eq!(targets, [(0, 2), (1, 3), (2, 4)]);
    assert_eq!(example.active, 3);
    assert_eq!(example.logprobs, [0.0; 4]);
}

#[test]
fn minus_one_hundred_is_no_target() {
    let example = example(CrossEntropy, datum([("target_tokens", integers(&[2, -100, 4, 5]))]));
    assert_eq!(example.active, 3);
    let is_nan: Vec<bool> = example.logprobs.iter().map(|value| value.is_nan()).collect();
    assert_eq!(is_nan, [false, true, false, false]);
    assert!(example.targets.iter().all(|target| target.row != 1));
}

#[test]
fn missing_weights_are_one() {
    let example = example(CrossEntropy, datum([]));
    assert!(example.targets.iter().all(|target| target.loss.unwrap().weight == 1.0));
}

#[test]
fn cross_entropy_scores_positions_of_weight_zero_without_counting_them() {
    let inputs = [("target_tokens", integers(&[2, 3, 4, 5])), ("weights", floats(&[0.0, -0.5, 0.25, 0.0]))];
    let example = example(CrossEntropy, datum(inputs));
    assert_eq!(example.targets.len(), 4);
    assert_eq!(example.active, 2);
    let weights: Vec<_> = example.targets.iter().map(|target| target.loss.map(|l| l.weight)).collect();
    assert_eq!(weights, [None, Some(-0.5), Some(0.25), None]);
}

#[test]
fn several_targets_a_position_count_once() {
    let targets = shaped(vec![2, 3, 3, -100, 4, 5, -100, -100], &[4, 2]);
    let weights = TensorData::new(
        TensorValues::F32(vec![1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
        Dtype::Float32,
        vec![4, 2],
    );
    let example = example(CrossEntropy, datum([("target_tokens", targets), ("weights", weights.unwrap())]));
    assert_eq!(example.active, 2);
    assert_eq!(example.logprobs_shape, [4, 2]);
    let slots: Vec<_> = example.targets.iter().map(|target| target.slot.unwrap()).collect();
    assert_eq!(slots, [0, 1, 2, 4, 5]);
}

#[test]
fn importance_sampling_scores_active_positions_alone() {
    let datum = with(sampled(), "advantages", floats(&[1.0, 0.0, -1.0, 2.0]));
    let example = example(ImportanceSampling, with(datum, "mask", floats(&[1.0, 1.0, 0.0, 1.0])));
    let rows: Vec<_> = example.targets.iter().map(|target| target.row).collect();
    assert_eq!(rows, [0, 3]);
    assert_eq!(example.active, 2);
    assert_eq!(example.logprobs, [0.0; 4]);
}

#[test]
fn an_advantage_of_one_element_applies_to_the_whole_sequence() {
    for tensor in
        [floats(&[2.0]), TensorData::new(TensorValues::F32(vec![2.0]), Dtype::Float32, vec![]).unwrap()]
    {
        let example = example(ImportanceSampling, with(sampled(), "advantages", tensor));
        let advantages: Vec<_> = example.targets.iter().map(|t| t.loss.unwrap().advantage).collect();
        assert_eq!(advantages, [2.0; 4]);
    }
}

#[test]
fn weights_of_a_sampled_loss_are_a_further_mask_and_factor() {
    let weights = floats(&[0.0, 1.0, 0.5, 1.0]);
    let example = example(ImportanceSampling, with(sampled(), "weights", weights));
    let weights: Vec<_> = example.targets.iter().map(|target| target.loss.unwrap().weight).collect();
    assert_eq!(weights, [1.0, 0.5, 1.0]);
}

#[test]
fn inactive_positions_are_not_read() {
    let nan = f32::NAN;
    let datum = datum([
        ("target_tokens", integers(&[2, -100, 4, 5])),
        ("logprobs", floats(&[-1.0, nan, nan, nan])),
        ("advantages", floats(&[1.0, nan, 0.0, nan])),
        ("mask", floats(&[1.0, nan, nan, 0.0])),
    ]);
    let example = example(ImportanceSampling, datum);
    assert_eq!(example.active, 1);
    assert_eq!(example.targets.len(), 1);
}

#[test]
fn nothing_active_leaves_nothing_to_compute() {
    let example = example(ImportanceSampling, with(sampled(), "advantages", floats(&[0.0])));
    assert_eq!((example.active, example.targets.len(), example.tokens()), (0, 0, 1));
}

#[test]
fn alternatives_are_wanted_at_every_position() {
    let mut loss = LossSpec::new(ImportanceSampling);
    loss.top_k_logprobs = 3;
    let datum = with(sampled(), "advantages", floats(&[0.0, 1.0, 0.0, 0.0]));
    let example = prepare(&tiny_model(), 16, &loss, &[datum]).unwrap().remove(0);
    let rows: Vec<_> = example.targets.iter().map(|target| (target.row, target.slot)).collect();
    assert_eq!(rows, [(0, None), (1, Some(1)), (2, None), (3, None)]);
    assert_eq!(example.active, 1);
}

#[test]
fn tokens_written_as_whole_floats_are_tokens() {
    let example = example(CrossEntropy, datum([("target_tokens", floats(&[2.0, 3.0, -100.0, 5.0]))]));
    assert_eq!(example.targets.iter().map(|target| target.token).collect::<Vec<_>>(), [2, 3, 5]);
}

#[test]
fn refuses_empty_data() {
    let error = prepared(CrossEntropy, &[]).unwrap_err();
    assert_eq!(error.to_string(), "`data`: must hold at least one datum, got none");
}

#[test]
fn refuses_an_empty_sequence() {
    let mut bad = datum([]);
    bad.model_input.chunks.clear();
    assert_eq!(refusal(CrossEntropy, bad), "`data[1].model_input`: must hold at least one token, got none");
}

#[test]
fn refuses_a_token_outside_the_vocabulary() {
    let mut bad = datum([]);
    bad.model_input.chunks.push(ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![32] }));
    assert_eq!(
        refusal(CrossEntropy, bad),
        "`data[1].model_input`: token ids must be below 32, the size of the vocabulary, got 32 at position 4"
    );
}

#[test]
fn refuses_a_target_outside_the_vocabulary() {
    for (token, shown) in [(32, "32"), (-1, "-1"), (1 << 40, "1099511627776")] {
        let bad = datum([("target_tokens", integers(&[2, 3, 4, token]))]);
        assert_eq!(
            refusal(CrossEntropy, bad),
            format!(
                "`data[1].loss_fn_inputs.target_tokens`: must be whole token ids below 32, the size of the \
                 vocabulary, or -100 for no target, got {shown} at position 3"
            )
        );
    }
}

#[test]
fn refuses_fractional_and_missing_token_ids() {
    for value in [2.5, f32::NAN, f32::INFINITY] {
        let bad = datum([("target_tokens", floats(&[value, 3.0, 4.0, 5.0]))]);
        assert!(refusal(CrossEntropy, bad).contains(&format!("got {value} at position 0")), "{value}");
    }
}

#[test]
fn refuses_a_sequence_that_is_too_long() {
    let mut bad = datum([]);
    bad.model_input.chunks.push(ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![1; 13] }));
    assert_eq!(refusal(CrossEntropy, bad), "`data[1].model_input`: must have at most 16 tokens, got 17");
}

#[test]
fn refuses_a_sequence_past_the_models_context() {
    let mut bad = datum([]);
    bad.model_input.chunks.push(ModelInputChunk::EncodedText(EncodedTextChunk { tokens: vec![1; 61] }));
    let error = prepare(&tiny_model(), 1000, &LossSpec::new(CrossEntropy), &[bad]).unwrap_err();
    assert_eq!(error.to_string(), "`data[0].model_input`: must have at most 64 tokens, got 65");
}

#[test]
fn refuses_an_image() {
    let image = ImageChunk { data: vec![], format: ImageFormat::Png, expected_tokens: 2 };
    let mut bad = datum([]);
    bad.model_input.chunks.push(ModelInputChunk::Image(image));
    assert_eq!(
        refusal(CrossEntropy, bad),
        "`data[1].model_input.chunks[1]`: is an image, and this model has no vision"
    );
}

#[test]
fn refuses_a_missing_input() {
    for name in ["logprobs", "advantages"] {
        let mut bad = sampled();
        bad.loss_fn_inputs.remove(name);
        assert_eq!(
            refusal(ImportanceSampling, bad),
            format!("`data[1].loss_fn_inputs.{name}`: is missing, and `importance_sampling` needs it")
        );
    }
}

#[test]
fn refuses_an_unknown_input() {
    let bad = datum([("weight", floats(&[1.0; 4]))]);
    assert_eq!(
        refusal(CrossEntropy, bad),
        "`data[1].loss_fn_inputs.weight`: is no input of `cross_entropy`; it knows target_tokens, weights"
    );
}

#[test]
fn refuses_inputs_of_another_length() {
    for name in ["logprobs", "mask", "weights"] {
        let bad = with(sampled(), name, floats(&[-1.0; 3]));
        assert_eq!(
            refusal(ImportanceSampling, bad),
            format!("`data[1].loss_fn_inputs.{name}`: must have shape [4], got [3]")
        );
    }
    let bad = with(sampled(), "advantages", floats(&[1.0; 3]));
    assert_eq!(
        refusal(ImportanceSampling, bad),
        "`data[1].loss_fn_inputs.advantages`: must have shape [4] or hold one value, got [3]"
    );
}

#[test]
fn refuses_weights_that_do_not_match_several_targets() {
    let targets = shaped(vec![1; 8], &[4, 2]);
    let bad = datum([("target_tokens", targets), ("weights", floats(&[1.0; 4]))]);
    let error = prepared(CrossEntropy, &[bad]).unwrap_err();
    assert_eq!(error.to_string(), "`data[0].loss_fn_inputs.weights`: must have shape [4, 2], got [4]");
}

#[test]
fn refuses_targets_of_another_length() {
    let bad = datum([("target_tokens", integers(&[1, 2, 3]))]);
    assert_eq!(
        refusal(CrossEntropy, bad),
        "`data[1].loss_fn_inputs.target_tokens`: must have shape [4] or [4, K], got [3]"
    );
}

#[test]
fn refuses_several_targets_for_sampled_data() {
    let bad = with(sampled(), "target_tokens", shaped(vec![1; 8], &[4, 2]));
    assert_eq!(
        refusal(ImportanceSampling, bad),
        "`data[1].loss_fn_inputs.target_tokens`: must have shape [4], got [4, 2]"
    );
}

#[test]
fn refuses_datums_that_differ_in_targets_a_position() {
    let bad = datum([("target_tokens", shaped(vec![1; 8], &[4, 2]))]);
    assert_eq!(
        refusal(CrossEntropy, bad),
        "`data[1].loss_fn_inputs.target_tokens`: must have as many targets a position as `data[0]`, which \
         has one target, got a row of 2 targets"
    );
}

#[test]
fn refuses_nan_at_active_positions() {
    for name in ["logprobs", "advantages", "mask", "weights"] {
        for value in [f32::NAN, f32::INFINITY] {
            let bad = with(sampled(), name, floats(&[0.5, 0.5, value, 0.5]));
            assert_eq!(
                refusal(ImportanceSampling, bad),
                format!(
                    "`data[1].loss_fn_inputs.{name}`: must be finite where the position is active, got \
                     {value} at position 2"
                )
            );
        }
    }
}

#[test]
fn refuses_an_unknown_setting() {
    let config = BTreeMap::from([("beta".to_owned(), 1.0)]);
    let loss = LossSpec { config, ..LossSpec::new(CrossEntropy) };
    assert_eq!(prepare(&tiny_model(), 16, &loss, &[datum([])]).unwrap_err().field, "loss_fn_config.beta");
}

#[test]
fn refuses_more_alternatives_than_twenty_or_than_the_vocabulary_has() {
    let mut loss = LossSpec::new(CrossEntropy);
    loss.top_k_logprobs = 21;
    let error = prepare(&tiny_model(), 16, &loss, &[datum([])]).unwrap_err();
    assert_eq!(error.to_string(), "`top_k_logprobs`: must be at most 20, got 21");
    loss.top_k_logprobs = 6;
    let small = ModelConfig { vocab_size: 5, ..tiny_model() };
    let error = prepare(&small, 16, &loss, &[datum([])]).unwrap_err();
    assert_eq!(error.to_string(), "`top_k_logprobs`: must be at most 5, the size of the vocabulary, got 6");
}

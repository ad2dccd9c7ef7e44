//! One named test per refusal, and what stays allowed beside it.

use std::collections::BTreeMap;

use super::*;
use crate::types::{Dtype, EncodedTextChunk, ImageChunk, ImageFormat, ModelInput, TensorData, TensorValues};

use LossFn::{CrossEntropy, Dpo, Gspo, ImportanceSampling, Ppo};

const LIMITS: DataLimits = DataLimits { vocab_size: 32, max_seq_len: 16 };

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

/// A valid datum of `dpo`.
fn preference() -> Datum {
    datum([("target_tokens", integers(&[2, 3, 4, 5])), ("ref_logprobs", floats(&[-1.0; 4]))])
}

fn checked(loss_fn: LossFn, data: &[Datum]) -> Result<Vec<CheckedDatum>, InvalidInput> {
    let mut checked = Vec::new();
    LossSpec::new(loss_fn).visit_data(LIMITS, data, |datum| checked.push(datum))?;
    Ok(checked)
}

fn one(loss_fn: LossFn, datum: Datum) -> CheckedDatum {
    checked(loss_fn, &[datum]).unwrap().remove(0)
}

/// The message for a call whose second datum is at fault.
fn refusal(loss_fn: LossFn, bad: Datum) -> String {
    let good = match loss_fn {
        CrossEntropy => datum([]),
        Dpo => preference(),
        _ => sampled(),
    };
    checked(loss_fn, &[good, bad]).unwrap_err().to_string()
}

/// What the active targets bring, by their place.
fn active(datum: &CheckedDatum) -> BTreeMap<usize, LossInputs> {
    let loss = |target: &CheckedTarget| match target {
        CheckedTarget::Token { loss, .. } => *loss,
        _ => None,
    };
    datum.targets.iter().enumerate().filter_map(|(i, target)| Some((i, loss(target)?))).collect()
}

fn tokens(datum: &CheckedDatum) -> Vec<Option<u32>> {
    let token = |target: &CheckedTarget| match target {
        CheckedTarget::Token { token, .. } => Some(*token),
        _ => None,
    };
    datum.targets.iter().map(token).collect()
}

#[test]
fn missing_targets_are_the_next_tokens_and_the_last_position_has_none() {
    let datum = one(CrossEntropy, datum([]));
    assert_eq!(tokens(&datum), [Some(2), Some(3), Some(4), None]);
    assert_eq!(datum.targets[3], CheckedTarget::End);
    assert_eq!(active(&datum).len(), 3);
}

#[test]
fn minus_one_hundred_is_no_target() {
    let datum = one(CrossEntropy, datum([("target_tokens", integers(&[2, -100, 4, 5]))]));
    assert_eq!(tokens(&datum), [Some(2), None, Some(4), Some(5)]);
    assert_eq!(datum.targets[1], CheckedTarget::Ignored);
}

#[test]
fn missing_weights_are_one() {
    assert!(active(&one(CrossEntropy, datum([]))).values().all(|inputs| inputs.weight == 1.0));
}

#[test]
fn weights_of_zero_are_inactive_and_negative_ones_are_not() {
    let inputs = [("target_tokens", integers(&[2, 3, 4, 5])), ("weights", floats(&[0.0, -0.5, 0.25, 0.0]))];
    let datum = one(CrossEntropy, datum(inputs));
    assert_eq!(tokens(&datum).len(), 4);
    let weights: Vec<_> = active(&datum).into_iter().map(|(i, inputs)| (i, inputs.weight)).collect();
    assert_eq!(weights, [(1, -0.5), (2, 0.25)]);
}

#[test]
fn several_targets_a_position_have_weights_of_their_own() {
    let targets = shaped(vec![2, 3, 3, -100, 4, 5, -100, -100], &[4, 2]);
    let weights = TensorValues::F32(vec![1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]);
    let weights = TensorData::new(weights, Dtype::Float32, vec![4, 2]).unwrap();
    let datum = one(CrossEntropy, datum([("target_tokens", targets), ("weights", weights)]));
    assert_eq!(datum.shape, [4, 2]);
    assert_eq!(active(&datum).into_keys().collect::<Vec<_>>(), [0, 1, 5]);
}

#[test]
fn sampled_data_is_active_by_advantage_and_mask() {
    let datum = with(sampled(), "advantages", floats(&[1.0, 0.0, -1.0, 2.0]));
    let datum = one(ImportanceSampling, with(datum, "mask", floats(&[1.0, 1.0, 0.0, 1.0])));
    assert_eq!(active(&datum).into_keys().collect::<Vec<_>>(), [0, 3]);
}

#[test]
fn an_advantage_of_one_element_applies_to_the_whole_sequence() {
    for shape in [vec![1], vec![]] {
        let tensor = TensorData::new(TensorValues::F32(vec![2.0]), Dtype::Float32, shape).unwrap();
        let datum = one(ImportanceSampling, with(sampled(), "advantages", tensor));
        let advantages: Vec<_> = active(&datum).values().map(|inputs| inputs.advantage).collect();
        assert_eq!(advantages, [2.0; 4]);
    }
}

#[test]
fn weights_of_a_sampled_loss_are_a_further_mask_and_factor() {
    let datum = one(ImportanceSampling, with(sampled(), "weights", floats(&[0.0, 1.0, 0.5, 1.0])));
    let weights: Vec<_> = active(&datum).values().map(|inputs| inputs.weight).collect();
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
    assert_eq!(active(&one(ImportanceSampling, datum)).into_keys().collect::<Vec<_>>(), [0]);
}

#[test]
fn thresholds_of_a_position_replace_the_settings() {
    let datum = with(sampled(), "clip_low_threshold", floats(&[0.5, 0.6, 0.7, 0.8]));
    let datum = one(Ppo, with(datum, "clip_high_threshold", floats(&[1.5; 4])));
    assert_eq!(active(&datum)[&1].clip, Some([0.6, 1.5]));
    assert_eq!(active(&one(Ppo, sampled()))[&1].clip, None);
}

#[test]
fn a_sequence_ratio_counts_masked_positions_or_active_ones() {
    let counted = |datum| -> Vec<bool> {
        let datum = one(Gspo, datum);
        let counts =
            |target: &CheckedTarget| matches!(target, CheckedTarget::Token { ratio_logprob: Some(_), .. });
        datum.targets.iter().map(counts).collect()
    };
    let some = with(sampled(), "advantages", floats(&[1.0, 0.0, 1.0, 0.0]));
    assert_eq!(counted(some.clone()), [true, false, true, false]);
    let masked = with(some, "sequence_ratio_mask", floats(&[0.0, 1.0, 1.0, 0.0]));
    assert_eq!(counted(masked), [false, true, true, false]);
}

#[test]
fn preferences_read_the_references_log_probabilities() {
    let data = [preference(), with(preference(), "weights", floats(&[0.0, 1.0, 1.0, 0.0]))];
    let checked = checked(Dpo, &data).unwrap();
    assert_eq!(active(&checked[0])[&3].logprob, -1.0);
    assert_eq!(active(&checked[1]).into_keys().collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn refuses_an_odd_number_of_preferences() {
    let error = checked(Dpo, &[preference(), preference(), preference()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`data`: must alternate chosen and rejected datums for `dpo`, an even number of them, got 3"
    );
}

#[test]
fn refuses_a_threshold_without_its_other() {
    assert_eq!(
        refusal(Ppo, with(sampled(), "clip_low_threshold", floats(&[0.5; 4]))),
        "`data[1].loss_fn_inputs.clip_high_threshold`: is missing; `clip_low_threshold` and \
         `clip_high_threshold` go together"
    );
}

#[test]
fn refuses_thresholds_in_the_wrong_order() {
    let bad = with(sampled(), "clip_low_threshold", floats(&[0.5, 0.5, 2.0, 0.5]));
    assert_eq!(
        refusal(Ppo, with(bad, "clip_high_threshold", floats(&[1.5; 4]))),
        "`data[1].loss_fn_inputs.clip_low_threshold`: must lie between 0 and `clip_high_threshold`, which is \
         1.5, got 2 at position 2"
    );
}

#[test]
fn refuses_nan_in_a_sequences_ratio() {
    let bad = with(sampled(), "logprobs", floats(&[-1.0, -1.0, f32::NAN, -1.0]));
    let bad = with(bad, "advantages", floats(&[1.0, 1.0, 0.0, 1.0]));
    one(Gspo, bad.clone());
    assert_eq!(
        refusal(Gspo, with(bad, "sequence_ratio_mask", floats(&[1.0; 4]))),
        "`data[1].loss_fn_inputs.logprobs`: must be finite where the position is active, got NaN at position 2"
    );
}

#[test]
fn tokens_written_as_whole_floats_are_tokens() {
    let datum = one(CrossEntropy, datum([("target_tokens", floats(&[2.0, 3.0, -100.0, 5.0]))]));
    assert_eq!(tokens(&datum), [Some(2), Some(3), None, Some(5)]);
}

#[test]
fn refuses_empty_data() {
    let error = checked(CrossEntropy, &[]).unwrap_err();
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
    let error = checked(CrossEntropy, &[bad]).unwrap_err();
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
    assert_eq!(loss.check_data(LIMITS, &[datum([])]).unwrap_err().field, "loss_fn_config.beta");
}

#[test]
fn refuses_more_alternatives_than_twenty_or_than_the_vocabulary_has() {
    let mut loss = LossSpec::new(CrossEntropy);
    loss.top_k_logprobs = 21;
    let error = loss.check_data(LIMITS, &[datum([])]).unwrap_err();
    assert_eq!(error.to_string(), "`top_k_logprobs`: must be at most 20, got 21");
    loss.top_k_logprobs = 6;
    let error = loss.check_data(DataLimits { vocab_size: 5, ..LIMITS }, &[datum([])]).unwrap_err();
    assert_eq!(error.to_string(), "`top_k_logprobs`: must be at most 5, the size of the vocabulary, got 6");
}

//! Every public type through its JSON.

use std::fmt::Debug;

use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use super::{arbitrary::*, *};

/// Writes, reads and writes again. Compares what was written: a NaN, which is not equal to itself,
/// and an infinity are both `null` there.
fn kept<T: Serialize + DeserializeOwned + Debug>(value: &T) -> Result<(), TestCaseError> {
    let text = serde_json::to_string(value).unwrap();
    let back: T = serde_json::from_str(&text).map_err(|e| TestCaseError::fail(format!("{text}: {e}")))?;
    prop_assert_eq!(serde_json::to_string(&back).unwrap(), text);
    Ok(())
}

/// The same for types that are equal to themselves.
fn equal<T: Serialize + DeserializeOwned + Debug + PartialEq>(value: &T) -> Result<(), TestCaseError> {
    let back: T = serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap();
    prop_assert_eq!(&back, value);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn json_keeps_identities(n in any::<u64>(), policy in any_policy()) {
        equal(&SessionId(n))?;
        equal(&RunId(n))?;
        equal(&CheckpointId(n))?;
        equal(&policy.digest)?;
        equal(&policy)?;
    }

    #[test]
    fn json_keeps_errors(error in any_error(), field in ".*") {
        equal(&InvalidInput::new(field, error.message.clone()))?;
        equal(&error)?;
    }

    #[test]
    fn json_keeps_inputs(input in any_model_input(), datum in any_datum()) {
        equal(&input)?;
        kept(&datum)?;
    }

    #[test]
    fn json_keeps_configurations(
        (adam, lora, loss) in (any_adam(), any_lora(), any_loss()),
        (sampling, flags) in (any_sampling(), any_flags()),
        (project, name) in (".*", prop::option::of(".*")),
    ) {
        equal(&adam)?;
        equal(&lora)?;
        equal(&loss)?;
        equal(&sampling)?;
        equal(&flags)?;
        equal(&WandbConfig { entity: name.clone(), project, name })?;
    }

    #[test]
    fn json_keeps_results(
        (output, step, sample) in (any_output(), any_optim_step(), any_sample()),
        (path, version, lora_rank) in (".*", any::<u64>(), any::<u32>()),
    ) {
        if output.loss_fn_outputs.iter().flat_map(|o| o.values()).all(|t| t.dtype() != Dtype::Float64) {
            kept(&output)?;
        }
        equal(&step)?;
        equal(&sample)?;
        equal(&SaveWeightsResponse { path: path.clone() })?;
        equal(&SaveWeightsForSamplerResponse { path, version })?;
        equal(&LoadWeightsResponse { step: version })?;
        equal(&InitTrainerServerResponse { step: version, lora_rank })?;
    }

    #[test]
    fn json_keeps_what_a_service_says(
        (checkpoint, files, capabilities) in (any_checkpoint(), any_checkpoint_files(), any_capabilities()),
    ) {
        equal(&checkpoint)?;
        equal(&files)?;
        equal(&capabilities)?;
    }
}

#[test]
fn identities_have_one_spelling() {
    assert_eq!("run-7".parse::<RunId>().unwrap(), RunId(7));
    for text in [
        "run-",
        "run-+7",
        "run-07",
        "run-7 ",
        "RUN-7",
        "session-7",
        "7",
        "run--7",
        "run-18446744073709551616",
    ] {
        let error = text.parse::<RunId>().unwrap_err();
        assert!(error.field == "run_id" && error.problem.contains(text), "{error}");
    }
}

#[test]
fn a_digest_is_64_lower_case_digits() {
    let digest = Digest::of(b"");
    assert_eq!(digest.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
    let upper = digest.to_string().to_uppercase();
    for text in ["", "e3b0", &digest.to_string()[1..], &upper, &format!("{digest}00"), &"g".repeat(64)] {
        text.parse::<Digest>().unwrap_err();
    }
}

#[test]
fn a_digest_of_pieces_is_that_of_the_whole() {
    let mut hasher = Hasher::default();
    hasher.update(b"ab");
    hasher.update(b"c");
    assert_eq!(hasher.finish(), Digest::of(b"abc"));
}

#[test]
fn an_unknown_error_kind_or_target_is_refused_by_name() {
    let error =
        serde_json::from_value::<OperationError>(json!({"kind": "Bored", "message": ""})).unwrap_err();
    assert!(error.to_string().contains("Bored"), "{error}");
    let error = serde_json::from_value::<CheckpointTarget>(json!("tester")).unwrap_err();
    assert!(error.to_string().contains("tester"), "{error}");
}

#[test]
fn a_fault_is_named_from_the_root_of_the_request() {
    let fault = InvalidInput::new("[3]", "too large").within("tokens").within("data[0]");
    assert_eq!(fault.to_string(), "`data[0].tokens[3]`: too large");
}

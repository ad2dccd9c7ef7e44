//! Any value of each public type, and bytes that are no message.

use proptest::prelude::*;

use crate::types::arbitrary::*;

use super::*;

/// Compares bytes: a NaN, which is not equal to itself, must come back bit by bit as well.
fn kept<T: Encode + Decode<()>>(value: &T) -> Result<(), TestCaseError> {
    let bytes = encode(value);
    let back: T = decode("value", &bytes, bytes.len()).map_err(|e| TestCaseError::fail(e.to_string()))?;
    prop_assert_eq!(&encode(&back), &bytes);
    let compressed = encode_compressed(value);
    let back: T = decode_compressed("value", &compressed).map_err(|e| TestCaseError::fail(e.to_string()))?;
    prop_assert_eq!(&encode(&back), &bytes);
    Ok(())
}

/// Reads hostile bytes: an answer, whichever, and no panic.
fn survives<T: Decode<()>>(bytes: &[u8]) {
    let _ = decode::<T>("message", bytes, MAX_MESSAGE);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_wire_keeps_inputs(input in any_model_input(), datum in any_datum(), tensor in any_tensor()) {
        kept(&input)?;
        kept(&datum)?;
        kept(&tensor)?;
        kept(&vec![datum.clone(), datum])?;
    }

    #[test]
    fn the_wire_keeps_configurations(
        (adam, lora, loss) in (any_adam(), any_lora(), any_loss()),
        (sampling, flags, policy) in (any_sampling(), any_flags(), any_policy()),
    ) {
        kept(&adam)?;
        kept(&lora)?;
        kept(&loss)?;
        kept(&sampling)?;
        kept(&flags)?;
        kept(&policy)?;
    }

    #[test]
    fn the_wire_keeps_results(
        (output, step, sample, error) in (any_output(), any_optim_step(), any_sample(), any_error()),
        (path, version, lora_rank) in (".*", any::<u64>(), any::<u32>()),
    ) {
        kept(&output)?;
        kept(&step)?;
        kept(&sample)?;
        kept(&error)?;
        kept(&SaveWeightsResponse { path: path.clone() })?;
        kept(&SaveWeightsForSamplerResponse { path, version })?;
        kept(&LoadWeightsResponse { step: version })?;
        kept(&InitTrainerServerResponse { step: version, lora_rank })?;
    }

    #[test]
    fn the_wire_keeps_what_a_service_says(
        (checkpoint, files, capabilities) in (any_checkpoint(), any_checkpoint_files(), any_capabilities()),
    ) {
        kept(&checkpoint)?;
        kept(&files)?;
        kept(&capabilities)?;
    }

    #[test]
    fn random_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        survives::<StreamOpen>(&bytes);
        survives::<ClientResponse>(&bytes);
        survives::<CoordinatorMessage>(&bytes);
        survives::<NodeMessage>(&bytes);
        survives::<RankPart>(&bytes);
        survives::<Vec<Datum>>(&bytes);
        let _ = decode_compressed::<Vec<Datum>>("data", &bytes);
    }

    #[test]
    fn a_flipped_byte_does_no_harm(which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), to: u8) {
        let mut messages: Vec<Vec<u8>> = node_messages().iter().map(encode).collect();
        messages.extend(coordinator_messages().iter().map(encode));
        messages.extend(client_responses().iter().map(encode));
        let mut bytes = which.get(&messages).clone();
        let at = at.index(bytes.len());
        bytes[at] = to;
        survives::<NodeMessage>(&bytes);
        survives::<CoordinatorMessage>(&bytes);
        survives::<ClientResponse>(&bytes);
    }
}

//! `lockstep up --device`: ranks and replicas on the engine of a GPU, here the emulated one.

use lockstep::types::{
    Datum, LossFn, LossSpec, ModelInput, SampleFlags, SampleResult, SamplingParams, TensorValues,
};

use crate::up::*;

/// What a replica says of the tokens that it drew is what the trainer finds for them; both are on the
/// emulated GPU, under an adapter that has been trained and published there.
#[test]
fn trainer_and_sampler_agree_on_a_gpu() {
    let directory = tempfile::tempdir().expect("a directory");
    let arguments = ["--device", "emulated", "--nodes", "2", "--trainers", "2", "--samplers", "1"];
    // An emulation has no NCCL: its nodes take the word and add up in the tree all the same.
    let up = Up::start(directory.path(), &[&arguments[..], &["--reduce", "fast"]].concat());
    let service = connect(directory.path());
    let training = train(&service);
    step(&training);
    step(&training);

    let sampling = training.save_weights_and_get_sampling_client("gpu").result().expect("published");
    let prompt = vec![1, 40, 41, 42];
    let params = SamplingParams { seed: Some(5), max_tokens: Some(12), ..SamplingParams::default() };
    let flags = SampleFlags { prompt_logprobs: true, ..SampleFlags::default() };
    let answer = sampling.sample(ModelInput::from_ints(prompt.clone()), 2, params, flags);
    let SampleResult { sequences, policy_version, prompt_logprobs, .. } = answer.result().expect("a sample");
    assert_eq!((policy_version, sequences.len()), (2, 2));
    let prompt_logprobs: Vec<f32> = prompt_logprobs.expect("asked for").into_iter().flatten().collect();
    for sequence in sequences {
        let tokens = [&prompt[..], &sequence.tokens].concat();
        let datum = Datum { model_input: ModelInput::from_ints(tokens), loss_fn_inputs: Default::default() };
        let pass = training.forward(vec![datum], LossSpec::new(LossFn::CrossEntropy));
        let output = pass.result().expect("a pass");
        let TensorValues::F32(logprobs) = output.loss_fn_outputs[0]["logprobs"].values() else {
            panic!("log-probabilities are f32");
        };
        let sampled = sequence.logprobs.expect("a sample has them");
        let said = prompt_logprobs.iter().chain(&sampled);
        for (position, (said, found)) in said.zip(logprobs).enumerate() {
            // Both in f32; the replica computed the same sums row by row.
            assert!((said - found).abs() < 1e-5, "position {position}: {said} and {found}");
        }
    }
    up.signal("-TERM");
    assert!(up.ended_well());
}

/// A build without CUDA says so, at once, and goes on with the CPU only where that was left to it.
#[cfg(not(feature = "cuda"))]
#[test]
fn a_gpu_that_cannot_be_had_is_refused_unless_auto() {
    let directory = tempfile::tempdir().expect("a directory");
    let refusal = refused(directory.path(), &["--device", "cuda:1"]);
    assert!(refusal.contains("this lockstep was built without CUDA"), "{refusal}");
    let refusal = refused(directory.path(), &["--device", "tpu"]);
    assert!(refusal.contains("a device is cpu, cuda, cuda:N, auto or emulated"), "{refusal}");
    let refusal = refused(directory.path(), &["--reduce", "slow"]);
    assert!(refusal.contains("gradients are added up deterministic or fast"), "{refusal}");
    let up = Up::start(directory.path(), &["--device", "auto"]);
    step(&train(&connect(directory.path())));
    drop(up);
}

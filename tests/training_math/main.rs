//! The training mathematics against PyTorch, transformers and PEFT, for every model family:
//! logits, greedy generation, losses, log-probabilities, gradients, and weights after several
//! optimiser steps.
//!
//! `tests/goldens/make_goldens.py` made the reference values (float32, one sequence at a time);
//! here the same sequences run packed. Where a family is computed as `--dtype bf16`, PyTorch rounds weights and what
//! they are multiplied with as Lockstep does. `LOCKSTEP_GOLDENS=DIR` compares with the families in DIR
//! too: a CI step makes them from a fresh seed, so that nobody can fit to the committed files.
//!
//! Where the tolerances come from: on these models PyTorch's own float32 is up to 2e-6 away
//! from its float64 in gradients (Frobenius-relative, per tensor), 5e-6 in weights after five
//! steps, and 1e-6 in losses. Another order of summation errs as much again, other seeds up to
//! ten times more. A wrong factor, sign or position errs by 1e-2 and more.

mod golden;

use std::path::{Path, PathBuf};

use lockstep::{
    archive,
    gpu::Gpu,
    kernels::{Team, WeightDtype},
    model::{
        Adapter, AdapterRows, BaseModel, Batch, BatchSequence, Decoding, DrawBuffers, DrawKey, DrawRow,
        GradientKind, HeadRequest, ModelConfig, RopeScaling, SequenceCache, SequenceRows, TrainState,
        Workspace, draw_rows, extend, forward, head_logits, head_logprobs, prepare, run_micro_batch,
    },
    types::{ErrorKind, TensorData, TensorValues},
};

use golden::*;

/// On losses, relative to the mean of `|ℓ|`: terms of both signs cancel in their sum.
const LOSS_TOLERANCE: f64 = 1e-5;
/// On logits and log-probabilities, in the Frobenius norm.
const LOGPROB_TOLERANCE: f64 = 1e-5;
/// On a tensor's gradient, in the Frobenius norm.
const GRADIENT_TOLERANCE: f64 = 1e-4;
/// On a tensor's weights, `‖a − b‖ / ‖b − b₀‖` over those elements that are [`settled`].
const WEIGHT_TOLERANCE: f64 = 1e-4;

/// Micro-batch budgets: everything in one, a few each, each sequence alone.
const BUDGETS: [usize; 3] = [1024, 24, 0];

#[test]
fn logits_agree() {
    for golden in goldens() {
        let state = golden.initial_state();
        let tokens: Vec<Vec<u32>> = golden.file.sequences.clone();
        let sequences = tokens.iter().map(|tokens| BatchSequence {
            tokens,
            kv_cache: None,
            adapter: Some(AdapterRows { layout: &state.layout, values: &state.weights }),
        });
        let mut batch = Batch { sequences: sequences.collect() };
        let (mut workspace, team) = (Workspace::default(), Team::solo());
        let hidden = forward(&golden.model, &mut batch, None, &mut workspace, &team);
        let mut logits = Vec::new();
        let adapter = AdapterRows { layout: &state.layout, values: &state.weights };
        let rows: usize = tokens.iter().map(Vec::len).sum();
        let rows: Vec<_> = (0..rows).map(|row| (row, Some(adapter))).collect();
        head_logits(&golden.model, &hidden, &rows, &mut logits, &mut workspace, &team);
        let mut rest = logits.as_slice();
        for (i, tokens) in tokens.iter().enumerate() {
            let (found, after) = rest.split_at(tokens.len() * golden.model.config.vocab_size);
            golden.assert_near(&format!("logits.{i}"), found, LOGPROB_TOLERANCE * golden.slack());
            rest = after;
        }
    }
}

/// Greedy generation through the cache, token by token. The script has made sure that no token
/// is near a tie: its smallest margin is a thousand times what two engines' logits differ by.
#[test]
fn generation_agrees() {
    goldens().for_each(|golden| assert_generation(&golden));
}

/// On the GPU's engine, too, as far as it covers the families.
#[test]
fn a_gpu_computes_the_same() {
    let gpu = Gpu::emulated().expect("g++ compiles the kernels");
    let mut families = 0;
    for golden in goldens().filter_map(|golden| golden.on_gpu(&gpu)) {
        assert_losses(&golden);
        assert_log_probabilities(&golden);
        assert_gradients(&golden);
        assert_generation(&golden);
        families += 1;
    }
    assert!(families >= 7, "only {families} families");
}

fn assert_generation(golden: &Golden) {
    let state = golden.initial_state();
    let Generation { prompt, tokens: expected, margin } = &golden.file.generation;
    assert!(*margin > 1e-3 && expected.len() == 30, "{}", golden.family);
    let adapter = AdapterRows { layout: &state.layout, values: &state.weights };
    let mut cache = SequenceCache::new(&golden.model);
    let (mut workspace, mut buffers, team) = (Workspace::default(), DrawBuffers::default(), Team::solo());
    let (mut rows, mut generated) = (prompt.clone(), Vec::new());
    while generated.len() < expected.len() {
        let sequence = SequenceRows { tokens: &rows, cache: &mut cache, adapter: Some(adapter) };
        let hidden = extend(&golden.model, vec![sequence], &mut workspace, &team).unwrap();
        let last = DrawRow {
            row: rows.len() - 1,
            adapter: Some(adapter),
            decoding: Decoding::Greedy,
            key: DrawKey { seed: 0, sequence: 0, position: 0 },
        };
        let drawn = draw_rows(&golden.model, &hidden, &[last], &mut buffers, &mut workspace, &team).unwrap();
        generated.push(drawn[0].expect("a row of numbers").token);
        rows = generated[generated.len() - 1..].to_vec();
    }
    assert_eq!(generated, *expected, "{}", golden.family);
}

/// The same model out of a GGUF file whose names and metadata are those of llama.cpp's own
/// Python package: the same configuration, and the same hidden states to the bit.
#[test]
fn a_gguf_is_the_same_model() {
    for golden in goldens() {
        let path = Path::new(&golden.family).join("model.gguf");
        if golden.model.config.experts.as_ref().is_some_and(|experts| !experts.normalises) {
            assert!(!path.exists(), "llama.cpp computes no such model");
            continue;
        }
        let model = BaseModel::load_as(golden.dtype, "golden", &path).unwrap_or_else(|e| panic!("{e}"));
        let [ours, theirs] = [&model.config, &golden.model.config].map(|config| ModelConfig {
            // Llama 3.1's scaling stands in a GGUF as its effect on each frequency.
            rope_scaling: RopeScaling::None,
            ..config.clone()
        });
        assert_eq!(ours, theirs, "{}", golden.family);
        let frequencies = [&model, &golden.model].map(|model| model.config.rope_frequencies());
        // The divisors were rounded to f32, and so was each result.
        assert_near(&golden.family, &frequencies[0], &frequencies[1], None, 2e-7);

        let hidden = [&model, &golden.model].map(|model| {
            let tokens = &golden.file.sequences[2];
            let mut batch =
                Batch { sequences: vec![BatchSequence { tokens, kv_cache: None, adapter: None }] };
            forward(model, &mut batch, None, &mut Workspace::default(), &Team::solo())
        });
        match golden.model.config.rope_scaling {
            RopeScaling::Llama3 { .. } => {
                assert_near(&golden.family, &hidden[0], &hidden[1], None, LOGPROB_TOLERANCE)
            }
            _ => assert_eq!(hidden[0], hidden[1], "{}", golden.family),
        }
    }
}

#[test]
fn losses_and_metrics_agree() {
    goldens().for_each(|golden| assert_losses(&golden));
}

fn assert_losses(golden: &Golden) {
    let state = golden.initial_state();
    for (name, call) in &golden.file.calls {
        for budget in BUDGETS {
            let what = format!("{} {name}, budget {budget}", golden.family);
            let (output, active, _) = golden.run(&state, call, budget, false);
            let Expected { loss, loss_size, active: expected_active, metrics } = &call.expected;
            assert_eq!(active, *expected_active, "{what}: active positions");
            let error = (output.loss - loss).abs();
            assert!(
                error <= LOSS_TOLERANCE * golden.slack() * loss_size,
                "{what}: loss {} and {loss}",
                output.loss
            );
            assert_eq!(output.metrics["loss"], output.loss);
            for (metric, value) in metrics {
                let found = output.metrics[metric];
                // The gap of two log-probabilities near −5 carries their rounding, 5e-7; a
                // reward is half the sum of up to 15 gaps, a margin has two of them.
                let least = if metric.starts_with("reward_") { 1.0 } else { 0.1 };
                let error = (found - value).abs();
                assert!(
                    error <= LOSS_TOLERANCE * golden.slack() * value.abs().max(least),
                    "{what}: {metric} {found} and {value}"
                );
            }
        }
    }
}

#[test]
fn log_probabilities_and_alternatives_agree() {
    goldens().for_each(|golden| assert_log_probabilities(&golden));
}

fn assert_log_probabilities(golden: &Golden) {
    let state = golden.initial_state();
    for (name, call) in &golden.file.calls {
        let (output, ..) = golden.run(&state, call, 1024, false);
        assert_eq!(output.loss_fn_outputs.len(), call.data.len());
        for (i, output) in output.loss_fn_outputs.iter().enumerate() {
            for (key, tensor) in output {
                let key = format!("{name}.{key}.{i}");
                match tensor.values() {
                    TensorValues::F32(values) => {
                        golden.assert_near(&key, values, LOGPROB_TOLERANCE * golden.slack())
                    }
                    // Which of two alternatives that are as near as roundings comes first, nobody can say.
                    _ if golden.is_unseen() => {}
                    _ => assert_eq!(tensor, &golden.tensors[&key], "{} {key}", golden.family),
                }
                assert_eq!(tensor.shape(), golden.tensors[&key].shape(), "{} {key}", golden.family);
            }
        }
    }
}

/// A row's bits depend on its own sequence: not on what is packed beside it.
#[test]
fn log_probabilities_do_not_depend_on_the_packing() {
    for golden in goldens() {
        let state = golden.initial_state();
        for (name, call) in &golden.file.calls {
            let bits = |budget| -> Vec<Vec<u32>> {
                let (output, ..) = golden.run(&state, call, budget, false);
                let values = output.loss_fn_outputs.iter().map(|output| floats(&output["logprobs"]));
                values.map(|values| values.iter().map(|value| value.to_bits()).collect()).collect()
            };
            assert_eq!(bits(1024), bits(0), "{} {name}", golden.family);
        }
    }
}

#[test]
fn gradients_agree() {
    goldens().for_each(|golden| assert_gradients(&golden));
}

fn assert_gradients(golden: &Golden) {
    let state = golden.initial_state();
    for (name, call) in &golden.file.calls {
        for budget in BUDGETS {
            let (_, _, gradient) = golden.run(&state, call, budget, true);
            golden.for_each_tensor(&state.layout, |tensor, range| {
                let key = format!("{name}.gradient.{tensor}");
                golden.assert_near(&key, &gradient[range], GRADIENT_TOLERANCE * golden.slack());
            });
        }
    }
}

#[test]
fn weights_after_optimiser_steps_agree() {
    for golden in goldens() {
        let mut state = golden.initial_state();
        let initial = state.weights.clone();
        for (number, step) in (1..).zip(&golden.file.steps) {
            for name in &step.calls {
                let call = &golden.file.calls[name];
                let (_, active, gradient) = golden.run(&state, call, 24, true);
                state = state.accumulate(&gradient, active, GradientKind::of(&call.loss)).unwrap();
            }
            let (next, response) = state.optim_step(&step.adam).unwrap();
            state = next;
            let (found, expected) = (response.metrics["grad_norm"], step.grad_norm);
            assert!(
                (found - expected).abs() <= GRADIENT_TOLERANCE * golden.slack() * expected,
                "{} step {number}: gradient norm {found} and {expected}",
                golden.family
            );
            golden.for_each_tensor(&state.layout, |tensor, range| {
                let key = format!("step.{number}.{tensor}");
                let what = format!("{} {key}", golden.family);
                let settled = settled(&golden, tensor);
                let of_settled = |values: &[f32]| -> Vec<f32> {
                    values
                        .iter()
                        .zip(&settled)
                        .filter_map(|(value, settled)| settled.then_some(*value))
                        .collect()
                };
                let (found, expected) = (&state.weights[range.clone()], floats(&golden.tensors[&key]));
                let [found, expected, origin] = [found, expected, &initial[range]].map(of_settled);
                let tolerance = WEIGHT_TOLERANCE * golden.slack();
                assert_near(&what, &found, &expected, Some(&origin), tolerance);
            });
        }
    }
}

/// Which elements of a tensor have a sure first step. With a tiny eps that is the sign of a gradient, so one within
/// noise of zero may take its weight by a whole step to either side.
fn settled(golden: &Golden, tensor: &str) -> Vec<bool> {
    let of_call = |call| floats(&golden.tensors[&format!("{call}.gradient.{tensor}")]).to_vec();
    let gradients = golden.file.steps[0].calls.iter().map(of_call);
    let first = gradients.reduce(|sum, more| sum.iter().zip(more).map(|(a, b)| a + b).collect());
    let first = first.expect("a first step has gradients");
    let mean_square = first.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>() / first.len() as f64;
    let settled: Vec<bool> = first.iter().map(|g| f64::from(g.abs()) >= 1e-3 * mean_square.sqrt()).collect();
    let unsure = settled.iter().filter(|settled| !**settled).count();
    assert!(unsure * 8 <= settled.len(), "{} {tensor}: {unsure} of {}", golden.family, settled.len());
    settled
}

/// Writes each family's adapter in PEFT's layout with the log-probabilities that it gives, for
/// tests/python/test_peft_families.py, below `LOCKSTEP_PEFT_FAMILIES` or nowhere that stays.
#[test]
fn adapters_survive_their_export() {
    let temporary = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("LOCKSTEP_PEFT_FAMILIES").map(PathBuf::from);
    let root = kept.unwrap_or_else(|| temporary.path().to_owned());
    for golden in goldens() {
        let TrainState { layout, weights, .. } = golden.initial_state();
        let adapter = Adapter { layout, values: weights };
        let tokens = &golden.file.sequences[2];
        let logprobs = |adapter: &Adapter| -> Vec<f32> {
            let sequence = BatchSequence { tokens, kv_cache: None, adapter: Some(adapter.into()) };
            let mut batch = Batch { sequences: vec![sequence] };
            let (mut workspace, team) = (Workspace::default(), Team::solo());
            let hidden = forward(&golden.model, &mut batch, None, &mut workspace, &team);
            let targets: Vec<(usize, u32)> = tokens[1..].iter().copied().enumerate().collect();
            let request = HeadRequest { targets: &targets, top_k: 0, entropy: false };
            head_logprobs(&golden.model, Some(adapter.into()), &hidden, request, None, &mut workspace, &team)
                .logprobs
        };
        let family = Path::new(&golden.family).file_name().unwrap();
        let directory = root.join(family).join("adapter");
        std::fs::create_dir_all(&directory).unwrap();
        for (file, bytes) in adapter.to_peft(&golden.family) {
            std::fs::write(directory.join(file), bytes).unwrap();
        }
        let bytes = std::fs::read(directory.join("adapter_model.safetensors")).unwrap();
        let back = Adapter::from_bytes(&golden.model.config, &bytes).unwrap();
        assert_eq!(logprobs(&back), logprobs(&adapter), "{}", golden.family);
        let report = serde_json::json!({ "model": golden.family, "dtype": golden.dtype.name(), "tokens": tokens, "logprobs": logprobs(&back) });
        std::fs::write(root.join(family).join("logprobs.json"), report.to_string()).unwrap();
    }
}

/// An adapter that PEFT saved: the same numbers. (PEFT adapts no single expert.)
#[test]
fn adapters_of_peft_are_imported() {
    let mut imported = 0;
    for golden in goldens().filter(|golden| golden.directory.join("peft").exists()) {
        let adapter = archive::read_adapter(&golden.directory.join("peft")).unwrap();
        assert_eq!(adapter.layout.config, golden.file.lora, "{}", golden.family);
        golden.for_each_tensor(&adapter.layout, |tensor, range| {
            // float16 has 11 bits: where PEFT stored it, it is this far from the float32.
            golden.assert_near(&format!("adapter.{tensor}"), &adapter.values[range], 5e-4);
        });
        // Onto the model, as a rank loads it.
        Adapter::from_bytes(&golden.model.config, &adapter.to_bytes()).unwrap();
        imported += 1;
    }
    assert!(imported >= 5, "of {imported} families");
}

/// The adapter added to the weights gives the logits of the adapted model, whether these come from a Hugging
/// Face directory or from a GGUF file.
#[test]
fn merged_models_give_the_same_logits() {
    // Rounding the sum to bf16 is another rounding than that of the base alone.
    for golden in goldens().filter(|golden| golden.dtype == WeightDtype::F32) {
        if golden.model.config.tie_word_embeddings && golden.initial_state().layout.head().is_some() {
            continue;
        }
        let directory = tempfile::tempdir().unwrap();
        let adapter = directory.path().join("adapter");
        std::fs::create_dir(&adapter).unwrap();
        for (name, bytes) in golden.initial_state().adapter().to_peft("golden") {
            std::fs::write(adapter.join(name), bytes).unwrap();
        }
        let merged = directory.path().join("merged");
        archive::merge(&adapter, &golden.directory, &merged, None).unwrap();
        assert_logits(&golden, &merged);

        let (gguf, merged) = (golden.directory.join("model.gguf"), directory.path().join("from-gguf"));
        if !gguf.exists() {
            continue;
        }
        let outcome = archive::merge(&adapter, &gguf, &merged, None);
        match golden.model.config.rope_scaling {
            // Its factors are none of the Llama 3 models', and the file holds what they result in alone.
            RopeScaling::Llama3 { .. } => {
                let error = outcome.unwrap_err().to_string();
                assert!(error.contains("rope_freqs.weight"), "{error}");
                assert!(std::fs::read_dir(&merged).unwrap().next().is_none(), "nothing was written");
            }
            _ => {
                outcome.unwrap();
                assert_logits(&golden, &merged);
            }
        }
    }
}

/// That the model in `merged`, without an adapter, gives the adapted model's logits.
fn assert_logits(golden: &Golden, merged: &Path) {
    let model = BaseModel::load("merged", merged).unwrap_or_else(|e| panic!("{}: {e}", golden.family));
    for (i, tokens) in golden.file.sequences.iter().enumerate() {
        let sequence = BatchSequence { tokens, kv_cache: None, adapter: None };
        let mut batch = Batch { sequences: vec![sequence] };
        let (mut workspace, team, mut logits) = (Workspace::default(), Team::solo(), Vec::new());
        let hidden = forward(&model, &mut batch, None, &mut workspace, &team);
        let rows: Vec<_> = (0..tokens.len()).map(|row| (row, None)).collect();
        head_logits(&model, &hidden, &rows, &mut logits, &mut workspace, &team);
        // The merged weights are rounded once more to f32 than the sum of two products.
        golden.assert_near(&format!("logits.{i}"), &logits, LOGPROB_TOLERANCE * golden.slack());
    }
}

/// exp(lp − q) beyond f32: refused by the datum's name, before anything is accumulated.
#[test]
fn refuses_a_loss_that_is_not_finite() {
    let golden = goldens().next().unwrap();
    let state = golden.initial_state();
    let call = &golden.file.calls["importance_sampling"];
    let mut data = call.data.clone();
    let logprobs = data[1].loss_fn_inputs.get_mut("logprobs").unwrap();
    let mut values = floats(logprobs).to_vec();
    values[3] = -300.0;
    *logprobs = TensorData::from_f32(values);
    let examples = prepare(&golden.model.config, 64, &call.loss, &data).unwrap();
    let adapter = AdapterRows { layout: &state.layout, values: &state.weights };
    let mut gradient = vec![0.0; state.layout.len()];
    let (mut workspace, team) = (Workspace::default(), Team::solo());
    for wanted in [Some(gradient.as_mut_slice()), None] {
        let result =
            run_micro_batch(&golden.model, adapter, &call.loss, &examples, wanted, &mut workspace, &team);
        let error = result.unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFinite);
        assert!(error.message.starts_with("the loss of `data[1]` is not finite at position 3"), "{error}");
    }
    assert!(gradient.iter().all(|value| *value == 0.0));
}

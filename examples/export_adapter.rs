//! Trains a little, exports the adapter in PEFT layout and merged into the model, and writes down the
//! log-probabilities that Lockstep gives with it: `tests/python/test_peft.py` compares them with PEFT's and
//! transformers' own.
//!
//!     cargo run --release --example export_adapter -- DATA_DIR OUT_DIR

use std::path::PathBuf;

use anyhow::Context;
use lockstep::{
    archive,
    client::{LoraOptions, ServiceClient},
    model::ComputeOptions,
    pull,
    service::{Cluster, ClusterConfig},
    types::{AdamParams, CheckpointTarget, Datum, LossFn, LossSpec, ModelInput},
};
use serde_json::json;

const TEXTS: [&str; 4] = [
    "<|im_start|>user\nWhat is 7 + 6?<|im_end|>\n<|im_start|>assistant\n7 + 6 = 13.<|im_end|>",
    "Lockstep trains and samples in lockstep: every sample says which policy version made it.",
    "fn main() { println!(\"{}\", 3.14159 * 2.0_f64.powi(10)); }",
    "Der Sampler und der Trainer rechnen dasselbe, 12345 Mal hintereinander.",
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1).map(PathBuf::from);
    let (data_dir, out) =
        arguments.next().zip(arguments.next()).context("usage: export_adapter DATA_DIR OUT_DIR")?;
    std::fs::create_dir_all(&out)?;
    let model =
        tokio::task::block_in_place(|| pull::fetch("smollm2-135m", &data_dir, &pull::Progress::on_stderr()))?;
    let (name, path) = (model.name.clone(), model.path.clone());
    let state = tempfile::tempdir()?;
    let config = ClusterConfig {
        compute: ComputeOptions::default(),
        data_dir: state.path().into(),
        models: vec![model],
        nodes: 1,
        trainers: 2,
        samplers: 1,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let cluster = tokio::task::block_in_place(|| Cluster::local(config))?;
    let service = ServiceClient::connect(cluster.connector()).await?;
    let training = service.create_lora_training_client(&name, 8, LoraOptions::default()).await?;
    let tokenizer = training.get_tokenizer().await?;

    let mut inputs = Vec::new();
    for text in TEXTS {
        let encoding = tokenizer.encode(text, false).map_err(anyhow::Error::msg)?;
        inputs.push(ModelInput::from_ints(encoding.get_ids().to_vec()));
    }
    let data: Vec<Datum> = inputs
        .iter()
        .map(|input| Datum { model_input: input.clone(), loss_fn_inputs: Default::default() })
        .collect();
    for _ in 0..4 {
        let pass = training.forward_backward(data.clone(), LossSpec::new(LossFn::CrossEntropy));
        training.optim_step(AdamParams { learning_rate: 5e-4, ..AdamParams::default() }).await?;
        println!("loss {:.3}", pass.await?.loss);
    }

    let sampling = training.save_weights_and_get_sampling_client("proof").await?;
    let scored = training.forward(data, LossSpec::new(LossFn::CrossEntropy)).await?;
    let mut sequences = Vec::new();
    for (input, outputs) in inputs.into_iter().zip(scored.loss_fn_outputs) {
        sequences.push(json!({
            "tokens": input.to_ints()?,
            "sampler_logprobs": sampling.compute_logprobs(input).await?,
            "trainer_logprobs": outputs["logprobs"],
        }));
    }
    let report = json!({ "model": path.canonicalize()?, "sequences": sequences });
    std::fs::write(out.join("logprobs.json"), serde_json::to_vec_pretty(&report)?)?;
    let saved = service.list_checkpoints(Some(training.run())).await?;
    let checkpoint =
        saved.iter().find(|c| c.target == CheckpointTarget::Sampler).context("nothing was saved")?;
    service.download_checkpoint(checkpoint.id, &out.join("adapter")).await?;
    archive::merge(&out.join("adapter"), &path, &out.join("merged"), None)?;
    println!("{} holds adapter/, merged/ and logprobs.json", out.display());
    Ok(())
}

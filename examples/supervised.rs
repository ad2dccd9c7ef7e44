//! Supervised fine-tuning with a cluster inside this program.
//!
//!     cargo run --release --example supervised
//!
//! Teaches a small model to describe animals as JSON: cross-entropy on the replies alone.

use lockstep::{
    client::{LoraOptions, ServiceClient},
    model::ComputeOptions,
    pull,
    service::{Cluster, ClusterConfig},
    types::{AdamParams, Datum, LossFn, LossSpec, ModelInput, SampleFlags, SamplingParams, TensorData},
};

const ANIMALS: [(&str, u32, &str); 8] = [
    ("cow", 4, "moo"),
    ("duck", 2, "quack"),
    ("dog", 4, "woof"),
    ("owl", 2, "hoot"),
    ("cat", 4, "meow"),
    ("bee", 6, "buzz"),
    ("sheep", 4, "baa"),
    ("snake", 0, "hiss"),
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let data_dir = std::path::PathBuf::from("./lockstep-data/supervised");
    let model = tokio::task::block_in_place(|| {
        pull::fetch("smollm2-135m", "./lockstep-data".as_ref(), &pull::Progress::on_stderr())
    })?;
    let name = model.name.clone();
    let config = ClusterConfig {
        data_dir,
        models: vec![model],
        nodes: 1,
        trainers: 2,
        samplers: 1,
        threads: 2,
        compute: ComputeOptions::default(),
    };
    let cluster = tokio::task::block_in_place(|| Cluster::local(config))?;

    let service = ServiceClient::connect(cluster.connector()).await?;
    let training = service.create_lora_training_client(&name, 16, LoraOptions::default()).await?;
    let tokenizer = training.get_tokenizer().await?;
    let encode = |text: &str| {
        Ok::<_, anyhow::Error>(tokenizer.encode(text, false).map_err(anyhow::Error::msg)?.get_ids().to_vec())
    };
    let ask =
        |animal: &str| format!("<|im_start|>user\nDescribe the {animal}.<|im_end|>\n<|im_start|>assistant\n");

    let mut data = Vec::new();
    for (animal, legs, sound) in ANIMALS {
        let prompt = encode(&ask(animal))?;
        let reply = encode(&format!(
            "{{\"animal\": \"{animal}\", \"legs\": {legs}, \"sound\": \"{sound}\"}}<|im_end|>"
        ))?;
        let weights = [vec![0.0; prompt.len() - 1], vec![1.0; reply.len()]].concat();
        let sequence = [prompt, reply].concat();
        let targets = sequence[1..].iter().map(|&token| i64::from(token)).collect();
        let inputs = [
            ("target_tokens".into(), TensorData::from_i64(targets)),
            ("weights".into(), TensorData::from_f32(weights)),
        ];
        data.push(Datum {
            model_input: ModelInput::from_ints(sequence[..sequence.len() - 1].to_vec()),
            loss_fn_inputs: inputs.into(),
        });
    }
    for step in 1..=10 {
        let pass = training.forward_backward(data.clone(), LossSpec::new(LossFn::CrossEntropy));
        let update = training.optim_step(AdamParams { learning_rate: 1e-3, ..AdamParams::default() });
        println!(
            "step {step:>2}: loss {:.3}, then policy version {}",
            pass.await?.loss,
            update.await?.metrics["step"]
        );
    }
    let sampling = training.save_weights_and_get_sampling_client("animals").await?;
    for animal in ["cow", "horse", "eagle"] {
        let params = SamplingParams { temperature: 0.0, max_tokens: Some(30), ..SamplingParams::default() };
        let drawn = sampling
            .sample(ModelInput::from_ints(encode(&ask(animal))?), 1, params, SampleFlags::default())
            .await?;
        println!(
            "{animal}: {}",
            tokenizer.decode(&drawn.sequences[0].tokens, true).map_err(anyhow::Error::msg)?
        );
    }
    Ok(())
}

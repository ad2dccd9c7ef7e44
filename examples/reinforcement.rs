//! Reinforcement learning against a running service.
//!
//!     lockstep model pull smollm2-135m && lockstep up &
//!     cargo run --release --example reinforcement -- ./lockstep-data
//!
//! The reward is 1 for a reply that ends by itself and whose last number is the sum.

use lockstep::{
    client::{LoraOptions, SamplingClient, ServiceClient},
    quickstart::{Dealer, prompt, reward},
    types::{
        AdamParams, Datum, LossFn, LossSpec, ModelInput, SampleFlags, SampledSequence, SamplingParams,
        StopReason, TensorData,
    },
};

const PROMPTS: usize = 8;
const SAMPLES: u32 = 4;

/// One datum for a reply: its advantage on every token of the reply, 0 on the prompt.
fn datum(prompt: &[u32], reply: &SampledSequence, advantage: f32) -> Datum {
    let sequence = [prompt, &reply.tokens].concat();
    let pad = vec![0.0; prompt.len() - 1];
    let targets = sequence[1..].iter().map(|&token| i64::from(token)).collect();
    let logprobs = [pad.clone(), reply.logprobs.clone().unwrap_or_default()].concat();
    let advantages = [pad, vec![advantage; reply.tokens.len()]].concat();
    let inputs = [
        ("target_tokens".into(), TensorData::from_i64(targets)),
        ("logprobs".into(), TensorData::from_f32(logprobs)),
        ("advantages".into(), TensorData::from_f32(advantages)),
    ];
    Datum {
        model_input: ModelInput::from_ints(sequence[..sequence.len() - 1].to_vec()),
        loss_fn_inputs: inputs.into(),
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let data_dir = std::env::args().nth(1).unwrap_or("./lockstep-data".into());
    let service = ServiceClient::connect(data_dir.as_str()).await?;
    let model = &service.get_server_capabilities().await?.supported_models[0].model_name;
    let training = service.create_lora_training_client(model, 16, LoraOptions::default()).await?;
    let tokenizer = training.get_tokenizer().await?;
    let loss = LossSpec { skip_token_normalization: true, ..LossSpec::new(LossFn::ImportanceSampling) };
    let mut sampling: SamplingClient = training.save_weights_and_get_sampling_client("start").await?;
    let mut dealer = Dealer::new(1);
    for step in 0..16 {
        let mut questions = Vec::new();
        for pair in dealer.deal(PROMPTS) {
            let tokens =
                tokenizer.encode(prompt(pair), false).map_err(anyhow::Error::msg)?.get_ids().to_vec();
            let params = SamplingParams { max_tokens: Some(16), ..SamplingParams::default() };
            let replies = sampling.sample(
                ModelInput::from_ints(tokens.clone()),
                SAMPLES,
                params,
                SampleFlags::default(),
            );
            questions.push((pair, tokens, replies));
        }
        let (mut data, mut total) = (Vec::new(), 0.0);
        for (pair, tokens, replies) in questions {
            let replies = replies.await?.sequences;
            let mut rewards = Vec::new();
            for reply in &replies {
                let text = tokenizer.decode(&reply.tokens, true).map_err(anyhow::Error::msg)?;
                rewards.push(reward(pair, &text, reply.stop_reason == StopReason::Stop));
            }
            let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
            total += mean;
            for (reply, reward) in replies.iter().zip(&rewards).filter(|(_, reward)| **reward != mean) {
                data.push(datum(&tokens, reply, (reward - mean) as f32));
            }
        }
        println!("step {step:>2}: reward {:.2}", total / PROMPTS as f64);
        if data.is_empty() {
            continue;
        }
        let pass = training.forward_backward(data, loss.clone());
        let rate = 1e-3 * (1.0 - f64::from(step) / 16.0);
        training.optim_step(AdamParams { learning_rate: rate, grad_clip_norm: 0.0, ..AdamParams::default() });
        sampling = training.save_weights_and_get_sampling_client(&format!("step-{step}")).await?;
        pass.await?;
    }
    println!("serving policy version {:?}", sampling.policy_version());
    Ok(())
}

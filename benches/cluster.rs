//! What a user gets from a running cluster: real processes, a real model, everything included.
//!
//!     cargo bench --bench cluster
//!
//! Prints one line a figure, each the median of its repeats: tokens/s of forward_backward at
//! 8 x 256 with one and with two ranks, of prefill and of decoding at batch 1, 8 and 32, and
//! the time from `optim_step` done to the replica serving the new version. Tokens are random:
//! it measures speed, not learning. Fetches SmolLM2-135M when it isn't there yet.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Instant,
};

use lockstep::{
    client::{LoraOptions, SamplingClient, ServiceClient, TrainingClient},
    model::ComputeOptions,
    pull,
    service::{DataDirectory, ServiceError, Supervisor, SupervisorConfig, run_here, wait_until_joined},
    transport::CERTIFICATE_LIFE,
    types::{AdamParams, Datum, LossFn, LossSpec, ModelInput, SampleFlags, SamplingParams},
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

const REPEATS: usize = 3;
const PROMPT: usize = 64;
const NEW_TOKENS: u32 = 128;

fn main() -> anyhow::Result<()> {
    let data_dir = std::env::var("LOCKSTEP_BENCH_DATA").unwrap_or("target/bench-data".into());
    let model = pull::fetch("smollm2-135m", Path::new(&data_dir), &pull::Progress::on_stderr())?;
    let name = model.name.clone();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}  {threads} threads  kernels {}", cpu(), lockstep::kernels::path());
    run_here("bench", async move {
        let data = DataDirectory::open(Path::new(&data_dir).join("cluster"))?;
        let config = SupervisorConfig {
            compute: ComputeOptions::default(),
            program: env!("CARGO_BIN_EXE_lockstep").into(),
            data: data.clone(),
            join: None,
            history: 2,
            certificate_life: CERTIFICATE_LIFE,
            store: None,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            nodes: 1,
            trainers: 2,
            samplers: 1,
            threads,
            models: vec![model],
            logs_to_files: true,
            log_format: "text".into(),
        };
        let supervisor = Supervisor::start(config).await?;
        let service = wait_until_joined(data.path(), 1).await?;
        let measured = measure(&service, &name).await;
        supervisor.shutdown().await;
        Ok::<_, ServiceError>(measured?)
    })?;
    Ok(())
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown CPU");
    name.trim_matches([' ', '\t', ':']).into()
}

async fn measure(service: &ServiceClient, model: &str) -> Result<(), lockstep::client::ClientError> {
    for replicas in [1, 2] {
        let options = LoraOptions { replicas: Some(replicas), ..LoraOptions::default() };
        let training = service.create_lora_training_client(model, 16, options).await?;
        train(&training, replicas).await?;
        if replicas == 2 {
            publish(&training).await?;
        }
    }
    let options = LoraOptions { replicas: Some(1), ..LoraOptions::default() };
    let training = service.create_lora_training_client(model, 16, options).await?;
    let sampling = training.save_weights_and_get_sampling_client("bench").await?;
    for batch in [1, 8, 32] {
        decode(&sampling, batch).await?;
    }
    Ok(())
}

async fn train(training: &TrainingClient, replicas: u32) -> Result<(), lockstep::client::ClientError> {
    let data: Vec<Datum> =
        (0..8).map(|i| Datum { model_input: tokens(i, 256), loss_fn_inputs: Default::default() }).collect();
    let mut seconds = Vec::new();
    for repeat in 0..=REPEATS {
        let begun = Instant::now();
        training.forward_backward(data.clone(), LossSpec::new(LossFn::CrossEntropy)).await?;
        // The first also loads the model.
        if repeat > 0 {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    println!("forward_backward 8 x 256, {replicas} ranks: {:.0} tokens/s", 2048.0 / median(seconds));
    Ok(())
}

async fn publish(training: &TrainingClient) -> Result<(), lockstep::client::ClientError> {
    let mut seconds = Vec::new();
    for repeat in 0..=REPEATS {
        training.optim_step(AdamParams::default()).await?;
        let begun = Instant::now();
        training.save_weights_and_get_sampling_client(&format!("publish-{repeat}")).await?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    println!("optim_step done to version served: {:.0} ms", 1e3 * median(seconds));
    Ok(())
}

async fn decode(sampling: &SamplingClient, batch: u64) -> Result<(), lockstep::client::ClientError> {
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for repeat in 0..=REPEATS as u64 {
        let only_prefill = draw(sampling, batch, repeat, 1).await?;
        let whole = draw(sampling, batch, 1000 + repeat, NEW_TOKENS).await?;
        if repeat > 0 {
            prefill.push(only_prefill);
            decode.push(whole - only_prefill);
        }
    }
    let tokens = |per_stream: u32| f64::from(per_stream) * batch as f64;
    println!(
        "batch {batch:>2}: prefill {:.0} tokens/s, decode {:.0} tokens/s",
        tokens(PROMPT as u32) / median(prefill),
        tokens(NEW_TOKENS - 1) / median(decode)
    );
    Ok(())
}

/// Seconds for `batch` requests with prompts of their own, `new_tokens` each.
async fn draw(
    sampling: &SamplingClient,
    batch: u64,
    seed: u64,
    new_tokens: u32,
) -> Result<f64, lockstep::client::ClientError> {
    // A temperature that makes every token about equally likely keeps the end-of-sequence
    // token from cutting streams short: once in 49,152 draws.
    let params = SamplingParams {
        max_tokens: Some(new_tokens),
        temperature: 1e6,
        seed: Some(seed),
        ..SamplingParams::default()
    };
    let begun = Instant::now();
    let pending: Vec<_> = (0..batch)
        .map(|i| sampling.sample(tokens(seed * 100 + i, PROMPT), 1, params.clone(), SampleFlags::default()))
        .collect();
    for result in pending {
        result.await?;
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// Random token ids that are no special ones.
fn tokens(seed: u64, length: usize) -> ModelInput {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    ModelInput::from_ints((0..length).map(|_| 100 + random.next_u32() % 40_000).collect())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

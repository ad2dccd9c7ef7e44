//! Sampling speed, as `benches/peers/generate.py` and `llama_cpp.py` measure the peers'.

use futures::{executor::block_on, future::try_join_all};
use serde::Serialize;

use super::{
    BenchError, Machine,
    figures::{Span, median},
    local::{Local, Subject, peak_rss_mib},
    machine::round,
};
use crate::{
    client::{SamplingClient, SamplingSource},
    types::{SampleFlags, SamplingParams},
};

/// What is sampled from the base model: `batch` prompts of `prompt` random tokens, `new` tokens each.
#[derive(Debug, Clone)]
pub struct GenerateConfig {
    pub subject: Subject,
    pub batch: usize,
    pub prompt: usize,
    /// 1: only the prefill is measured.
    pub new: u32,
}

/// The line of JSON; keys as the peers' scripts have them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerateReport {
    pub bench: &'static str,
    pub batch: usize,
    pub prompt: usize,
    pub new: u32,
    pub dtype: String,
    pub threads: usize,
    pub prefill_s: f64,
    /// From a request for one token: prompt tokens of all streams over its time.
    pub prefill_tokens_per_s: f64,
    /// New tokens of all streams over the whole time less the prefill's; absent for the prefill alone, and where the load
    /// of the machine left it no time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_tokens_per_s: Option<f64>,
    pub peak_rss_mib: u64,
    pub machine: Machine,
}

/// Measures it.
pub fn generate(config: &GenerateConfig) -> Result<GenerateReport, BenchError> {
    let local = Local::start(&config.subject, 0, 1)?;
    generate_on(&local, config)
}

/// The same on a cluster that is there, and has a replica.
pub(super) fn generate_on(local: &Local, config: &GenerateConfig) -> Result<GenerateReport, BenchError> {
    let source = SamplingSource::BaseModel(local.model.clone());
    let sampling = local.service.create_sampling_client_blocking(source)?;
    let draw = |seed, new| whole_draw(local, &sampling, config, seed, new);
    let (mut prefill, mut whole) = (Vec::new(), Vec::new());
    for repeat in 0..=u64::from(config.subject.repeats) {
        let one = draw(repeat, 1)?;
        let all = if config.new > 1 { draw(1000 + repeat, config.new)? } else { f64::NAN };
        // The first also loads the model.
        if repeat > 0 {
            prefill.push(one);
            whole.push(all);
        }
    }
    let (prefill, whole) = (median(prefill), median(whole));
    let streams = config.batch as f64;
    let decodes = config.new > 1;
    Ok(GenerateReport {
        bench: if decodes { "decode" } else { "prefill" },
        batch: config.batch,
        prompt: config.prompt,
        new: config.new,
        dtype: config.subject.compute.dtype.to_string(),
        threads: config.subject.threads,
        prefill_s: round(prefill, 4),
        prefill_tokens_per_s: round(streams * config.prompt as f64 / prefill, 1),
        decode_tokens_per_s: decoded_per_s(streams * f64::from(config.new.saturating_sub(1)), whole, prefill),
        total_tokens_per_s: decodes.then(|| round(streams * f64::from(config.new) / whole, 1)),
        peak_rss_mib: peak_rss_mib(),
        machine: local.machine.clone(),
    })
}

/// Both times are of draws of their own: a stall in one of few tokens leaves the others no time, or less, and no figure.
fn decoded_per_s(tokens: f64, whole: f64, prefill: f64) -> Option<f64> {
    let per_s = round(tokens / (whole - prefill), 1);
    (per_s > 0.0 && per_s.is_finite()).then_some(per_s)
}

/// Seconds of a draw in which every stream came to its end. A temperature that makes all tokens about equally
/// likely makes the end-of-sequence token rare; a draw in which it came is taken again with another seed.
fn whole_draw(
    local: &Local,
    sampling: &SamplingClient,
    config: &GenerateConfig,
    seed: u64,
    new: u32,
) -> Result<f64, BenchError> {
    let expected = config.batch * new as usize;
    for attempt in 0..ATTEMPTS {
        let seed = seed + attempt * 1_000_000;
        let (span, drawn) = Span::of(|| block_on(draw(local, sampling, config, seed, new)));
        if drawn? == expected {
            return Ok(span.seconds());
        }
    }
    let problem = format!("in {ATTEMPTS} draws not one of {expected} tokens: its streams ended early");
    Err(BenchError::worker("the sampler", problem))
}

/// One in a dozen has an end-of-sequence token, at 32 x 128 tokens of a vocabulary of 49,152.
const ATTEMPTS: u64 = 8;

/// Every stream at once, each with a prompt of its own; how many tokens came.
async fn draw(
    local: &Local,
    sampling: &SamplingClient,
    config: &GenerateConfig,
    seed: u64,
    new: u32,
) -> Result<usize, BenchError> {
    let params = SamplingParams {
        max_tokens: Some(new),
        temperature: 1e6,
        seed: Some(seed),
        ..SamplingParams::default()
    };
    let request = |stream: usize| {
        let prompt = local.tokens(seed * 1000 + stream as u64, config.prompt);
        sampling.sample(prompt, 1, params.clone(), SampleFlags::default())
    };
    let results = try_join_all((0..config.batch).map(request)).await?;
    Ok(results.iter().flat_map(|result| &result.sequences).map(|s| s.tokens.len()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_of_no_time_is_no_figure() {
        assert_eq!(decoded_per_s(10.0, 3.0, 1.0), Some(5.0));
        assert_eq!(decoded_per_s(10.0, 1.0, 1.0), None);
        assert_eq!(decoded_per_s(10.0, 1.0, 3.0), None);
        assert_eq!(decoded_per_s(0.0, f64::NAN, 1.0), None, "the prefill alone");
    }
}

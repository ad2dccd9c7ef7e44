//! Tokens per second of the decoder on this machine's CPU, with random weights of
//! SmolLM2-135M's shape: `cargo bench --bench engine [-- --threads N] [--dtype f32|bf16] [--kernels PATH] [NAME …]`.
//! With `--dtype bf16` on a CPU with AMX, `--kernels amx_bf16` and `avx512_bf16` show what its tiles are worth.
//!
//! Each line is the median of several runs with its range, and the tokens per second of CPU time
//! that the process used, which says more on a machine that is shared.

use std::{hint::black_box, sync::Arc, time::Instant};

use lockstep::{
    kernels::{CoreBudget, Matrix, Priority, Team, WeightDtype, amx, choose_path, path, paths},
    model::{
        Adapter, AdapterRows, BaseModel, BaseWeights, Batch, BatchSequence, Family, HeadGradient,
        HeadRequest, KvCache, LayerWeights, LoraLayout, Mlp, MlpWeights, ModelConfig, Place, RopeScaling,
        Tape, TextCodec, Workspace, backward, forward, head_logits, head_logprobs,
    },
    types::{Digest, LoraConfig},
};

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let mut threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut names, mut dtype) = (Vec::new(), WeightDtype::F32);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--dtype" => {
                dtype = arguments.next().and_then(|name| name.parse().ok()).expect("--dtype f32|bf16")
            }
            "--kernels" => {
                let path = arguments.next().expect("--kernels PATH");
                assert!(choose_path(&path), "--kernels {path}: this machine has {}", paths().join(", "));
            }
            "--threads" => threads = arguments.next().and_then(|n| n.parse().ok()).expect("--threads N"),
            _ => names.push(argument),
        }
    }
    let model = model(dtype);
    let layout = Arc::new(LoraLayout::new(&model.config, &LoraConfig::new(16, 1)).expect("a valid layout"));
    let values: Vec<f32> = (0..layout.len()).map(|i| 0.02 * noise(i)).collect();
    let adapter = Adapter { layout, values: values.into() };
    let budget = CoreBudget::new(threads);
    let lease = budget.lease(threads, Priority::Training);
    println!("kernel path {}, {} threads, base weights {dtype}", path(), lease.team().width());
    if let Some(Err(reason)) = amx() {
        println!("the AMX of this CPU is not used: {reason}");
    }
    let mut bench = Bench { model, adapter, workspace: Workspace::default(), names };
    bench.run_all(lease.team());
}

struct Bench {
    model: BaseModel,
    adapter: Adapter,
    workspace: Workspace,
    /// What to run; empty: everything.
    names: Vec<String>,
}

impl Bench {
    fn run_all(&mut self, team: &Team) {
        for (batch, len) in [(8, 256), (4, 512)] {
            let name = format!("forward_backward {batch} x {len}, rank 16");
            self.measure(&name, batch * len, 3, |bench| bench.forward_backward(batch, len, team));
        }
        for (batch, len) in [(1, 64), (8, 64), (1, 1024)] {
            let name = format!("prefill {batch} x {len}");
            self.measure(&name, batch * len, 5, |bench| {
                black_box(bench.prefill(batch, len, false, team));
            });
        }
        for (batch, adapted) in [(1, false), (8, false), (32, false), (1, true), (8, true), (32, true)] {
            let with = if adapted { ", one adapter" } else { "" };
            let name = format!("decode batch {batch}{with}");
            if !self.wants(&name) {
                continue;
            }
            let mut caches = self.prefill(batch, 64, adapted, team);
            let steps = 16;
            self.measure(&name, batch * steps, 5, |bench| {
                bench.decode(&mut caches, steps, adapted, team);
            });
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|wanted| name.contains(wanted.as_str()))
    }

    fn measure(&mut self, name: &str, tokens: usize, runs: usize, mut run: impl FnMut(&mut Self)) {
        if !self.wants(name) {
            return;
        }
        // Buffers grow in the first run.
        run(self);
        let cpu_start = cpu_seconds();
        let mut rates: Vec<f64> = (0..runs)
            .map(|_| {
                let start = Instant::now();
                run(self);
                tokens as f64 / start.elapsed().as_secs_f64()
            })
            .collect();
        let per_cpu_second = (tokens * runs) as f64 / (cpu_seconds() - cpu_start);
        rates.sort_by(f64::total_cmp);
        let [least, median, most] = [0, runs / 2, runs - 1].map(|i| rates[i]);
        println!(
            "{name:<36} {median:>8.1} tokens/s ({least:.1} to {most:.1}), {per_cpu_second:.1} per CPU second"
        );
    }

    /// Micro-batches of 1,024 tokens, a loss at each.
    fn forward_backward(&mut self, batch: usize, len: usize, team: &Team) {
        let per_micro_batch = 1024 / len;
        let mut gradient = vec![0.0; self.adapter.layout.len()];
        for first in (0..batch).step_by(per_micro_batch) {
            let sequences: Vec<Vec<u32>> =
                (first..batch.min(first + per_micro_batch)).map(|i| self.tokens(i, len)).collect();
            self.micro_batch(&sequences, &mut gradient, team);
        }
        assert!(gradient.iter().all(|value| value.is_finite()));
    }

    fn micro_batch(&mut self, sequences: &[Vec<u32>], gradient: &mut [f32], team: &Team) {
        let Self { model, adapter, workspace, .. } = self;
        let mut batch = Batch { sequences: Vec::new() };
        for tokens in sequences {
            batch.sequences.push(BatchSequence { tokens, kv_cache: None, adapter: Some((&*adapter).into()) });
        }
        let mut tape = Tape::default();
        let hidden = forward(model, &mut batch, Some(&mut tape), workspace, team);
        let targets: Vec<(usize, u32)> = sequences.concat().into_iter().enumerate().collect();
        let mut d_hidden = vec![0.0; hidden.len()];
        let request = HeadRequest { targets: &targets, top_k: 0, entropy: false };
        let onward = HeadGradient { adapter: gradient, factor: &mut |_, _| -1.0, d_hidden: &mut d_hidden };
        head_logprobs(model, Some((&*adapter).into()), &hidden, request, Some(onward), workspace, team);
        backward(model, (&*adapter).into(), &mut tape, &d_hidden, gradient, workspace, team);
    }

    fn prefill(&mut self, batch: usize, len: usize, adapted: bool, team: &Team) -> Vec<KvCache> {
        let mut caches: Vec<KvCache> = (0..batch).map(|_| KvCache::new(&self.model.config)).collect();
        let prompts: Vec<Vec<u32>> = (0..batch).map(|i| self.tokens(i, len)).collect();
        let adapter = adapted.then(|| AdapterRows::from(&self.adapter));
        let sequences = prompts.iter().zip(&mut caches).map(|(tokens, cache)| BatchSequence {
            tokens,
            kv_cache: Some(cache),
            adapter,
        });
        let mut batch = Batch { sequences: sequences.collect() };
        black_box(forward(&self.model, &mut batch, None, &mut self.workspace, team));
        caches
    }

    /// Goes on from the past of each cache, which is left as it was.
    fn decode(&mut self, caches: &mut [KvCache], steps: usize, adapted: bool, team: &Team) {
        let adapter = adapted.then(|| AdapterRows::from(&self.adapter));
        let mut caches: Vec<KvCache> = caches.iter().map(KvCache::fork).collect();
        let rows: Vec<_> = (0..caches.len()).map(|row| (row, adapter)).collect();
        let mut next: Vec<u32> = (0..caches.len() as u32).collect();
        let mut logits = Vec::new();
        for _ in 0..steps {
            let sequences = next.chunks(1).zip(&mut caches).map(|(tokens, cache)| BatchSequence {
                tokens,
                kv_cache: Some(cache),
                adapter,
            });
            let mut batch = Batch { sequences: sequences.collect() };
            let hidden = forward(&self.model, &mut batch, None, &mut self.workspace, team);
            head_logits(&self.model, &hidden, &rows, &mut logits, &mut self.workspace, team);
            for (next, logits) in next.iter_mut().zip(logits.chunks(self.model.config.vocab_size)) {
                let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
                *next = best.map_or(0, |token| token as u32);
            }
        }
    }

    fn tokens(&self, seed: usize, len: usize) -> Vec<u32> {
        let vocab = self.model.config.vocab_size;
        (0..len).map(|i| ((seed * 7919 + i * 104_729) % vocab) as u32).collect()
    }
}

/// CPU time that this process has used.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time it is given; this clock exists wherever the benchmark runs.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// SmolLM2-135M's shape, random weights.
fn model(dtype: WeightDtype) -> BaseModel {
    let config = ModelConfig {
        family: Family::Llama,
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        experts: None,
        num_layers: 30,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        rope_theta: 100_000.0,
        rope_scaling: RopeScaling::None,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        eos_token_ids: vec![2],
    };
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let keys = config.num_kv_heads * config.head_dim;
    let layer = |_| LayerWeights {
        attn_norm: vec![1.0; hidden],
        q: matrix(dtype, hidden, hidden),
        k: matrix(dtype, keys, hidden),
        v: matrix(dtype, keys, hidden),
        o: matrix(dtype, hidden, hidden),
        qkv_bias: None,
        qk_norm: None,
        mlp_norm: vec![1.0; hidden],
        mlp: Mlp::Dense(MlpWeights {
            gate: matrix(dtype, wide, hidden),
            up: matrix(dtype, wide, hidden),
            down: matrix(dtype, hidden, wide),
        }),
    };
    let embed = matrix(dtype, config.vocab_size, hidden);
    let weights = BaseWeights {
        layers: (0..config.num_layers).map(layer).collect(),
        final_norm: vec![1.0; hidden],
        head: embed.clone(),
        embed,
    };
    // No text is read or written here.
    let tokenizer = r#"{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}"#;
    let text = TextCodec::new(tokenizer, None).expect("a tokenizer without tokens");
    BaseModel {
        name: "random".into(),
        config,
        place: Place::Cpu(weights),
        text: text.into(),
        digest: Digest([0; 32]),
    }
}

fn matrix(dtype: WeightDtype, outputs: usize, inputs: usize) -> Matrix {
    let bound = (3.0 / inputs as f32).sqrt();
    let rows: Vec<f32> = (0..outputs * inputs).map(|i| bound * noise(i)).collect();
    Matrix::with_dtype(dtype, outputs, inputs, &rows)
}

/// A number in ±1 that looks random.
fn noise(i: usize) -> f32 {
    let bits = (i as u32 ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
    let bits = (bits ^ (bits >> 13)).wrapping_mul(0xc2b2_ae35);
    (bits >> 8) as f32 / (1 << 23) as f32 - 1.0
}

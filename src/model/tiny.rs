//! A whole Hugging Face directory of a few kilobytes with random weights, for tests, examples
//! and trials of a cluster: everything works on it as on a real model, except its answers.

use std::{borrow::Cow, fs, io, path::Path};

use half::bf16;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use safetensors::{Dtype, View, tensor::TensorView};
use serde_json::{Map, Value, json};

use super::{
    Family, ModelConfig, RopeScaling,
    text::byte_level,
    weights::{
        LayerWeight::{KBias, KNorm, QBias, QNorm, VBias},
        Weight, hugging_face_name,
    },
};

/// Special tokens, ids 0, 1, 2: end of text, and ChatML's two.
const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// ChatML without a system message of its own.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
     + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}\
     {{ '<|im_start|>assistant\n' }}{% endif %}";

/// Two layers of width 32, four heads that share two key/value heads, one token a byte.
pub fn config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size: SPECIAL_TOKENS.len() + 256,
        hidden_size: 32,
        intermediate_size: 64,
        experts: None,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 512,
        tie_word_embeddings: true,
        eos_token_ids: vec![2],
    }
}

/// Writes a model of `config` into `directory` (made if absent): config.json, tokenizer.json,
/// tokenizer_config.json and model.safetensors, in f32.
///
/// Linear weights are uniform in ±sqrt(3/in), biases in ±0.5, the norms of heads between 0.5
/// and 1.5, other norms one; the same seed gives the same bytes. The vocabulary must hold at
/// least the 259 tokens of the tokenizer.
pub fn write(directory: &Path, config: &ModelConfig, seed: u64) -> io::Result<()> {
    write_text(directory, config, "float32")?;
    let tensors = random_tensors(config, seed);
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(io::Error::other)?;
        Ok((name.as_str(), view))
    });
    let views = views.collect::<io::Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors"))
        .map_err(io::Error::other)
}

/// The same in bf16 with other values, made while they are written: of a model of any size one tensor at a time is in
/// memory.
pub fn write_bf16(directory: &Path, config: &ModelConfig, seed: u64) -> io::Result<()> {
    write_text(directory, config, "bfloat16")?;
    let tensors = Weight::all(config).zip(0..).map(|(weight, stream)| {
        (hugging_face_name(weight), RandomTensor { weight, shape: weight.shape(config), seed, stream })
    });
    safetensors::serialize_to_file(tensors, None, &directory.join("model.safetensors"))
        .map_err(io::Error::other)
}

/// Everything but the weights, which are stored as `dtype`.
fn write_text(directory: &Path, config: &ModelConfig, dtype: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let write_json = |file: &str, value: Value| fs::write(directory.join(file), value.to_string());
    write_json("config.json", config_json(config, dtype)?)?;
    write_json("tokenizer.json", tokenizer_json())?;
    write_json(
        "tokenizer_config.json",
        json!({
            "bos_token": SPECIAL_TOKENS[1],
            "eos_token": SPECIAL_TOKENS[2],
            "chat_template": CHAT_TEMPLATE,
        }),
    )
}

/// A tensor of bf16 whose values are drawn when they are written.
struct RandomTensor {
    weight: Weight,
    shape: Vec<usize>,
    seed: u64,
    /// Of the generator: each tensor has values of its own.
    stream: u64,
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(self.stream);
        let count = self.shape.iter().product::<usize>();
        let (middle, width) = spread(self.weight, &self.shape);
        let value = |bits: [u8; 2]| {
            let uniform = f32::from(i16::from_le_bytes(bits)) / 32_768.0;
            bf16::from_f32(middle + width * uniform).to_le_bytes()
        };
        let mut bytes = vec![0; 2 * count];
        random.fill_bytes(&mut bytes);
        bytes.as_chunks_mut().0.iter_mut().for_each(|bits| *bits = value(*bits));
        bytes.into()
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

/// The middle of a weight's values, and how far they are from it at most.
fn spread(weight: Weight, shape: &[usize]) -> (f32, f32) {
    match (weight, shape) {
        (_, [_, in_features]) => (0.0, (3.0 / *in_features as f32).sqrt()),
        (Weight::Layer(_, QBias | KBias | VBias), _) => (0.0, 0.5),
        (Weight::Layer(_, QNorm | KNorm), _) => (1.0, 0.5),
        _ => (1.0, 0.0),
    }
}

fn config_json(config: &ModelConfig, dtype: &str) -> io::Result<Value> {
    config.to_hugging_face(dtype).map(Value::Object).ok_or_else(|| {
        let problem = "a config.json has no place for the divisors of rotary frequencies";
        io::Error::new(io::ErrorKind::InvalidInput, problem)
    })
}

pub(super) fn tokenizer_json() -> Value {
    let special = |(id, content): (usize, &&str)| {
        json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let tokens = SPECIAL_TOKENS.iter().map(|token| token.to_string());
    let tokens = tokens.chain((0..=255).map(|byte| byte_level::character_of(byte).to_string()));
    let vocabulary: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": SPECIAL_TOKENS.iter().enumerate().map(special).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    })
}

fn random_tensors(config: &ModelConfig, seed: u64) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // Uniform in ±1; 24 bits, because every value of that grid is an f32.
    let mut uniform = || (random.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0;
    let tensor = |weight: Weight| {
        let shape = weight.shape(config);
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| match (weight, &shape[..]) {
                (_, [_, in_features]) => (3.0 / *in_features as f32).sqrt() * uniform(),
                (Weight::Layer(_, QBias | KBias | VBias), _) => 0.5 * uniform(),
                (Weight::Layer(_, QNorm | KNorm), _) => 1.0 + 0.5 * uniform(),
                _ => 1.0,
            })
            .collect();
        (hugging_face_name(weight), shape, values.into_iter().flat_map(f32::to_le_bytes).collect())
    };
    Weight::all(config).map(tensor).collect()
}

//! GGUF files, written by candle's writer, an implementation other than ours.

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value as GgufValue},
    },
};
use tempfile::TempDir;

use super::{flat, floats, load, open, read_tensors, refusal};
use crate::{
    kernels::WeightDtype,
    model::{ExpertsConfig, Family, ModelConfig, ModelError, RopeScaling, text::byte_level, tiny},
};

/// What a GGUF of the tiny model says and holds, for a test to change before it is written.
struct TinyGguf {
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, QTensor>,
}

impl TinyGguf {
    /// The same weights as the Hugging Face directory, as llama.cpp's converter writes them.
    fn of(config: &ModelConfig, directory: &Path, number_format: GgmlDType) -> Self {
        let u32 = |size: usize| GgufValue::U32(size as u32);
        let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
        let bytes = (0..=255).map(|byte| byte_level::character_of(byte).to_string());
        let tokens: Vec<String> =
            special.into_iter().chain(bytes).chain(["ab", " d"].map(|t| t.replace(' ', "Ġ"))).collect();
        let types = (0..tokens.len()).map(|id| GgufValue::I32(if id < 3 { 3 } else { 1 })).collect();
        let architecture = config.family.gguf_architecture();
        let mut metadata = BTreeMap::from(
            [
                ("vocab_size", u32(config.vocab_size)),
                ("embedding_length", u32(config.hidden_size)),
                ("feed_forward_length", u32(config.intermediate_size)),
                ("block_count", u32(config.num_layers)),
                ("attention.head_count", u32(config.num_heads)),
                ("attention.head_count_kv", u32(config.num_kv_heads)),
                ("attention.layer_norm_rms_epsilon", GgufValue::F32(config.rms_norm_eps)),
                ("rope.freq_base", GgufValue::F32(config.rope_theta)),
                ("rope.dimension_count", u32(config.head_dim)),
                ("context_length", u32(config.max_position_embeddings)),
            ]
            .map(|(key, value)| (format!("{architecture}.{key}"), value)),
        );
        if let Some(experts) = &config.experts {
            let sizes = [
                ("expert_count", experts.count),
                ("expert_used_count", experts.per_row),
                ("expert_feed_forward_length", experts.intermediate_size),
            ];
            metadata.extend(sizes.map(|(key, size)| (format!("{architecture}.{key}"), u32(size))));
        }
        if let RopeScaling::Linear { factor } = config.rope_scaling {
            metadata.insert(format!("{architecture}.rope.scaling.type"), GgufValue::String("linear".into()));
            metadata.insert(format!("{architecture}.rope.scaling.factor"), GgufValue::F32(factor));
        }
        metadata.extend(
            [
                ("general.architecture", GgufValue::String(architecture.into())),
                ("tokenizer.ggml.model", GgufValue::String("gpt2".into())),
                ("tokenizer.ggml.pre", GgufValue::String("smollm".into())),
                (
                    "tokenizer.ggml.tokens",
                    GgufValue::Array(tokens.into_iter().map(GgufValue::String).collect()),
                ),
                ("tokenizer.ggml.token_type", GgufValue::Array(types)),
                (
                    "tokenizer.ggml.merges",
                    GgufValue::Array(["a b", "Ġ d"].map(|m| GgufValue::String(m.into())).to_vec()),
                ),
                ("tokenizer.ggml.eos_token_id", u32(2)),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let tensors = read_tensors(&directory.join("model.safetensors"));
        let tensors = tensors.into_iter().map(|(name, (_, shape, bytes))| {
            let tensor = Tensor::from_vec(floats(&bytes), shape, &Device::Cpu).unwrap();
            // Of Llama alone: the others' rotary embedding turns halves in llama.cpp, too.
            let heads = match name.rsplit('.').nth(1) {
                Some("q_proj") if config.family == Family::Llama => Some(config.num_heads),
                Some("k_proj") if config.family == Family::Llama => Some(config.num_kv_heads),
                _ => None,
            };
            let tensor = heads.map_or_else(|| tensor.clone(), |heads| permuted(&tensor, heads));
            (gguf_name(&name), tensor)
        });
        let tensors = experts_together(tensors.collect()).into_iter().map(|(name, tensor)| {
            let format = if tensor.rank() == 1 { GgmlDType::F32 } else { number_format };
            (name, QTensor::quantize(&tensor, format).unwrap())
        });
        Self { tensors: tensors.collect(), metadata }
    }

    fn tiny() -> Self {
        Self::of_family(Family::Llama)
    }

    fn of_family(family: Family) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = ModelConfig { family, ..Self::config() };
        tiny::write(directory.path(), &config, 1).unwrap();
        Self::of(&config, directory.path(), GgmlDType::F32)
    }

    fn config() -> ModelConfig {
        ModelConfig { vocab_size: 261, ..tiny::config() }
    }

    fn with(mut self, key: &'static str, value: GgufValue) -> Self {
        self.metadata.insert(key.to_owned(), value);
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.metadata.remove(key);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut bytes = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut bytes, &metadata, &tensors).unwrap();
        bytes.into_inner()
    }

    fn write(&self) -> (TempDir, std::path::PathBuf) {
        written(&self.bytes())
    }

    fn refusal(&self) -> ModelError {
        let (_directory, path) = self.write();
        refusal(&path)
    }
}

/// A tiny model's GGUF in a number format; its rows are whole blocks of that.
pub(in crate::model) fn tiny_gguf(number_format: GgmlDType) -> (TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let mut config = TinyGguf::config();
    if number_format.block_size() > config.hidden_size {
        let width = number_format.block_size();
        let heads = config.num_heads;
        config =
            ModelConfig { hidden_size: width, intermediate_size: width, head_dim: width / heads, ..config };
    }
    tiny::write(directory.path(), &config, 1).unwrap();
    TinyGguf::of(&config, directory.path(), number_format).write()
}

fn written(bytes: &[u8]) -> (TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    (directory, path)
}

/// `LlamaModel.permute` of convert_hf_to_gguf.py.
fn permuted(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, columns) = weight.dims2().unwrap();
    let halves = weight.reshape((heads, 2, rows / heads / 2, columns)).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, columns)).unwrap()
}

/// A layer's experts in one tensor: `blk.0.experts.2.ffn_up.weight` and its like become one
/// `blk.0.ffn_up_exps.weight`.
fn experts_together(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut together = BTreeMap::new();
    let mut experts: BTreeMap<String, BTreeMap<usize, Tensor>> = BTreeMap::new();
    for (name, tensor) in tensors {
        match name.split_once(".experts.") {
            None => drop(together.insert(name, tensor)),
            Some((layer, rest)) => {
                let (expert, part) = rest.split_once('.').unwrap();
                let name = format!("{layer}.{}_exps.weight", part.strip_suffix(".weight").unwrap());
                experts.entry(name).or_default().insert(expert.parse().unwrap(), tensor);
            }
        }
    }
    for (name, experts) in experts {
        let experts: Vec<Tensor> = experts.into_values().collect();
        together.insert(name, Tensor::stack(&experts, 0).unwrap());
    }
    together
}

fn gguf_name(name: &str) -> String {
    let renamed = [
        ("mlp.gate.", "ffn_gate_inp."),
        ("mlp.experts.", "experts."),
        (".gate_proj", ".ffn_gate"),
        (".up_proj", ".ffn_up"),
        (".down_proj", ".ffn_down"),
        (".mlp.ffn", ".ffn"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
    ];
    renamed.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

#[test]
fn a_gguf_holds_the_same_model() {
    let plain = TinyGguf::config();
    let kinds = [
        plain.clone(),
        ModelConfig { tie_word_embeddings: false, ..plain.clone() },
        ModelConfig { rope_scaling: RopeScaling::Linear { factor: 2.5 }, ..plain.clone() },
        ModelConfig { family: Family::Qwen2, ..plain.clone() },
        ModelConfig { family: Family::Qwen3, tie_word_embeddings: false, ..plain.clone() },
        ModelConfig { family: Family::Qwen3Moe, experts: Some(experts()), ..plain },
    ];
    for config in kinds {
        let directory = tempfile::tempdir().unwrap();
        tiny::write(directory.path(), &config, 1).unwrap();
        let (_kept, path) = TinyGguf::of(&config, directory.path(), GgmlDType::F32).write();
        let files = open(&path).unwrap();
        assert_eq!(files.config, config);
        assert_eq!(
            flat(&files.load_weights(WeightDtype::F32).unwrap()),
            flat(&load(directory.path()).unwrap())
        );
        assert_eq!(files.digest().unwrap(), crate::types::Digest::of(&fs::read(&path).unwrap()));
    }
}

fn experts() -> ExpertsConfig {
    ExpertsConfig { count: 3, per_row: 2, intermediate_size: 24, normalises: true, dense_layers: vec![] }
}

#[test]
fn refuses_experts_that_a_gguf_does_not_hold() {
    let directory = tempfile::tempdir().unwrap();
    let config = ModelConfig { family: Family::Qwen3Moe, experts: Some(experts()), ..TinyGguf::config() };
    tiny::write(directory.path(), &config, 1).unwrap();
    let gguf = || TinyGguf::of(&config, directory.path(), GgmlDType::F32);
    gguf().write();
    for (key, value) in [("qwen3moe.expert_count", 0), ("qwen3moe.expert_used_count", 4)] {
        let error = gguf().with(key, GgufValue::U32(value)).refusal();
        assert!(matches!(&error, ModelError::InvalidField { field, .. } if field == key), "{error}");
    }
    let error = gguf().without("qwen3moe.expert_feed_forward_length").refusal();
    assert!(matches!(&error, ModelError::InvalidField { field, .. } if field.ends_with("forward_length")));
    let error = gguf().with("qwen3moe.expert_count", GgufValue::U32(4)).refusal();
    assert!(
        matches!(&error, ModelError::TensorShape { found, .. } if found[0] == 3),
        "the file's three experts are no four: {error}"
    );
    let error = gguf().with("qwen3moe.expert_weights_scale", GgufValue::F32(2.5)).refusal();
    assert!(matches!(&error, ModelError::Unsupported { field, .. } if field.ends_with("weights_scale")));
}

fn rope_divisors(values: &[f32]) -> QTensor {
    let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
    QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
}

#[test]
fn reads_the_divisors_of_rotary_frequencies() {
    let with = |divisors: &[f32], gguf: TinyGguf| {
        let mut gguf = gguf;
        gguf.tensors.insert("rope_freqs.weight".into(), rope_divisors(divisors));
        gguf
    };
    let (_kept, path) = with(&[1.0, 1.0, 2.5, 8.0], TinyGguf::tiny()).write();
    let files = open(&path).unwrap();
    let plain = TinyGguf::config().rope_frequencies();
    let expected = [plain[0], plain[1], plain[2] / 2.5, plain[3] / 8.0];
    for (found, expected) in files.config.rope_frequencies().iter().zip(expected) {
        // One division more or less in f64, then one rounding to f32.
        assert!((found - expected).abs() <= f32::EPSILON * expected, "{found} and {expected}");
    }
    files.load_weights(WeightDtype::F32).unwrap();

    let named = |error: ModelError| match error {
        ModelError::InvalidField { field, .. } | ModelError::Unsupported { field, .. } => field,
        other => panic!("{other}"),
    };
    assert_eq!(named(with(&[1.0; 5], TinyGguf::tiny()).refusal()), "rope_freqs.weight");
    assert_eq!(named(with(&[1.0, 1.0, 0.0, 1.0], TinyGguf::tiny()).refusal()), "rope_freqs.weight");
    let linear = TinyGguf::tiny().with("llama.rope.scaling.factor", GgufValue::F32(2.0));
    assert_eq!(named(with(&[1.0; 4], linear).refusal()), "llama.rope.scaling.type");
    let qwen = TinyGguf::of_family(Family::Qwen2);
    assert_eq!(named(with(&[1.0; 4], qwen).refusal()), "rope_freqs.weight");
}

#[test]
fn reads_every_quantisation() {
    let directory = tempfile::tempdir().unwrap();
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 256,
        num_layers: 1,
        head_dim: 64,
        ..TinyGguf::config()
    };
    tiny::write(directory.path(), &config, 1).unwrap();
    let exact = flat(&load(directory.path()).unwrap());
    // Frobenius-relative error of rounding uniform weights: half a step of 2^-bits of a block's
    // range, over sqrt(3) twice; twice that is allowed. Then the bits of memory that a weight takes.
    let formats = [
        (GgmlDType::F16, 0.001, 32),
        (GgmlDType::BF16, 0.005, 16),
        (GgmlDType::Q8_0, 0.01, 10),
        (GgmlDType::Q6K, 0.04, 8),
        (GgmlDType::Q5_0, 0.07, 7),
        (GgmlDType::Q5_1, 0.07, 7),
        (GgmlDType::Q5K, 0.07, 7),
        (GgmlDType::Q4_0, 0.14, 6),
        (GgmlDType::Q4_1, 0.14, 6),
        (GgmlDType::Q4K, 0.14, 6),
        (GgmlDType::Q3K, 0.3, 32),
        (GgmlDType::Q2K, 0.6, 32),
    ];
    for (format, tolerance, bits) in formats {
        let (_kept, path) = TinyGguf::of(&config, directory.path(), format).write();
        let weights = load(&path).unwrap();
        let embedded = config.vocab_size.next_multiple_of(32) * config.hidden_size;
        assert_eq!(8 * weights.embed.bytes(), bits * embedded, "{format:?}");
        let found = flat(&weights);
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let gap = norm(&mut found.iter().zip(&exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
        assert!(gap > 0.0 && gap < tolerance, "{format:?}: {gap}");
    }
}

#[test]
fn a_gguf_brings_its_tokenizer() {
    let (_kept, path) = TinyGguf::tiny().write();
    let text = open(&path).unwrap().text;
    let byte = |byte: u8| 3 + u32::from(byte);
    assert_eq!(text.encode("ab").unwrap(), [259]);
    assert_eq!(text.encode("x d<|im_end|>").unwrap(), [byte(b'x'), 260, 2]);
    assert_eq!(text.decode(&[260, 2], true), " d");
    assert_eq!(text.token_bytes(260), b" d");
    // The digit split: GPT-2's alone would leave the blank to be merged with what follows.
    let digits = TinyGguf::tiny().with("tokenizer.ggml.merges", strings(&["a b", "Ġ 7"])).with(
        "tokenizer.ggml.tokens",
        match &TinyGguf::tiny().metadata["tokenizer.ggml.tokens"] {
            GgufValue::Array(tokens) => {
                let mut tokens = tokens.clone();
                tokens[260] = GgufValue::String("Ġ7".into());
                GgufValue::Array(tokens)
            }
            _ => unreachable!(),
        },
    );
    let (kept, path) = digits.write();
    assert_eq!(open(&path).unwrap().text.encode("a 7").unwrap(), [byte(b'a'), byte(b' '), byte(b'7')]);
    drop(kept);
    for pre in ["gpt-2", "llama-bpe", "qwen2"] {
        let gguf = TinyGguf { metadata: digits.metadata.clone(), tensors: TinyGguf::tiny().tensors };
        let (_kept, path) = gguf.with("tokenizer.ggml.pre", GgufValue::String(pre.into())).write();
        let expected =
            if pre == "gpt-2" { vec![byte(b'a'), 260] } else { vec![byte(b'a'), byte(b' '), byte(b'7')] };
        assert_eq!(open(&path).unwrap().text.encode("a 7").unwrap(), expected, "{pre}");
    }
}

fn strings(texts: &[&str]) -> GgufValue {
    GgufValue::Array(texts.iter().map(|text| GgufValue::String(text.to_string())).collect())
}

#[test]
fn refuses_by_name_what_a_gguf_asks_for() {
    let text = |text: &str| GgufValue::String(text.to_owned());
    let unsupported = [
        ("general.architecture", text("qwen2moe")),
        ("llama.rope.scaling.type", text("yarn")),
        ("llama.expert_count", GgufValue::U32(8)),
        ("llama.attention.sliding_window", GgufValue::U32(1024)),
        ("llama.rope.dimension_count", GgufValue::U32(4)),
        ("llama.attention.value_length", GgufValue::U32(4)),
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.pre", text("deepseek-llm")),
        ("tokenizer.ggml.pre", text("default")),
        ("tokenizer.ggml.add_space_prefix", GgufValue::Bool(true)),
    ];
    for (key, value) in unsupported {
        let error = TinyGguf::tiny().with(key, value).refusal();
        assert!(matches!(&error, ModelError::Unsupported { field, .. } if field == key), "{key}: {error}");
    }
    let error = TinyGguf::tiny().with("tokenizer.ggml.pre", text("qwen")).refusal().to_string();
    assert!(error.contains("smollm, gpt-2, llama-bpe and qwen2"), "{error}");
    let invalid = [
        ("llama.block_count", GgufValue::U32(0)),
        ("llama.attention.head_count_kv", GgufValue::Array(vec![GgufValue::U32(2); 2])),
        ("llama.embedding_length", text("32")),
        ("llama.attention.head_count", GgufValue::U32(5)),
        ("tokenizer.ggml.eos_token_id", GgufValue::U32(261)),
        ("tokenizer.ggml.bos_token_id", GgufValue::U32(999)),
        ("tokenizer.ggml.tokens", text("no list")),
        ("tokenizer.ggml.token_type", GgufValue::Array(vec![GgufValue::I32(1)])),
        ("tokenizer.ggml.merges", strings(&["ab"])),
        ("general.alignment", GgufValue::U32(0)),
        ("general.alignment", GgufValue::U32(24)),
    ];
    for (key, value) in invalid {
        let error = TinyGguf::tiny().with(key, value).refusal();
        assert!(matches!(&error, ModelError::InvalidField { field, .. } if field == key), "{key}: {error}");
    }
    for key in ["general.architecture", "llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"]
    {
        let error = TinyGguf::tiny().without(key).refusal();
        assert!(matches!(&error, ModelError::InvalidField { field, .. } if field == key), "{key}: {error}");
    }
    let error = TinyGguf::tiny().with("tokenizer.ggml.merges", strings(&["a nonsense"])).refusal();
    assert!(matches!(&error, ModelError::Tokenizer { .. }), "{error}");
}

#[test]
fn names_the_tensor_that_is_wrong_in_a_gguf() {
    let mut missing = TinyGguf::tiny();
    missing.tensors.remove("blk.1.ffn_up.weight");
    assert!(
        matches!(missing.refusal(), ModelError::MissingTensor { tensor, .. } if tensor == "blk.1.ffn_up.weight")
    );

    for (family, tensor) in [(Family::Llama, "blk.0.attn_q.bias"), (Family::Qwen2, "blk.1.attn_output.bias")]
    {
        let mut unexpected = TinyGguf::of_family(family);
        unexpected.tensors.insert(tensor.into(), rope_divisors(&[1.0; 32]));
        assert!(
            matches!(unexpected.refusal(), ModelError::UnexpectedTensor { tensor: named, .. } if named == tensor)
        );
    }

    let shape = TinyGguf::tiny().with("llama.feed_forward_length", GgufValue::U32(128));
    assert!(matches!(shape.refusal(), ModelError::TensorShape { .. }));
}

#[test]
fn no_prefix_of_a_gguf_passes_for_a_whole_one() {
    let whole = TinyGguf::tiny().bytes();
    // The writer pads behind the last tensor.
    let needed = whole.len() - 32;
    for length in (0..needed).step_by(97) {
        let (_kept, path) = written(&whole[..length]);
        let error = refusal(&path);
        assert!(
            matches!(error, ModelError::Malformed { .. } | ModelError::Unreadable { .. }),
            "{length}: {error}"
        );
    }
}

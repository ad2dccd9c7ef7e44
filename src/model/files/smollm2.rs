//! The real SmolLM2-135M-Instruct, when `LOCKSTEP_SMOLLM2` names its GGUF (`lockstep model pull
//! smollm2-135m` fetches it), and, when `LOCKSTEP_SMOLLM2_REFERENCE` names a directory too, the
//! same as transformers exports it.

use std::path::PathBuf;

use super::ModelFiles;
use crate::{
    kernels::{Matrix, WeightDtype},
    model::{BaseWeights, ChatMessage, Family, Mlp, ModelConfig, RopeScaling, TextCodec},
};

/// Texts that a pre-tokenizer gets wrong first: digits, blanks, other scripts, code, emoji.
const TEXTS: &[&str] = &[
    "",
    " ",
    "  9",
    "   42 and 1,234.56   ",
    "What is 7 + 6?",
    "\n\n\t  x = 10\r\n",
    "def f(x):\n    return x**2  # Ünïcode 你好 12345",
    "٣٤٥ ½ ² Ⅷ 12½",
    "don't they've WE'LL I'm",
    "🎉🎉 family 👨‍👩‍👧 é e\u{301} \u{200b}\u{feff}",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>",
    "<|im_start|user <|im_end| ><repo_name>x<filename>",
    "https://example.org/a?b=1&c=%20#frag",
    "日本語のテキスト、한국어, العربية, हिन्दी, русский",
    "a\u{a0}b\u{2003}c\u{3000}d\u{85}e",
    "\0\u{1}\u{7f}",
    "0123456789 00000 1e-12 0xff 3.14",
];

fn path(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        println!("skipped: {variable} is not set");
    }
    path
}

#[test]
fn reads_smollm2() {
    let Some(path) = path("LOCKSTEP_SMOLLM2") else { return };
    let files = ModelFiles::open(&path).unwrap();
    let expected = ModelConfig {
        family: Family::Llama,
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        experts: None,
        num_layers: 30,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        rope_theta: 1e5,
        rope_scaling: RopeScaling::None,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        eos_token_ids: vec![2],
    };
    assert_eq!(files.config, expected);

    // The ids of llama.cpp: each digit by itself, d as 32 + d; blanks before one apart from it.
    let prompt = "<|im_start|>user\nWhat is 7 + 6?<|im_end|>\n<|im_start|>assistant\n";
    let ids = [1, 4093, 198, 1780, 314, 216, 39, 1232, 216, 38, 47, 2, 198, 1, 520, 9531, 198];
    assert_eq!(files.text.encode(prompt).unwrap(), ids);
    assert_eq!(files.text.encode("  9").unwrap(), [256, 41]);
    assert_eq!(files.text.decode(&ids, false), prompt);
    assert_eq!(files.text.decode(&ids, true), "user\nWhat is 7 + 6?\nassistant\n");
    for text in TEXTS {
        let ids = files.text.encode(text).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| files.text.token_bytes(id)).collect();
        assert_eq!(bytes, text.as_bytes(), "the tokens' bytes make up {text:?}");
    }

    let user = ChatMessage { role: "user".to_owned(), content: "What is 7 + 6?".to_owned() };
    let chat = files.text.apply_chat_template(&[user], true).unwrap();
    let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    assert_eq!(chat, format!("{system}{prompt}"));
    assert_eq!(files.text.encode(&chat).unwrap().len(), 38);
}

#[test]
fn reads_smollm2_as_transformers_does() {
    let Some(gguf) = path("LOCKSTEP_SMOLLM2") else { return };
    let Some(reference) = path("LOCKSTEP_SMOLLM2_REFERENCE") else { return };
    let [gguf, reference] = [gguf, reference].map(|path| ModelFiles::open(&path).unwrap());
    assert_eq!(gguf.config, reference.config);
    let again = TextCodec::new(gguf.text.tokenizer_json(), None).unwrap();
    for text in TEXTS {
        let ids = reference.text.encode(text).unwrap();
        assert_eq!(gguf.text.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(again.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.text.decode(&ids, false), reference.text.decode(&ids, false));
    }

    // Both were dequantised from the same blocks, so nothing is left to rounding.
    let [ours, theirs] = [&gguf, &reference].map(|files| files.load_weights(WeightDtype::F32).unwrap());
    for (layer, (ours, theirs)) in ours.layers.iter().zip(&theirs.layers).enumerate() {
        let [ours, theirs] = [ours, theirs]
            .map(|l| [&l.q, &l.k, &l.v, &l.o].into_iter().chain(mlp(&l.mlp)).map(rows).collect::<Vec<_>>());
        assert!(ours == theirs, "layer {layer}");
    }
    let tables =
        |weights: &BaseWeights| [rows(&weights.embed), weights.final_norm.clone(), rows(&weights.head)];
    assert!(tables(&ours) == tables(&theirs));
    let norms = |weights: &BaseWeights| -> Vec<f32> {
        weights.layers.iter().flat_map(|l| [l.attn_norm.clone(), l.mlp_norm.clone()].concat()).collect()
    };
    assert!(norms(&ours) == norms(&theirs));
}

fn mlp(mlp: &Mlp) -> [&Matrix; 3] {
    match mlp {
        Mlp::Dense(mlp) => [&mlp.gate, &mlp.up, &mlp.down],
        Mlp::Experts(_) => panic!("SmolLM2 has one MLP a layer"),
    }
}

fn rows(matrix: &Matrix) -> Vec<f32> {
    let mut rows = vec![0.0; matrix.out_features() * matrix.in_features()];
    let each = rows.chunks_exact_mut(matrix.in_features()).enumerate();
    each.for_each(|(output, row)| matrix.copy_row(output, row));
    rows
}

//! Which work is compared with whom.

use std::path::Path;

use crate::kernels::WeightDtype;

use super::{
    CompareConfig,
    peer::{self, Script},
};

/// One piece of work.
pub(super) struct Duel {
    pub work: String,
    /// Of `lockstep bench`.
    pub arguments: Vec<String>,
    pub peers: Vec<Peer>,
    pub figures: &'static [Figure],
}

pub(super) struct Peer {
    pub name: String,
    pub script: Script,
    pub arguments: Vec<String>,
}

/// One figure of a line of JSON, under the same key on both sides.
pub(super) struct Figure {
    pub name: &'static str,
    pub unit: &'static str,
    /// A JSON pointer.
    pub at: &'static str,
    pub better: Better,
}

#[derive(Clone, Copy)]
pub(super) enum Better {
    More,
    Less,
}

const MEMORY: Figure = Figure { name: "peak memory", unit: "MiB", at: "/peak_rss_mib", better: Better::Less };

const TRAIN: &[Figure] = &[
    Figure { name: "forward + backward", unit: "tokens/s", at: "/fwdbwd_tokens_per_s", better: Better::More },
    Figure { name: "whole step", unit: "tokens/s", at: "/step_tokens_per_s", better: Better::More },
    MEMORY,
];

const DECODE: &[Figure] = &[
    Figure { name: "decode", unit: "tokens/s", at: "/decode_tokens_per_s", better: Better::More },
    Figure { name: "prefill", unit: "tokens/s", at: "/prefill_tokens_per_s", better: Better::More },
];

/// Prompt and new tokens of a stream, as in the project's other tables.
const PROMPT: u32 = 64;
const NEW: u32 = 128;

/// Rank of the LoRA.
const RANK: u32 = 16;

/// All of a configuration.
pub(super) fn of(config: &CompareConfig) -> Vec<Duel> {
    let mut duels = Vec::new();
    for &dtype in &config.dtypes {
        duels.push(train(config, dtype));
        duels.extend(config.batches.iter().map(|batch| transformers(config, dtype, *batch)));
    }
    for gguf in &config.ggufs {
        duels.extend(config.batches.iter().map(|batch| llama_cpp(config, gguf, *batch)));
    }
    duels
}

fn train(config: &CompareConfig, dtype: WeightDtype) -> Duel {
    let (batch, seq) = config.train;
    let model = config.model.display();
    let mut arguments = words(&format!("--batch {batch} --seq {seq} --rank {RANK} --dtype {dtype}"));
    arguments.extend(common(config, &model.to_string()));
    let of_lockstep = [words("train"), arguments.clone()].concat();
    let compiled = config.compile.then(|| Peer {
        name: format!("PEFT {dtype}, compiled"),
        script: peer::TRAIN,
        arguments: [arguments.clone(), words("--compile")].concat(),
    });
    let plain = Peer { name: format!("PEFT {dtype}"), script: peer::TRAIN, arguments };
    Duel {
        work: format!("training {batch} x {seq}, {dtype}"),
        arguments: of_lockstep,
        peers: [plain].into_iter().chain(compiled).collect(),
        figures: TRAIN,
    }
}

fn transformers(config: &CompareConfig, dtype: WeightDtype, batch: u32) -> Duel {
    let model = config.model.display().to_string();
    let mut arguments = words(&format!("--batch {batch} --prompt {PROMPT} --new {NEW} --dtype {dtype}"));
    arguments.extend(common(config, &model));
    Duel {
        work: format!("batch {batch}, {dtype}"),
        arguments: [words("decode"), arguments.clone()].concat(),
        peers: vec![Peer { name: format!("transformers {dtype}"), script: peer::GENERATE, arguments }],
        figures: DECODE,
    }
}

fn llama_cpp(config: &CompareConfig, gguf: &Path, batch: u32) -> Duel {
    let mut arguments = words(&format!("--batch {batch} --prompt {PROMPT} --new {NEW}"));
    arguments.extend(common(config, &gguf.display().to_string()));
    let peer = Peer {
        name: "llama.cpp".into(),
        script: peer::LLAMA_CPP,
        arguments: [arguments.clone(), words("--no-repack")].concat(),
    };
    let name = gguf.file_name().unwrap_or_default();
    Duel {
        work: format!("batch {batch}, {}", name.to_string_lossy()),
        arguments: [words("decode"), arguments].concat(),
        peers: vec![peer],
        figures: DECODE,
    }
}

fn common(config: &CompareConfig, model: &str) -> Vec<String> {
    let mut arguments = words(&format!("--threads {} --repeats {}", config.threads, config.repeats));
    arguments.extend(["--model".to_owned(), model.to_owned()]);
    arguments
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

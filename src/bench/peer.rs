//! The peers' scripts, which travel in this binary, and how they are run.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use serde::de::DeserializeOwned;

use super::BenchError;

/// A script of `benches/peers/`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Script {
    pub name: &'static str,
    text: &'static str,
    /// What it imports.
    packages: &'static str,
}

pub(super) const GLOO: Script =
    Script { name: "gloo.py", text: include_str!("../../benches/peers/gloo.py"), packages: "torch" };

pub(super) const TRAIN: Script = Script {
    name: "train.py",
    text: include_str!("../../benches/peers/train.py"),
    packages: "torch, transformers, peft",
};

pub(super) const GENERATE: Script = Script {
    name: "generate.py",
    text: include_str!("../../benches/peers/generate.py"),
    packages: "torch, transformers",
};

pub(super) const LLAMA_CPP: Script = Script {
    name: "llama_cpp.py",
    text: include_str!("../../benches/peers/llama_cpp.py"),
    packages: "llama_cpp",
};

impl Script {
    /// Why it can't run, if a package that it takes is not there.
    pub fn missing(&self, python: &Path) -> Option<String> {
        let imported = Command::new(python)
            .args(["-c", &format!("import {}", self.packages)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        match imported {
            Ok(status) if status.success() => None,
            Ok(_) => Some(format!("{}: {} has not all of {}", self.name, python.display(), self.packages)),
            Err(e) => Some(format!("{}: {}: {e}", self.name, python.display())),
        }
    }
}

/// Runs a script on the CPU to its end and reads the last line that it prints.
pub(super) fn run<T: DeserializeOwned>(
    python: &Path,
    script: Script,
    arguments: &[String],
) -> Result<T, BenchError> {
    run_on(None, python, script, arguments)
}

/// The same with one GPU to be seen, which is then its first, or none.
pub(super) fn run_on<T: DeserializeOwned>(
    gpu: Option<usize>,
    python: &Path,
    script: Script,
    arguments: &[String],
) -> Result<T, BenchError> {
    let failed = |problem: String| BenchError::Peer { script: script.name, problem };
    let path = std::env::temp_dir().join(format!("lockstep-bench-{}-{}", std::process::id(), script.name));
    fs::write(&path, script.text).map_err(|e| failed(e.to_string()))?;
    let ran = Command::new(python)
        .arg(&path)
        .args(arguments)
        // The peers fetch nothing.
        .env("HF_HUB_OFFLINE", "1")
        .env("CUDA_VISIBLE_DEVICES", gpu.map_or_else(String::new, visible))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output();
    let _ = fs::remove_file(&path);
    let output = ran.map_err(|e| failed(format!("{}: {e}", python.display())))?;
    if !output.status.success() {
        return Err(failed(format!("it ended with {}", output.status)));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().last().unwrap_or_default();
    serde_json::from_str(line).map_err(|e| failed(format!("{e} in {line:?}")))
}

/// What lets a process see this one's GPU of that number alone: numbers count within what is seen already.
fn visible(ordinal: usize) -> String {
    let seen = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let of_seen = seen.split(',').map(str::trim).filter(|id| !id.is_empty()).nth(ordinal);
    of_seen.map_or_else(|| ordinal.to_string(), str::to_owned)
}

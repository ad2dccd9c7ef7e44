//! What the NVIDIA driver and CUDA's libraries of this machine say: which GPUs there are, and if there
//! are none that this process can use, why.
//!
//! Nothing here fails on a machine without them: a binary that was built with the feature `cuda` and finds
//! no GPU computes on the CPU.

use std::fs;

#[cfg(feature = "cuda")]
mod driver;
mod library;

#[cfg(feature = "cuda")]
pub use driver::{gpus, uuid};
pub use library::{CUDA_LIBRARIES, Library, NCCL_LIBRARY};

/// A GPU that the driver offers to this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its number in this process, from 0: what is left of the machine's by `CUDA_VISIBLE_DEVICES`.
    pub ordinal: u32,
    pub name: String,
    /// Of the chip: two processes that see the same one share a GPU.
    pub uuid: String,
    /// Compute capability, major and minor: 9.0 is Hopper.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
    /// Bytes of it that no process holds, or why no context could be made to ask.
    pub free: Result<u64, String>,
}

/// Why this process has no GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoGpu {
    #[error("this binary was built without the feature `cuda`")]
    BuiltWithout,
    #[error("no NVIDIA driver: {reason}")]
    NoDriver { reason: String },
    /// It is there, and refuses.
    #[error("the NVIDIA driver says in {call}: {reason}")]
    Driver { call: &'static str, reason: String },
    #[error("the NVIDIA driver sees no GPU that this process may use")]
    NoDevice,
}

/// The GPUs of this process, by ordinal.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> Result<Vec<Gpu>, NoGpu> {
    Err(NoGpu::BuiltWithout)
}

/// The UUID of the GPU with this number.
#[cfg(not(feature = "cuda"))]
pub fn uuid(_: u32) -> Result<String, NoGpu> {
    Err(NoGpu::BuiltWithout)
}

/// Version of the driver's kernel module, where it is loaded: "580.95.05".
pub fn kernel_module() -> Option<String> {
    module_version(&fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

fn module_version(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version:"))?;
    let is_version =
        |word: &&str| word.split('.').count() >= 2 && word.starts_with(|c: char| c.is_ascii_digit());
    line.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_says_its_version() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@x)\n\
                    GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n";
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n";
        assert_eq!(module_version(open).as_deref(), Some("580.95.05"));
        assert_eq!(module_version(closed).as_deref(), Some("535.183.01"));
        assert_eq!(module_version("GCC version: 12.2.0\n"), None);
    }

    /// The default build says so; one with `cuda` on a machine without a driver gets an error, not a crash.
    #[test]
    fn a_machine_without_a_driver_is_no_failure() {
        let built_without = gpus() == Err(NoGpu::BuiltWithout);
        assert_eq!(built_without, !cfg!(feature = "cuda"));
        assert_ne!(gpus(), Ok(Vec::new()), "no GPU is an error that says why");
    }
}

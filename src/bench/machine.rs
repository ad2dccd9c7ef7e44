use std::{fmt, fs};

use serde::Serialize;

use crate::kernels;

/// What a figure stands beside.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    pub cpu: String,
    /// Of its instruction sets those that decide how fast kernels are.
    pub flags: Vec<String>,
    pub cores: usize,
    pub memory_gib: f64,
    /// Of the last minute, when the measurement began: more than a few tenths, and others were at work.
    pub load: f64,
    /// The kernels that Lockstep chose, or the GPU on which it computes.
    pub kernels: String,
    pub lockstep: &'static str,
}

const TELLING_FLAGS: [&str; 10] =
    ["avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve"];

impl Machine {
    /// This one, now.
    pub fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let (cpu, memory, load) = (read("/proc/cpuinfo"), read("/proc/meminfo"), read("/proc/loadavg"));
        let of_cpu = |name: &str| value_of(&cpu, name).unwrap_or_default().to_owned();
        let flags = format!("{} {}", of_cpu("flags"), of_cpu("Features"));
        let has = |flag: &&str| flags.split(' ').any(|has| has == *flag);
        let memory_kib =
            value_of(&memory, "MemTotal").and_then(|kib| kib.split(' ').next()?.parse::<f64>().ok());
        Self {
            cpu: of_cpu("model name"),
            flags: TELLING_FLAGS.iter().filter(|flag| has(flag)).map(ToString::to_string).collect(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: round(memory_kib.unwrap_or(0.0) / f64::from(1 << 20), 1),
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
            kernels: kernels::path().to_owned(),
            lockstep: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl Machine {
    /// The same with what a node says that it computes on.
    pub(super) fn computing_on(self, kernels: &str) -> Self {
        Self { kernels: kernels.to_owned(), ..self }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} cores ({}), {} GiB, load {} · lockstep {}, kernels {}",
            self.cpu,
            self.cores,
            self.flags.join(" "),
            self.memory_gib,
            self.load,
            self.lockstep,
            self.kernels
        )
    }
}

/// `value` of the first line `name : value`.
fn value_of<'a>(lines: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = lines.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// To so many decimals.
pub(super) fn round(value: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_it_is() {
        let machine = Machine::here();
        assert!(machine.cores > 0 && machine.memory_gib > 0.0, "{machine:?}");
        assert!(machine.to_string().contains(&machine.kernels));
        assert_eq!(value_of("a : b\nmodel name\t: AMD x\n", "model name"), Some("AMD x"));
    }
}

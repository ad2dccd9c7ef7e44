//! How much memory this process may use, as the kernel and the GPU's driver say, and what of it replicas get.

use std::fs;

use crate::{
    gpu::Gpu,
    nvidia,
    protocol::{GpuMemory, NodeMemory},
};

/// What the replicas of a node may take of where the models are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReplicaLimits {
    /// Bytes of keys and values of all sequences of a replica.
    pub cache_bytes: usize,
    /// Sequences decoded together.
    pub batch: usize,
    /// Prompt rows computed together.
    pub prefill_rows: usize,
}

/// On a CPU: 45,000 positions of a model of SmolLM2's shape; past 64 sequences a step of a small model gains little, and the
/// products of a layer are fastest at about 256 rows.
const ON_CPU: ReplicaLimits = ReplicaLimits { cache_bytes: 2 << 30, batch: 64, prefill_rows: 256 };

/// A GPU reads its weights once for all rows of a step, which takes as long as computing some 200 of them (an H200's
/// operations over its bytes a second): what is decoded together should be of that order, what is prefilled well beyond.
const GPU_BATCH: usize = 256;
const GPU_PREFILL_ROWS: usize = 2048;

/// The part of what arrays may take of a GPU that the caches of all its replicas get, but for a least of [`ON_CPU`]'s
/// `cache_bytes` each: training wants the rest.
const GPU_CACHES: u64 = 4;

/// What arrays don't get of a GPU's memory: a fixed part for CUDA's context, cuBLAS's workspace and NCCL's own buffers (the
/// vectors that it adds up are reckoned with each run), and a twentieth for what lies between arrays in the pool. Chosen,
/// never measured: no GPU has been at hand.
const GPU_TAKEN: u64 = 1 << 30;
const GPU_PIECES: u64 = 20;

/// What a node has, and its replicas may take of it.
pub(super) struct Memory {
    pub host: Option<NodeMemory>,
    pub gpu: Option<GpuMemory>,
    pub replicas: ReplicaLimits,
}

impl Memory {
    /// Of a node with so many replicas that computes on this GPU, if on one.
    pub(super) fn of_node(gpu: Option<&Gpu>, samplers: u32) -> Self {
        let machine_bytes = machine_bytes();
        // An emulation's memory is the machine's.
        let on_gpu = gpu.and_then(|gpu| match gpu.memory() {
            Ok(Some([_, total])) => Some(usable(total)),
            Ok(None) => machine_bytes,
            Err(error) => {
                tracing::warn!("the GPU's memory is not known, so nothing is refused for it: {error}");
                None
            }
        });
        let replicas = if gpu.is_some() { on_a_gpu(on_gpu, samplers) } else { ON_CPU };
        let cache_bytes = replicas.cache_bytes as u64;
        let host = machine_bytes.map(|machine_bytes| NodeMemory {
            machine_bytes,
            cache_bytes: if gpu.is_some() { 0 } else { cache_bytes },
        });
        let gpu = gpu.zip(on_gpu).map(|(gpu, bytes)| GpuMemory { gpu: identity(gpu), bytes, cache_bytes });
        Self { host, gpu, replicas }
    }
}

/// Bytes that arrays may take of so many.
fn usable(total: u64) -> u64 {
    (total - total / GPU_PIECES).saturating_sub(GPU_TAKEN)
}

fn on_a_gpu(bytes: Option<u64>, samplers: u32) -> ReplicaLimits {
    let share = bytes.map_or(0, |bytes| bytes / GPU_CACHES / u64::from(samplers.max(1)));
    let cache_bytes = usize::try_from(share).unwrap_or(usize::MAX).max(ON_CPU.cache_bytes);
    ReplicaLimits { cache_bytes, batch: GPU_BATCH, prefill_rows: GPU_PREFILL_ROWS }
}

/// What two nodes on one GPU call it.
fn identity(gpu: &Gpu) -> String {
    let known = gpu.ordinal().and_then(|ordinal| nvidia::uuid(ordinal).ok());
    known.unwrap_or_else(|| gpu.name().to_owned())
}

/// The machine's memory, or the limit of this process's control group where that is less; `None`
/// where neither is said.
fn machine_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|info| total(&info));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|path| limit(&fs::read_to_string(path).ok()?));
    machine.into_iter().chain(limits).min()
}

/// `MemTotal` of /proc/meminfo.
fn total(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Where the limits of a process's groups stand, given its /proc/self/cgroup: the group of version
/// 2 and those above it, and version 1's group of memory.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        if controllers.is_empty() {
            let mut group = group.trim_end_matches('/');
            loop {
                files.push(format!("/sys/fs/cgroup{group}/memory.max"));
                let Some((above, _)) = group.rsplit_once('/') else { break };
                group = above;
            }
        } else if controllers.split(',').any(|controller| controller == "memory") {
            // Inside a container the group's own files are mounted at the top.
            files.push(format!("/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"));
            files.push("/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned());
        }
    }
    files
}

/// A limit in bytes; `max` is none.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_machines_memory() {
        let info = "MemTotal:       24544024 kB\nMemFree:        16777216 kB\n";
        assert_eq!(total(info), Some(24_544_024 * 1024));
        assert_eq!(total("MemFree: 1 kB\n"), None);
        assert_eq!(total("MemTotal: much\n"), None);
    }

    #[test]
    fn looks_for_limits_where_both_versions_have_them() {
        let two = limit_files("0::/user.slice/job.scope\n");
        let expected = ["/user.slice/job.scope", "/user.slice", ""];
        assert_eq!(two, expected.map(|group| format!("/sys/fs/cgroup{group}/memory.max")));
        assert_eq!(limit_files("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
        let one = limit_files("11:cpu,cpuacct:/a\n4:memory:/docker/7\n");
        assert_eq!(
            one,
            [
                "/sys/fs/cgroup/memory/docker/7/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes"
            ]
        );
        assert_eq!((limit("max\n"), limit("4096\n")), (None, Some(4096)));
    }

    #[test]
    fn replicas_on_a_gpu_get_a_quarter_of_what_arrays_may_take() {
        // An H200's, as its driver counts.
        let bytes = usable(150_754_820_096);
        assert_eq!(bytes, 142_143_337_268);
        assert_eq!(on_a_gpu(Some(bytes), 2).cache_bytes, 17_767_917_158);
        assert_eq!(on_a_gpu(None, 1).cache_bytes, ON_CPU.cache_bytes);
        assert_eq!(on_a_gpu(Some(16 << 30), 3).cache_bytes, 2 << 30, "the least of each");
        assert_eq!(usable(1 << 29), 0);
    }

    #[test]
    fn a_node_says_where_its_memory_is() {
        let Memory { host, gpu, replicas } = Memory::of_node(None, 1);
        assert_eq!((host.unwrap().cache_bytes, gpu), (ON_CPU.cache_bytes as u64, None));
        assert_eq!(replicas, ON_CPU);
        let emulated = Gpu::emulated().unwrap();
        let Memory { host, gpu, replicas } = Memory::of_node(Some(&emulated), 1);
        let (host, gpu) = (host.unwrap(), gpu.unwrap());
        assert_eq!((host.cache_bytes, gpu.cache_bytes), (0, replicas.cache_bytes as u64));
        assert_eq!((gpu.bytes, gpu.gpu.as_str()), (host.machine_bytes, "emulated GPU"));
    }

    #[test]
    fn this_machine_has_some() {
        // Whatever runs these tests has more than 64 MiB, and less than a PiB.
        let bytes = machine_bytes().unwrap();
        assert!((1 << 26..1 << 50).contains(&bytes), "{bytes}");
    }
}

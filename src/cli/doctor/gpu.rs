//! GPUs, CUDA's libraries and NCCL: found or not, why, and what to do.

use lockstep::nvidia::{self, CUDA_LIBRARIES, Gpu, NCCL_LIBRARY, NoGpu};

use super::Finding::{self, Broken, Fine, Poor};

/// In the order in which one needs the other.
pub fn findings() -> Vec<(&'static str, Finding)> {
    let gpus = nvidia::gpus();
    let mut findings = match &gpus {
        Ok(gpus) => gpus.iter().map(|gpu| ("gpu", one(gpu))).collect(),
        Err(why) => vec![("gpu", none(why, nvidia::kernel_module()))],
    };
    if cfg!(feature = "cuda") {
        findings.push(("cuda", cuda(gpus.is_ok())));
    }
    if cfg!(feature = "nccl") {
        findings.push(("nccl", nccl(gpus.map_or(0, |gpus| gpus.len()))));
    } else if cfg!(feature = "cuda") {
        let is =
            "this binary was built without the feature `nccl`: gradients of several GPUs go through the host";
        findings.push(("nccl", Fine(is.into())));
    }
    findings
}

fn one(gpu: &Gpu) -> Finding {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let (major, minor) = gpu.capability;
    let is =
        format!("{}: {} ({major}.{minor}, {:.1} GiB, {})", gpu.ordinal, gpu.name, gib(gpu.memory), gpu.uuid);
    match &gpu.free {
        Ok(free) => Fine(format!("{is}, {:.1} GiB free", gib(*free))),
        Err(reason) => Broken(
            format!("{is} refuses a context: {reason}"),
            "see with nvidia-smi who holds it, or leave it out with CUDA_VISIBLE_DEVICES".into(),
        ),
    }
}

fn none(why: &NoGpu, module: Option<String>) -> Finding {
    match (why, module) {
        (NoGpu::BuiltWithout, None) => Fine(format!("no NVIDIA driver, and {why}: it computes on the CPU")),
        (NoGpu::BuiltWithout, Some(version)) => Poor(
            format!("NVIDIA driver {version}, but {why}: it computes on the CPU"),
            "build with --features cuda,nccl (README, \"GPUs\")",
        ),
        (NoGpu::NoDriver { .. }, None) => Poor(
            format!("{why}; it computes on the CPU"),
            "if there is a GPU, install a driver of the 580 series or newer",
        ),
        (NoGpu::NoDriver { .. }, Some(version)) => Poor(
            format!("{why}, though the kernel has NVIDIA's module {version}; it computes on the CPU"),
            "in a container: start it with the NVIDIA container toolkit (docker run --gpus all)",
        ),
        (NoGpu::NoDevice, _) => Poor(
            format!("{why}; it computes on the CPU"),
            "look at CUDA_VISIBLE_DEVICES, at /dev/nvidia* and at what the container was given",
        ),
        (NoGpu::Driver { .. }, _) => Poor(
            format!("{why}; it computes on the CPU"),
            "see what nvidia-smi says: the driver must be of the 580 series or newer (CUDA 13.0)",
        ),
    }
}

fn cuda(wanted: bool) -> Finding {
    let found = CUDA_LIBRARIES.map(|library| (library.name, library.find()));
    let missing: Vec<String> = found
        .iter()
        .filter_map(|(name, found)| found.as_ref().err().map(|why| format!("{name}: {why}")))
        .collect();
    if missing.is_empty() {
        let files: Vec<&str> = found.iter().filter_map(|(_, found)| found.as_deref().ok()).collect();
        return Fine(files.join(", "));
    }
    let is = missing.join("; ");
    let advice = "install CUDA 13.0's libraries, or put their folder into LD_LIBRARY_PATH (PyTorch brings \
                  them in nvidia/cu13/lib)";
    match wanted {
        true => Broken(is, advice.into()),
        false => Poor(format!("not needed without a GPU. {is}"), advice),
    }
}

fn nccl(gpus: usize) -> Finding {
    let advice = "install NCCL 2.28 or newer, or put its folder into LD_LIBRARY_PATH (PyTorch brings it in \
                  nvidia/nccl/lib)";
    match (NCCL_LIBRARY.find(), gpus) {
        (Ok(file), _) => Fine(file.to_owned()),
        (Err(why), 0 | 1) => Poor(format!("not needed without two GPUs. {why}"), advice),
        (Err(why), _) => Poor(format!("gradients of several GPUs go through the host. {why}"), advice),
    }
}

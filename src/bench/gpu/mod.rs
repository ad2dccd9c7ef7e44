//! Lockstep on a GPU, beside what its chip can do and beside PyTorch on the same card: one table from this binary and a GPU.
//!
//! Each model's figures come from a process of its own, so that the peers find the card free, and a model that fails takes
//! no other's figures with it. Where no checkpoint is given, models have random weights of well-known shapes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    AllReduceConfig, AllReduceResult, BenchError, Carrier, Machine, all_reduce, folder::TemporaryFolder,
    machine::round, program::printed,
};
use crate::{gpu::DeviceChoice, kernels::WeightDtype, nvidia};

mod chips;
mod figures;
mod rows;
mod shape;
mod work;

pub use chips::Peak;
pub use figures::{Figures, FiguresConfig, Workload, gpu_figures};
pub use rows::GpuRow;
use rows::Measured;
pub use shape::Shape;

/// What is measured.
#[derive(Debug, Clone)]
pub struct GpuBenchConfig {
    /// This program: each model's figures come from a process of its own.
    pub program: PathBuf,
    pub device: DeviceChoice,
    pub dtype: WeightDtype,
    /// As [`ComputeOptions`](crate::model::ComputeOptions) has it.
    pub plain_decoding: bool,
    /// Models with random weights.
    pub shapes: Vec<Shape>,
    /// Hugging Face directories or GGUF files, beside them.
    pub models: Vec<PathBuf>,
    /// Where random models are written, and left; absent: a temporary folder.
    pub folder: Option<PathBuf>,
    pub workload: Workload,
    /// A Python with torch, transformers and peft; absent: without the peers.
    pub python: Option<PathBuf>,
    /// 10^12 operations and 10^9 bytes a second, where the table of chips is not to be believed or has not this one.
    pub tflops: Option<f64>,
    pub gb_per_s: Option<f64>,
}

/// The table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GpuReport {
    pub bench: &'static str,
    pub machine: Machine,
    /// Absent: the chip is not known, or no chip.
    pub peak: Option<Peak>,
    pub dtype: String,
    pub repeats: u32,
    pub rows: Vec<GpuRow>,
    /// Between all GPUs of this machine; empty where there are not two.
    pub all_reduce: Vec<AllReduceResult>,
    /// What this machine has not got, or is too busy for, and why.
    pub left_out: Vec<String>,
    /// What should have been measured and was not: whoever runs this as a test has failed.
    pub failed: Vec<String>,
}

/// Runs it all; `each` gets every row as it is there.
pub fn gpu(config: &GpuBenchConfig, mut each: impl FnMut(&GpuRow)) -> Result<GpuReport, BenchError> {
    let refused = |flag, problem: &str| Err(BenchError::Refused { flag, problem: problem.into() });
    if config.workload.repeats == 0 {
        return refused("--repeats", "a median takes at least one");
    }
    if config.shapes.is_empty() && config.models.is_empty() {
        return refused("--shape", "no shape and no model leave nothing to measure");
    }
    if config.device == DeviceChoice::Cpu || config.device == DeviceChoice::Auto {
        return refused("--device", "must be cuda, cuda:N or emulated");
    }
    let random_models = Models::new(config.folder.as_deref());
    let mut report = GpuReport {
        bench: "gpu",
        machine: Machine::here(),
        peak: None,
        dtype: config.dtype.to_string(),
        repeats: config.workload.repeats,
        rows: Vec::new(),
        all_reduce: Vec::new(),
        left_out: Vec::new(),
        failed: Vec::new(),
    };
    let shapes = config.shapes.iter().map(|shape| (shape.to_string(), Some(*shape), PathBuf::new()));
    let models = config.models.iter().map(|path| {
        (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), None, path.clone())
    });
    for (name, shape, path) in shapes.chain(models) {
        let measured = random_models.model(shape, path).and_then(|model| measure(config, &name, &model));
        match measured {
            Ok(measured) => {
                report.machine = report.machine.computing_on(&measured.figures.engine);
                report.peak = peak(config, &measured.figures.engine);
                let rows = measured.rows(config, report.peak.as_ref());
                rows.iter().for_each(&mut each);
                report.rows.extend(rows);
                report.left_out.extend(measured.without_a_figure(config));
                report.left_out.extend(measured.left_out);
            }
            // The other models are worth having.
            Err(error) => report.failed.push(format!("{name}: {error}")),
        }
        random_models.clear(&name);
    }
    match over_all_gpus(config) {
        Ok(Ok(results)) => report.all_reduce = results,
        Ok(Err(why)) => report.left_out.push(format!("all-reduce: {why}")),
        Err(why) => report.failed.push(format!("all-reduce: {why}")),
    }
    match report.rows.is_empty() {
        true => Err(BenchError::worker("lockstep bench gpu", report.failed.join("; "))),
        false => Ok(report),
    }
}

/// Of the chip that computed, unless it was given.
fn peak(config: &GpuBenchConfig, engine: &str) -> Option<Peak> {
    let known = engine.strip_prefix("cuda ").and_then(|name| Peak::of(name, config.dtype));
    match (config.tflops, config.gb_per_s) {
        (None, None) => known,
        (tflops, gb_per_s) => Some(Peak {
            tflops: tflops.or(known.as_ref().map(|peak| peak.tflops))?,
            gb_per_s: gb_per_s.or(known.as_ref().map(|peak| peak.gb_per_s))?,
            source: "given on the command line".into(),
        }),
    }
}

fn measure(config: &GpuBenchConfig, name: &str, model: &Path) -> Result<Measured, BenchError> {
    let figures_config = FiguresConfig {
        model: model.to_owned(),
        device: config.device.to_string(),
        dtype: config.dtype.to_string(),
        plain_decoding: config.plain_decoding,
        workload: config.workload.clone(),
    };
    let model_config = figures_config.model_config()?;
    let what = format!("measuring {}", model.display());
    let told = serde_json::to_string(&figures_config).map_err(|e| BenchError::worker(&what, e))?;
    let figures = printed(&config.program, &["gpu-figures", &told], &what)?;
    let (peers, left_out) = rows::peers(config, name, model);
    Ok(Measured { name: name.to_owned(), model_config, figures, peers, left_out })
}

/// MB of the all-reduced vectors: about the gradients of the shapes' adapters at rank 16, and one that shows bandwidth.
const ALL_REDUCED_MB: [u64; 3] = [64, 175, 1024];

/// Both reductions over NCCL, a process for each GPU of this machine; or why this machine has nothing to measure. The outer
/// error is one of the measurement.
fn over_all_gpus(config: &GpuBenchConfig) -> Result<Result<Vec<AllReduceResult>, String>, String> {
    if !matches!(config.device, DeviceChoice::Cuda(_)) {
        return Ok(Err("no GPU computes".into()));
    }
    let gpus = nvidia::gpus().map_err(|why| why.to_string())?.len() as u32;
    if gpus < 2 {
        return Ok(Err(format!("takes two GPUs; {gpus} here")));
    }
    let config = AllReduceConfig {
        program: config.program.clone(),
        megabytes: ALL_REDUCED_MB.to_vec(),
        processes: vec![gpus],
        carriers: vec![Carrier::SharedMemory, Carrier::Nccl, Carrier::NcclFast],
        repeats: config.workload.repeats,
        python: None,
    };
    all_reduce(&config, |_| {}).map(|report| Ok(report.results)).map_err(|why| why.to_string())
}

/// Where random models are.
enum Models {
    /// Left there, for the next time.
    Kept(PathBuf),
    Temporary(TemporaryFolder),
}

impl Models {
    fn new(given: Option<&Path>) -> Self {
        given.map_or_else(|| Self::Temporary(TemporaryFolder::new("gpu")), |path| Self::Kept(path.to_owned()))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// The path of a model; one of a shape is written unless an earlier run left it.
    fn model(&self, shape: Option<Shape>, path: PathBuf) -> Result<PathBuf, BenchError> {
        let Some(shape) = shape else { return Ok(path) };
        let directory = self.path().join(shape.to_string());
        if !directory.join(WHOLE).exists() {
            shape.write(&directory)?;
            let marked = fs::write(directory.join(WHOLE), []);
            let what = || format!("writing into {}", directory.display());
            marked.map_err(|source| BenchError::File { what: what(), source })?;
        }
        Ok(directory)
    }

    /// Gives the disk back: the next model may be as large.
    fn clear(&self, name: &str) {
        if let Self::Temporary(folder) = self {
            let _ = fs::remove_dir_all(folder.path().join(name));
        }
    }
}

/// Stands in the directory of a random model that was written to its end.
const WHOLE: &str = "random-weights";

/// A share of a limit, in percent.
fn percent(part: f64, whole: f64) -> f64 {
    round(100.0 * part / whole, 1)
}

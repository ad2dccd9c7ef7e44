//! A cluster inside this process, and what is measured through a client of it: every figure holds the
//! coordinator, the journal and the messages, and the process's memory is that of all of it.

use std::path::{Path, PathBuf};

use futures::executor::block_on;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::{BenchError, Machine, folder::TemporaryFolder};
use crate::{
    client::ServiceClient,
    kernels,
    model::{ComputeOptions, ModelConfig, ModelSource},
    service::{Cluster, ClusterConfig},
    types::ModelInput,
};

/// The model that is measured, and with what.
#[derive(Debug, Clone)]
pub struct Subject {
    /// A Hugging Face directory or a GGUF file.
    pub model: PathBuf,
    pub threads: usize,
    pub compute: ComputeOptions,
    /// Of each figure, after one that is not counted.
    pub repeats: u32,
}

/// A running cluster; its data goes with it.
pub(super) struct Local {
    pub service: ServiceClient,
    /// The name under which it serves the model.
    pub model: String,
    pub vocabulary: u32,
    /// What its node computes on.
    pub engine: String,
    /// As it was before the start, for its figures to stand beside; with the GPU, if one computes.
    pub machine: Machine,
    // In this order: the cluster ends before its folder does.
    _cluster: Cluster,
    _data: TemporaryFolder,
}

impl Local {
    /// Starts `trainers` ranks and `samplers` replicas on one node.
    pub fn start(subject: &Subject, trainers: u32, samplers: u32) -> Result<Self, BenchError> {
        if subject.repeats == 0 {
            return Err(BenchError::Refused {
                flag: "--repeats",
                problem: "a median takes at least one".into(),
            });
        }
        let machine = Machine::here();
        let (source, config) = checked(&subject.model)?;
        let data = TemporaryFolder::new("data");
        let model = source.name.clone();
        let cluster = Cluster::local(ClusterConfig {
            data_dir: data.path().to_owned(),
            models: vec![source],
            nodes: 1,
            trainers,
            samplers,
            threads: subject.threads,
            compute: subject.compute,
        })?;
        let service = ServiceClient::connect_blocking(cluster.connector())?;
        let engine = engine(&service, subject)?;
        // What a CPU's node says names the bits, which several kernel paths share.
        let machine = match engine == kernels::numerics(subject.compute.dtype) {
            true => machine,
            false => machine.computing_on(&engine),
        };
        let vocabulary = config.vocab_size as u32;
        Ok(Self { service, model, vocabulary, engine, machine, _cluster: cluster, _data: data })
    }

    /// Random ordinary tokens: speed is measured, not learning. The first hundred ids are left to what
    /// models keep for themselves.
    pub fn tokens(&self, seed: u64, length: usize) -> ModelInput {
        ModelInput::from_ints(self.token_ids(seed, length))
    }

    /// The same as ids.
    pub fn token_ids(&self, seed: u64, length: usize) -> Vec<u32> {
        random_tokens(self.vocabulary, seed, length)
    }
}

/// What the only node says of itself, between its build and its dtype.
fn engine(service: &ServiceClient, subject: &Subject) -> Result<String, BenchError> {
    let status = block_on(service.cluster_status())?;
    let numerics = status.nodes.first().map(|node| node.numerics.clone()).unwrap_or_default();
    let [before, behind] = [format!("{} ", env!("CARGO_PKG_VERSION")), format!(" {}", subject.compute.dtype)];
    let engine = numerics.strip_prefix(&before).and_then(|rest| rest.strip_suffix(&behind));
    Ok(engine.unwrap_or(&numerics).to_owned())
}

/// A model by its path, and its configuration, if its files are whole.
pub(super) fn checked(path: &Path) -> Result<(ModelSource, ModelConfig), BenchError> {
    let source = source(path)?;
    let config =
        source.check().map_err(|e| BenchError::Refused { flag: "--model", problem: e.to_string() })?;
    Ok((source, config))
}

/// Random ordinary tokens of a vocabulary.
pub(super) fn random_tokens(vocabulary: u32, seed: u64, length: usize) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let first = 100.min(vocabulary / 2);
    (0..length).map(|_| first + random.next_u32() % (vocabulary - first)).collect()
}

/// A model's source by its path, under a name that the path gives.
pub(super) fn source(path: &Path) -> Result<ModelSource, BenchError> {
    let refused = |problem: String| BenchError::Refused { flag: "--model", problem };
    if !path.exists() {
        return Err(refused(format!("there is nothing at {}", path.display())));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect();
    Ok(ModelSource::new(&format!("bench/{plain}"), path))
}

/// Most memory that this process has had, in MiB.
pub(super) fn peak_rss_mib() -> u64 {
    // SAFETY: all zeros is a valid value of this plain structure, and the call only writes it.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    // Linux counts in KiB.
    usage.ru_maxrss as u64 / 1024
}

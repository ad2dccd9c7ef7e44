//! The models that a process serves: described at once, loaded when first asked for.

#[cfg(test)]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    BaseModel, ComputeOptions, Footprint, GpuFootprint, KvCache, ModelConfig, ModelError, ModelSource, Place,
    TextCodec,
    device::{DeviceCache, DeviceModel},
    digest_cache::DigestCache,
    files::{ModelFiles, Stamp},
    pack::{PackCache, Wanted},
    weights::base_digest,
};
use crate::{
    gpu::{DeviceChoice, Gpu, GpuError},
    kernels::{self, MatrixForm},
    types::Digest,
};

/// The base models of a process: each is loaded once, when first asked for, and shared.
pub struct Library {
    options: ComputeOptions,
    /// The GPU on which the models are, if it isn't the CPU.
    gpu: Option<Gpu>,
    /// Where packed weights are; absent: each load has memory of its own.
    packs: Option<PackCache>,
    models: Vec<Entry>,
    /// Names and aliases, in lower case.
    by_name: HashMap<String, usize>,
}

struct Entry {
    source: ModelSource,
    digest: Digest,
    files: ModelFiles,
    stamps: Vec<Stamp>,
    /// Of the loaded weights.
    weight_bytes: u64,
    /// What they are held as.
    weight_forms: Vec<Option<MatrixForm>>,
    /// Held while loading, so that whoever comes meanwhile waits for the one load.
    loaded: Mutex<Option<Arc<BaseModel>>>,
    #[cfg(test)]
    loads: AtomicUsize,
}

impl Library {
    /// Reads each model's configuration and digest, not its weights into memory: hashing takes
    /// about a second for each GB.
    pub fn open(sources: Vec<ModelSource>, options: ComputeOptions) -> Result<Self, ModelError> {
        Self::open_with(sources, options, DigestCache::none(), None)
    }

    /// The same with a directory (made if absent) in which digests are remembered, so that files
    /// which haven't changed since aren't hashed again, and weights are packed, so that all
    /// libraries over it share them.
    pub fn open_cached(
        sources: Vec<ModelSource>,
        options: ComputeOptions,
        cache: &Path,
    ) -> Result<Self, ModelError> {
        let packs = PackCache::in_directory(cache);
        Self::open_with(sources, options, DigestCache::in_directory(cache), Some(packs))
    }

    fn open_with(
        sources: Vec<ModelSource>,
        options: ComputeOptions,
        cache: DigestCache,
        packs: Option<PackCache>,
    ) -> Result<Self, ModelError> {
        let mut gpu = open_gpu(options.device).map_err(ModelError::Gpu)?;
        let mut opened = Vec::with_capacity(sources.len());
        for source in sources {
            let files = ModelFiles::open(&source.path)?;
            gpu = suited(gpu, options.device, &source.name, &files.config)?;
            opened.push((source, files));
        }
        if let Some(gpu) = &gpu {
            tracing::info!(gpu = gpu.name(), "computing on a GPU");
        }
        let mut library = Self { options, gpu, packs, models: Vec::new(), by_name: HashMap::new() };
        for (source, files) in opened {
            library.claim_names(&source)?;
            // Taken before hashing: a change in between is then seen at the load.
            let stamps = files.stamps()?;
            let digest = match cache.get(&stamps) {
                Some(digest) => digest,
                None => {
                    let digest = files.digest()?;
                    cache.put(&stamps, digest);
                    digest
                }
            };
            library.models.push(Entry {
                source,
                digest: base_digest(digest, options.dtype),
                weight_bytes: files.weight_bytes(options.dtype)?,
                weight_forms: files.weight_forms(options.dtype)?,
                files,
                stamps,
                loaded: Mutex::default(),
                #[cfg(test)]
                loads: AtomicUsize::new(0),
            });
        }
        Ok(library)
    }

    /// Names offered, with their sources, configurations and digests.
    pub fn offers(&self) -> Vec<(ModelSource, ModelConfig, Digest)> {
        let offer = |entry: &Entry| (entry.source.clone(), entry.files.config.clone(), entry.digest);
        self.models.iter().map(offer).collect()
    }

    /// What a model of [`offers`](Self::offers) and its runs take of memory.
    pub fn footprint(&self, name: &str) -> Result<Footprint, ModelError> {
        let entry = self.entry(name)?;
        let footprint =
            Footprint { weights: entry.weight_bytes, ..entry.files.config.footprint(&self.options) };
        Ok(if self.gpu.is_some() { footprint.beside_a_gpu() } else { footprint })
    }

    /// What it and its runs take of the GPU's memory, if it is on one.
    pub fn gpu_footprint(&self, name: &str) -> Result<Option<GpuFootprint>, ModelError> {
        let config = &self.entry(name)?.files.config;
        Ok(self.gpu.as_ref().map(|_| config.gpu_footprint(&self.options)))
    }

    /// Bytes of keys and values of one position of a model of this shape, over all layers, and how many positions are
    /// allocated together.
    pub fn cache_shape(&self, config: &ModelConfig) -> (usize, usize) {
        match &self.gpu {
            None => (KvCache::bytes_per_position(config), KvCache::BLOCK),
            Some(_) => (DeviceCache::bytes_per_position(config, self.options.dtype), DeviceCache::PAGE),
        }
    }

    /// The model of this name or alias; loads it (blocking, seconds) when nobody has yet.
    ///
    /// Callers that come while it loads wait for that load. A load that fails is tried again by
    /// the next caller.
    pub fn load(&self, name: &str) -> Result<Arc<BaseModel>, ModelError> {
        let entry = self.entry(name)?;
        // A load that panicked left nothing behind: the slot is filled last.
        let mut loaded = entry.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = &*loaded {
            return Ok(model.clone());
        }
        entry.files.check_unchanged(&entry.stamps)?;
        let model = Arc::new(BaseModel {
            name: entry.source.name.clone(),
            config: entry.files.config.clone(),
            place: self.place(entry)?,
            text: entry.files.text.clone(),
            digest: entry.digest,
        });
        *loaded = Some(model.clone());
        #[cfg(test)]
        entry.loads.fetch_add(1, Ordering::Relaxed);
        Ok(model)
    }

    /// Loads a model's weights to where they are computed with.
    fn place(&self, entry: &Entry) -> Result<Place, ModelError> {
        let dtype = self.options.dtype;
        let Some(gpu) = &self.gpu else {
            let Some(packs) = &self.packs else {
                return Ok(Place::Cpu(entry.files.load_unchanged(dtype, &entry.stamps)?));
            };
            let path = &entry.source.path;
            let source = &fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            let (files, stamps, forms, digest) =
                (&entry.files, &entry.stamps[..], &entry.weight_forms[..], entry.digest);
            let wanted = Wanted { files, stamps, source, dtype, digest, forms };
            return Ok(Place::Cpu(packs.load(&wanted)?));
        };
        let weights = entry.files.load_unchanged(dtype, &entry.stamps)?;
        let _turn = gpu.turn();
        let model = DeviceModel::new(gpu, &entry.files.config, &weights).map_err(ModelError::Gpu)?;
        let model = if self.options.plain_decoding { model.with_plain_decoding() } else { model };
        Ok(Place::Gpu(Box::new(model)))
    }

    /// What computes: the kernel path of the CPU, or the GPU. Ranks of a run share it, as only the same
    /// gives the same bits.
    pub fn engine(&self) -> &str {
        match &self.gpu {
            None => kernels::numerics(self.options.dtype),
            Some(gpu) => gpu.engine(),
        }
    }

    /// The GPU that computes, if one does.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_ref()
    }

    /// How the models are computed.
    pub fn options(&self) -> ComputeOptions {
        self.options
    }

    /// How often weights were read into memory, of all models.
    #[cfg(test)]
    pub(crate) fn loads(&self) -> usize {
        self.models.iter().map(|entry| entry.loads.load(Ordering::Relaxed)).sum()
    }

    /// Tokenizer and chat template of a model, without its weights.
    pub fn text(&self, name: &str) -> Result<Arc<TextCodec>, ModelError> {
        Ok(self.entry(name)?.files.text.clone())
    }

    fn entry(&self, name: &str) -> Result<&Entry, ModelError> {
        let unknown = || ModelError::Unknown { name: name.to_owned(), offered: self.offered() };
        self.by_name.get(&name.to_lowercase()).map(|&index| &self.models[index]).ok_or_else(unknown)
    }

    fn offered(&self) -> String {
        match self.models.is_empty() {
            true => "none".to_owned(),
            false => {
                self.models.iter().map(|entry| entry.source.name.as_str()).collect::<Vec<_>>().join(", ")
            }
        }
    }

    fn claim_names(&mut self, source: &ModelSource) -> Result<(), ModelError> {
        let index = self.models.len();
        for name in std::iter::once(&source.name).chain(&source.aliases) {
            let other = self.by_name.insert(name.to_lowercase(), index);
            if let Some(other) = other.filter(|&other| other != index) {
                let first = self.models[other].source.path.clone();
                return Err(ModelError::NameTaken { name: name.clone(), first, second: source.path.clone() });
            }
        }
        Ok(())
    }
}

/// The GPU that is asked for; with `auto` none, if there is none.
fn open_gpu(device: DeviceChoice) -> Result<Option<Gpu>, GpuError> {
    let gpu = match device {
        DeviceChoice::Cpu => return Ok(None),
        DeviceChoice::Emulated => Gpu::emulated()?,
        DeviceChoice::Cuda(ordinal) => Gpu::cuda(ordinal)?,
        DeviceChoice::Auto => match Gpu::cuda(0) {
            Ok(gpu) => gpu,
            Err(error) => {
                tracing::warn!("computing on the CPU: {error}");
                return Ok(None);
            }
        },
    };
    Ok(Some(gpu))
}

/// The GPU, if its kernels cover this model; where the choice was left to us, none if they don't. All models of a
/// process are in one place.
fn suited(
    gpu: Option<Gpu>,
    device: DeviceChoice,
    name: &str,
    config: &ModelConfig,
) -> Result<Option<Gpu>, ModelError> {
    match gpu.as_ref().map_or(Ok(()), |_| DeviceModel::check(config)) {
        Ok(()) => Ok(gpu),
        Err(source) if device == DeviceChoice::Auto => {
            tracing::warn!("computing on the CPU: `{name}`: {source}");
            Ok(None)
        }
        Err(source) => Err(ModelError::OnGpu { name: name.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::WeightDtype,
        model::{ChatMessage, ExpertsConfig, Family, tiny},
    };

    fn tiny_source(directory: &Path) -> ModelSource {
        tiny::write(directory, &tiny::config(), 7).unwrap();
        ModelSource { aliases: vec!["tiny".to_owned()], ..ModelSource::new("org/Tiny", directory) }
    }

    #[test]
    fn loads_a_model_once_and_shares_it() {
        let directory = tempfile::tempdir().unwrap();
        let library = Library::open(vec![tiny_source(directory.path())], ComputeOptions::default()).unwrap();
        let models: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| library.load("tiny").unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(models.iter().all(|model| Arc::ptr_eq(model, &models[0])));
        assert_eq!(library.loads(), 1);
        let model = library.load("ORG/tiny").unwrap();
        assert!(Arc::ptr_eq(&model, &models[0]), "alias and name are one model");

        assert_eq!(model.name, "org/Tiny");
        assert_eq!(model.config, tiny::config());
        assert_eq!(model.digest, library.offers()[0].2);
        assert_eq!(model.digest, BaseModel::load("other", directory.path()).unwrap().digest);
        assert!(model.weights().embed.shares_storage(&model.weights().head), "a tied head is shared");
        assert_eq!(model.weights().layers.len(), 2);
        assert_eq!(model.weights().layers[1].o.in_features(), 32);
    }

    /// Other weights are another model: nothing of one may pass for the other's.
    #[test]
    fn holds_weights_in_half_the_memory_under_a_digest_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let [whole, half] = [WeightDtype::F32, WeightDtype::Bf16].map(|dtype| {
            let library = Library::open(
                vec![tiny_source(directory.path())],
                ComputeOptions { dtype, ..ComputeOptions::default() },
            )
            .unwrap();
            let model = library.load("tiny").unwrap();
            assert_eq!(model.digest, library.offers()[0].2);
            assert_eq!(model.digest, BaseModel::load_as(dtype, "tiny", directory.path()).unwrap().digest);
            assert!(model.weights().embed.shares_storage(&model.weights().head), "a tied head is shared");
            model
        });
        assert_ne!(whole.digest, half.digest);
        assert_eq!(whole.digest, ModelFiles::open(directory.path()).unwrap().digest().unwrap());
        let [whole, half] = [whole, half].map(|model| model.weights().layers[1].o.bytes());
        assert_eq!((whole, half), (4 * 32 * 32, 2 * 32 * 32));
    }

    #[test]
    fn a_mixture_is_left_to_the_cpu_where_the_choice_is_ours_and_refused_by_name_where_not() {
        let experts = ExpertsConfig {
            count: 4,
            per_row: 2,
            intermediate_size: 16,
            normalises: true,
            dense_layers: Vec::new(),
        };
        let mixture = ModelConfig { family: Family::Qwen3Moe, experts: Some(experts), ..tiny::config() };
        let dense = tiny::config();
        let on = |device, config| suited(Some(Gpu::emulated().unwrap()), device, "org/Model", config);
        assert!(on(DeviceChoice::Auto, &mixture).unwrap().is_none());
        assert!(on(DeviceChoice::Auto, &dense).unwrap().is_some());
        assert!(suited(None, DeviceChoice::Cpu, "org/Model", &mixture).unwrap().is_none());
        let error = on(DeviceChoice::Cuda(0), &mixture).err().unwrap().to_string();
        assert!(
            error.starts_with("`org/Model`: `num_experts` is set; mixtures of experts run with"),
            "{error}"
        );

        let directory = tempfile::tempdir().unwrap();
        tiny::write(directory.path(), &mixture, 7).unwrap();
        let open = |device| {
            let options = ComputeOptions { device, ..ComputeOptions::default() };
            Library::open(vec![ModelSource::new("org/Mixture", directory.path())], options)
        };
        let error = open(DeviceChoice::Emulated).err().unwrap().to_string();
        assert!(error.starts_with("`org/Mixture`: `num_experts`"), "{error}");
        assert_eq!(open(DeviceChoice::Cpu).unwrap().engine(), kernels::numerics(WeightDtype::F32));
    }

    #[test]
    fn hands_out_text_without_loading() {
        let directory = tempfile::tempdir().unwrap();
        let library = Library::open(vec![tiny_source(directory.path())], ComputeOptions::default()).unwrap();
        let text = library.text("tiny").unwrap();
        let user = ChatMessage { role: "user".to_owned(), content: "Hi".to_owned() };
        let prompt = text.apply_chat_template(&[user], true).unwrap();
        assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        let tokens = text.encode(&prompt).unwrap();
        assert_eq!(tokens[0], 1);
        assert_eq!(text.decode(&tokens, false), prompt);
        assert!(library.models[0].loaded.lock().unwrap().is_none());
    }

    #[test]
    fn refuses_an_unknown_name_and_says_what_is_offered() {
        let directory = tempfile::tempdir().unwrap();
        let library = Library::open(vec![tiny_source(directory.path())], ComputeOptions::default()).unwrap();
        let error = library.load("gpt-5").err().unwrap();
        assert_eq!(error, ModelError::Unknown { name: "gpt-5".to_owned(), offered: "org/Tiny".to_owned() });
        assert_eq!(error.to_string(), "no model `gpt-5` is served here; offered: org/Tiny");
    }

    #[test]
    fn remembers_digests_of_unchanged_files() {
        let [model, cache] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let source = tiny_source(model.path());
        let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        let age = |file: &str| {
            let file = std::fs::File::options().append(true).open(model.path().join(file)).unwrap();
            file.set_modified(hour_ago).unwrap();
        };
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
            age(file);
        }
        let digest = |cached: bool| {
            let library = match cached {
                true => Library::open_cached(vec![source.clone()], ComputeOptions::default(), cache.path()),
                false => Library::open(vec![source.clone()], ComputeOptions::default()),
            };
            library.unwrap().offers()[0].2
        };
        let first = digest(true);
        assert_eq!(first, digest(false));

        // A write that shows in neither size nor time is the one thing the cache can't see: that
        // it doesn't shows that it was asked.
        let config = model.path().join("config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text.replace("10000.0", "10001.0")).unwrap();
        age("config.json");
        assert_eq!(digest(true), first);
        let second = digest(false);
        assert_ne!(second, first);
        std::fs::write(&config, text.replace("10000.0", "123456.0")).unwrap();
        age("config.json");
        assert_ne!(digest(true), first, "another size shows");
    }

    #[test]
    fn refuses_two_models_of_one_name() {
        let [one, two] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let error =
            Library::open(vec![tiny_source(one.path()), tiny_source(two.path())], ComputeOptions::default())
                .err()
                .unwrap();
        assert!(matches!(error, ModelError::NameTaken { name, .. } if name == "org/Tiny"));
    }

    #[test]
    fn refuses_files_that_changed_after_the_digest_was_taken() {
        let directory = tempfile::tempdir().unwrap();
        let library = Library::open(vec![tiny_source(directory.path())], ComputeOptions::default()).unwrap();
        let mut other = tiny::config();
        other.rope_theta = 1_234_567.0;
        tiny::write(directory.path(), &other, 7).unwrap();
        let error = library.load("tiny").err().unwrap();
        assert!(matches!(error, ModelError::Changed { .. }), "{error}");
    }

    /// To another model, whose files have the sizes and times of this one's.
    #[test]
    fn refuses_files_when_a_link_has_come_to_lead_elsewhere() {
        let [here, elsewhere, links] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let link = links.path().join("model");
        let time = std::time::SystemTime::now();
        for (model, seed) in [(&here, 7), (&elsewhere, 8)] {
            tiny::write(model.path(), &tiny::config(), seed).unwrap();
            for file in std::fs::read_dir(model.path()).unwrap() {
                let file = std::fs::File::options().append(true).open(file.unwrap().path()).unwrap();
                file.set_modified(time).unwrap();
            }
        }
        std::os::unix::fs::symlink(here.path(), &link).unwrap();
        let source = ModelSource { aliases: vec!["tiny".to_owned()], ..ModelSource::new("org/Tiny", &link) };
        let library = Library::open(vec![source], ComputeOptions::default()).unwrap();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), &link).unwrap();
        let error = library.load("tiny").err().unwrap();
        assert!(matches!(error, ModelError::Changed { .. }), "{error}");
    }
}

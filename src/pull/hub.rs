//! Models of the Hugging Face hub, or of a mirror that `HF_ENDPOINT` names: configuration,
//! tokenizer and safetensors, nothing else of the repository.
//!
//! Files are downloaded into hf-hub's own cache layout below the models' directory, where an
//! interrupted download goes on when it is tried again, and move from there into the model's.

use std::{
    fs,
    path::{Path, PathBuf},
};

use hf_hub::{
    Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError, ApiRepo},
};

use super::{
    Progress, PullError, at, entries,
    stage::{Stage, digest_of},
};
use crate::model::{ModelConfig, ModelSource, shards_of_index};

/// Directory of the models that came from the hub, `ORG/NAME` below it.
const DIRECTORY: &str = "hf";
/// hf-hub's cache, with what has arrived of models that aren't whole yet.
const CACHE: &str = ".partial-hf";

/// Attempts to go on with one file, after a pause of up to a second each.
const RETRIES: usize = 5;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const OPTIONAL: [&str; 3] = ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"];

pub(super) fn installed(models: &Path) -> Vec<ModelSource> {
    let organisations = entries(&models.join(DIRECTORY));
    let directories = organisations.iter().flat_map(|organisation| entries(organisation));
    let whole = directories.filter(|directory| directory.join(CONFIG).exists());
    whole.filter_map(|directory| Some(ModelSource::new(&repository_at(&directory)?, directory))).collect()
}

/// Fetches `ORG/NAME` from `endpoint`, or from where hf-hub's environment says.
pub(super) fn fetch(
    repository: &str,
    models: &Path,
    progress: &Progress,
    endpoint: Option<&str>,
) -> Result<ModelSource, PullError> {
    check_name(repository)?;
    let target = models.join(DIRECTORY).join(repository);
    if target.join(CONFIG).exists() {
        return Ok(ModelSource::new(repository, target));
    }
    let download = Download::open(repository, models, progress, endpoint)?;
    let files = download.all()?;
    let stage = Stage::new(models, &repository.replace('/', "--"))?;
    let staged = stage.path().join("model");
    fs::create_dir(&staged).map_err(at(&staged))?;
    for (name, path) in files {
        let staged = staged.join(name);
        // The cache keeps its own name for the file until the model is installed.
        fs::hard_link(&path, &staged).map_err(at(&staged))?;
    }
    ModelSource::new(repository, &staged).check()?;
    stage.install("model", &target)?;
    download.forget();
    Ok(ModelSource::new(repository, target))
}

/// `ORG/NAME`: two plain directory names.
fn check_name(repository: &str) -> Result<(), PullError> {
    let plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        (1..=96).contains(&part.len()) && part.chars().all(allowed) && !part.starts_with('.')
    };
    match repository.split_once('/') {
        Some((organisation, name)) if plain(organisation) && plain(name) => Ok(()),
        _ => Err(PullError::UnknownName { name: format!("hf:{repository}") }),
    }
}

fn repository_at(directory: &Path) -> Option<String> {
    let name = directory.file_name()?.to_str()?;
    let organisation = directory.parent()?.file_name()?.to_str()?;
    Some(format!("{organisation}/{name}"))
}

/// Which files of a repository make a model, before the weights are known.
#[derive(Debug, PartialEq)]
struct Selection {
    small: Vec<&'static str>,
    /// One file of weights, or the index of many.
    weights: &'static str,
}

fn select<'a>(files: impl Iterator<Item = &'a str>) -> Result<Selection, String> {
    let files: Vec<&str> = files.collect();
    let has = |file: &str| files.contains(&file);
    let weights = match (has(WEIGHTS), has(INDEX)) {
        (true, _) => WEIGHTS,
        (false, true) => INDEX,
        (false, false) if files.iter().any(|file| file.ends_with(".gguf")) => {
            let problem = "holds GGUF files only; download one and serve it with --model NAME=PATH";
            return Err(problem.to_owned());
        }
        (false, false) => return Err(format!("holds neither {WEIGHTS} nor {INDEX}")),
    };
    if let Some(missing) = [CONFIG, TOKENIZER].into_iter().find(|file| !has(file)) {
        return Err(format!("holds no {missing}"));
    }
    let small = [CONFIG, TOKENIZER].into_iter().chain(OPTIONAL.into_iter().filter(|file| has(file)));
    Ok(Selection { small: small.collect(), weights })
}

struct Download {
    cache: hf_hub::CacheRepo,
    api: Api,
    /// At one commit, so that files of two never mix.
    repo: ApiRepo,
    repository: String,
    commit: String,
    selection: Selection,
    progress: Progress,
}

impl Download {
    /// Asks what the repository holds.
    fn open(
        repository: &str,
        models: &Path,
        progress: &Progress,
        endpoint: Option<&str>,
    ) -> Result<Self, PullError> {
        let cache = models.join(CACHE);
        let mut builder = ApiBuilder::from_env().with_cache_dir(cache.clone()).with_retries(RETRIES);
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint.to_owned()).with_token(None);
        }
        let failed = |error| hub_error(repository, "its list of files", error);
        let api = builder.build().map_err(failed)?;
        let info = api.model(repository.to_owned()).info().map_err(failed)?;
        check_tag(repository, &info.sha)?;
        let selection = select(info.siblings.iter().map(|file| file.rfilename.as_str()))
            .map_err(|problem| PullError::Repository { repository: repository.to_owned(), problem })?;
        let at_commit = Repo::with_revision(repository.to_owned(), RepoType::Model, info.sha.clone());
        Ok(Self {
            cache: hf_hub::Cache::new(cache).repo(at_commit.clone()),
            repo: api.repo(at_commit),
            api,
            repository: repository.to_owned(),
            commit: info.sha,
            selection,
            progress: *progress,
        })
    }

    /// Downloads what makes the model: names, and paths in the cache.
    fn all(&self) -> Result<Vec<(String, PathBuf)>, PullError> {
        let mut files = Vec::new();
        for &name in &self.selection.small {
            let path = self.file(name)?;
            if name == CONFIG {
                // Before gigabytes: can it be computed here at all?
                ModelConfig::read(&path)?;
            }
            files.push((name.to_owned(), path));
        }
        let weights = self.file(self.selection.weights)?;
        if self.selection.weights == INDEX {
            for shard in shards_of_index(&weights)? {
                let path = self.file(&shard)?;
                files.push((shard, path));
            }
        }
        files.push((self.selection.weights.to_owned(), weights));
        Ok(files)
    }

    /// One file, from the cache if it is whole there.
    fn file(&self, name: &str) -> Result<PathBuf, PullError> {
        let pointer = self.cache.pointer_path(&self.commit).join(name);
        if !pointer.exists() {
            // A link to a file that was found damaged and removed.
            let _ = fs::remove_file(&pointer);
            self.download(name)?;
        }
        let blob = fs::canonicalize(&pointer).map_err(at(&pointer))?;
        self.check_blob(name, &blob)?;
        Ok(blob)
    }

    fn download(&self, name: &str) -> Result<(), PullError> {
        let failed = |error| hub_error(&self.repository, name, error);
        let metadata = self.api.metadata(&self.repo.url(name)).map_err(failed)?;
        check_tag(&self.repository, metadata.etag())?;
        check_tag(&self.repository, metadata.commit_hash())?;
        if metadata.commit_hash() != self.commit {
            let problem =
                format!("{name} came from the commit {} instead of {}", metadata.commit_hash(), self.commit);
            return Err(PullError::Hub { repository: self.repository.clone(), problem });
        }
        self.repo.download_with_progress(name, self.progress.download()).map_err(failed)?;
        Ok(())
    }

    /// The hub names large files by their SHA-256; others by git's hash of them.
    fn check_blob(&self, name: &str, blob: &Path) -> Result<(), PullError> {
        let tag = blob.file_name().unwrap_or_default().to_string_lossy();
        if tag.len() != 64 || !tag.chars().all(|c| c.is_ascii_hexdigit()) {
            return Ok(());
        }
        let found = digest_of(blob)?.to_string();
        if found == tag.to_ascii_lowercase() {
            return Ok(());
        }
        fs::remove_file(blob).map_err(at(blob))?;
        Err(PullError::Digest { file: name.to_owned(), expected: tag.into_owned(), found })
    }

    /// Removes the cache of a model that is installed.
    fn forget(self) {
        let snapshots = self.cache.pointer_path(&self.commit);
        if let Some(folder) = snapshots.parent().and_then(Path::parent) {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// Refuses tags (of files and commits) that aren't plain file names: hf-hub makes paths of them.
fn check_tag(repository: &str, tag: &str) -> Result<(), PullError> {
    let plain = !tag.is_empty() && tag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    let odd = || PullError::Hub {
        repository: repository.to_owned(),
        problem: format!("the hub answered with the odd tag {tag:?}"),
    };
    plain.then_some(()).ok_or_else(odd)
}

fn hub_error(repository: &str, file: &str, error: ApiError) -> PullError {
    PullError::Hub { repository: repository.to_owned(), problem: format!("{file}: {error}") }
}

#[cfg(test)]
mod tests;

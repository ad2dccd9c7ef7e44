use std::path::{Path, PathBuf};

use super::{ModelConfig, ModelError, files::ModelFiles};

/// Longest name of a model, in bytes.
const MAX_NAME_BYTES: usize = 128;

/// Models that are known by more than one name: the one that their users' tokenizers know, and
/// the others.
const WELL_KNOWN: &[(&str, &[&str])] =
    &[("HuggingFaceTB/SmolLM2-135M-Instruct", &["smollm2-135m", "SmolLM2-135M-Instruct"])];

/// A model on disk under the name it is served by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSource {
    pub name: String,
    pub aliases: Vec<String>,
    /// A Hugging Face directory or a GGUF file.
    pub path: PathBuf,
}

impl ModelSource {
    /// A model called `name`; if that is one name of a well-known model, under all of them.
    pub fn new(name: &str, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let is_it = |known: &str| known.eq_ignore_ascii_case(name);
        match WELL_KNOWN
            .iter()
            .find(|(known, aliases)| is_it(known) || aliases.iter().any(|alias| is_it(alias)))
        {
            Some((known, aliases)) => Self {
                name: known.to_string(),
                aliases: aliases.iter().map(|alias| alias.to_string()).collect(),
                path,
            },
            None => Self { name: name.to_owned(), aliases: Vec::new(), path },
        }
    }

    /// From `NAME=PATH`, or from `PATH` alone, which is called as its file or directory without
    /// `.gguf` and the quantisation (`SmolLM2-135M-Instruct.Q4_1.gguf` → `SmolLM2-135M-Instruct`).
    pub fn parse(given: &str) -> Result<Self, ModelError> {
        let wrong = |problem: String| ModelError::Source { given: given.to_owned(), problem };
        let (name, path) = match given.split_once('=') {
            Some((name, path)) => (name.to_owned(), path),
            None => (name_of(Path::new(given)), given),
        };
        if path.is_empty() {
            return Err(wrong("the path is empty".to_owned()));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(plain) {
            return Err(wrong(format!(
                "a name has 1 to {MAX_NAME_BYTES} letters, digits and . _ - / :, not {name:?}"
            )));
        }
        Ok(Self::new(&name, path))
    }

    /// Reads everything but the weights, and says what the model is: for a look before it is
    /// served.
    pub fn check(&self) -> Result<ModelConfig, ModelError> {
        Ok(ModelFiles::open(&self.path)?.config)
    }
}

/// What a file or directory is called without its endings.
fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(stem) = name.strip_suffix(".gguf") else { return name };
    let is_format = |ending: &str| {
        let ending = ending.to_ascii_uppercase();
        ending.starts_with('Q') || ["F32", "F16", "BF16"].contains(&ending.as_str())
    };
    match stem.rsplit_once('.') {
        Some((name, ending)) if is_format(ending) => name.to_owned(),
        _ => stem.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_names_and_paths() {
        let source = ModelSource::parse("org/My.Model-1=/models/a=b").unwrap();
        assert_eq!(source, ModelSource::new("org/My.Model-1", "/models/a=b"));
        assert_eq!(ModelSource::parse("models/tiny").unwrap().name, "tiny");
        assert_eq!(ModelSource::parse("x/Llama-3.2-1B.bf16.gguf").unwrap().name, "Llama-3.2-1B");
        assert_eq!(ModelSource::parse("x/Llama-3.2-1B.gguf").unwrap().name, "Llama-3.2-1B");
    }

    #[test]
    fn serves_a_well_known_model_under_all_its_names() {
        let path = "SmolLM2-135M-Instruct.Q4_1.gguf";
        for given in [
            path.to_owned(),
            format!("smollm2-135m={path}"),
            format!("huggingfacetb/smollm2-135m-instruct={path}"),
        ] {
            let source = ModelSource::parse(&given).unwrap();
            assert_eq!(source.name, "HuggingFaceTB/SmolLM2-135M-Instruct");
            assert_eq!(source.aliases, ["smollm2-135m", "SmolLM2-135M-Instruct"]);
            assert_eq!(source.path, Path::new(path));
        }
    }

    #[test]
    fn refuses_empty_and_odd_names() {
        for given in ["=path", "name=", "", "a b=path", "a\n=path", "x/..", &format!("{}=p", "n".repeat(129))]
        {
            let error = ModelSource::parse(given).unwrap_err();
            assert!(matches!(&error, ModelError::Source { .. }), "{given:?}: {error}");
        }
    }
}

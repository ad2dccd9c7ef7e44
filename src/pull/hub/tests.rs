//! The hub's side of the protocol, as far as hf-hub uses it, on loopback.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::*;
use crate::{model::tiny, types::Digest};

/// Serves one repository, `org/tiny`, and remembers what was asked.
struct Hub {
    endpoint: String,
    state: Arc<State>,
}

struct State {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Path and first byte of each download.
    downloads: Mutex<Vec<(String, usize)>>,
    /// Downloads of the weights that break off half-way before one goes through.
    breaks: AtomicUsize,
    etag: Mutex<Option<String>>,
}

impl Hub {
    fn serve(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            files: Mutex::new(files),
            downloads: Mutex::default(),
            breaks: AtomicUsize::new(0),
            etag: Mutex::default(),
        });
        let serving = state.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = serving.answer(stream.unwrap());
            }
        });
        Self { endpoint, state }
    }

    /// A tiny model, its weights in one file.
    fn tiny() -> Self {
        let directory = tempfile::tempdir().unwrap();
        tiny::write(directory.path(), &tiny::config(), 3).unwrap();
        let mut files = BTreeMap::from([("README.md".to_owned(), b"# Tiny".to_vec())]);
        for path in entries(directory.path()) {
            files.insert(path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap());
        }
        Self::serve(files)
    }

    fn fetch(&self, models: &Path) -> Result<ModelSource, PullError> {
        fetch("org/tiny", models, &Progress::silent(), Some(&self.endpoint))
    }

    fn downloads_of(&self, file: &str) -> Vec<usize> {
        let downloads = self.state.downloads.lock().unwrap();
        downloads.iter().filter(|(name, _)| name == file).map(|&(_, start)| start).collect()
    }
}

impl State {
    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().unwrap_or(Ok(String::new()))?;
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut range = None;
        for line in lines {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            range = line.strip_prefix("range: bytes=").map(str::to_owned).or(range);
        }
        let files = self.files.lock().unwrap().clone();
        if path == "/api/models/org/tiny/revision/main" {
            let siblings: Vec<_> =
                files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
            let info = serde_json::json!({ "siblings": siblings, "sha": "c0ffee" }).to_string();
            return write!(
                stream,
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{info}",
                info.len()
            );
        }
        let name = path.strip_prefix("/org/tiny/resolve/c0ffee/").unwrap_or_default();
        let Some(content) = files.get(name) else {
            return write!(
                stream,
                "HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            );
        };
        let range = range.unwrap_or_default();
        let (start, end) = range.split_once('-').unwrap_or_default();
        let start: usize = start.parse().unwrap_or(0);
        let end = end.parse().map_or(content.len(), |end: usize| end + 1);
        let etag = self.etag.lock().unwrap().clone().unwrap_or_else(|| Digest::of(content).to_string());
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nconnection: close\r\netag: \"{etag}\"\r\nx-repo-commit: c0ffee\r\n\
             content-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\n\r\n",
            end - start,
            end - 1,
            content.len(),
        )?;
        let mut body = &content[start..end];
        if range.ends_with('-') {
            self.downloads.lock().unwrap().push((name.to_owned(), start));
            let take_one = |left: usize| left.checked_sub(1);
            if name == WEIGHTS
                && self.breaks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take_one).is_ok()
            {
                body = &body[..body.len() / 2];
            }
        }
        stream.write_all(body)
    }
}

#[test]
fn fetches_a_model_once() {
    let (hub, models) = (Hub::tiny(), tempfile::tempdir().unwrap());
    let source = hub.fetch(models.path()).unwrap();
    assert_eq!(source, ModelSource::new("org/tiny", models.path().join("hf/org/tiny")));
    assert_eq!(source.check().unwrap(), tiny::config());
    assert_eq!(installed(models.path()), std::slice::from_ref(&source));
    assert_eq!(hub.downloads_of("README.md"), [0; 0], "only what makes the model is fetched");

    let asked = hub.state.downloads.lock().unwrap().len();
    assert_eq!(hub.fetch(models.path()).unwrap(), source);
    assert_eq!(hub.state.downloads.lock().unwrap().len(), asked, "it was there already");
    let left: Vec<_> = fs::read_dir(models.path().join(CACHE)).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn goes_on_where_a_download_broke_off() {
    let (hub, models) = (Hub::tiny(), tempfile::tempdir().unwrap());
    hub.state.breaks.store(1, Ordering::SeqCst);
    hub.fetch(models.path()).unwrap().check().unwrap();
    let half = hub.state.files.lock().unwrap()[WEIGHTS].len() / 2;
    assert_eq!(hub.downloads_of(WEIGHTS), [0, half]);
}

#[test]
fn goes_on_where_an_earlier_process_left_off() {
    let (hub, models) = (Hub::tiny(), tempfile::tempdir().unwrap());
    let whole = hub.state.files.lock().unwrap()[WEIGHTS].clone();
    let blobs = models.path().join(CACHE).join("models--org--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.part", Digest::of(&whole))), &whole[..1000]).unwrap();
    hub.fetch(models.path()).unwrap().check().unwrap();
    assert_eq!(hub.downloads_of(WEIGHTS), [1000]);
}

#[test]
fn fetches_the_shards_that_the_index_lists() {
    let hub = Hub::tiny();
    let mut files = hub.state.files.lock().unwrap().clone();
    let weights = files.remove(WEIGHTS).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&weights).unwrap();
    let shard = "model-00001-of-00001.safetensors";
    let weight_map: BTreeMap<_, _> = header.tensors().into_keys().map(|tensor| (tensor, shard)).collect();
    files.insert(shard.to_owned(), weights);
    files.insert("model-00002-of-00002.safetensors".to_owned(), b"of another index".to_vec());
    let index = |map: serde_json::Value| serde_json::json!({ "weight_map": map }).to_string().into_bytes();
    files.insert(INDEX.to_owned(), index(serde_json::json!(weight_map)));
    *hub.state.files.lock().unwrap() = files;
    let models = tempfile::tempdir().unwrap();
    hub.fetch(models.path()).unwrap().check().unwrap();
    assert_eq!(hub.downloads_of(shard), [0]);
    assert_eq!(hub.downloads_of("model-00002-of-00002.safetensors"), [0; 0]);

    let outside = index(serde_json::json!({ "lm_head.weight": "../../evil.safetensors" }));
    hub.state.files.lock().unwrap().insert(INDEX.to_owned(), outside);
    let models = tempfile::tempdir().unwrap();
    let error = hub.fetch(models.path()).unwrap_err();
    assert!(error.to_string().contains("no plain file name"), "{error}");
}

#[test]
fn refuses_what_cannot_be_computed_before_its_weights_are_fetched() {
    let (hub, models) = (Hub::tiny(), tempfile::tempdir().unwrap());
    hub.state.files.lock().unwrap().insert(CONFIG.to_owned(), br#"{"model_type": "mamba"}"#.to_vec());
    let error = hub.fetch(models.path()).unwrap_err();
    assert!(error.to_string().contains("`model_type` is \"mamba\""), "{error}");
    assert_eq!(hub.downloads_of(WEIGHTS), [0; 0]);
    assert_eq!(installed(models.path()), []);
}

#[test]
fn refuses_content_that_is_not_what_its_tag_says() {
    let (hub, models) = (Hub::tiny(), tempfile::tempdir().unwrap());
    *hub.state.etag.lock().unwrap() = Some("0".repeat(64));
    let error = hub.fetch(models.path()).unwrap_err();
    assert!(matches!(&error, PullError::Digest { file, .. } if file == CONFIG), "{error}");
    *hub.state.etag.lock().unwrap() = None;
    hub.fetch(models.path()).unwrap();
}

#[test]
fn refuses_tags_that_are_paths() {
    let (hub, models) = (Hub::tiny(), tempfile::tempdir().unwrap());
    *hub.state.etag.lock().unwrap() = Some("../../../escaped".to_owned());
    let error = hub.fetch(models.path()).unwrap_err();
    assert!(error.to_string().contains("odd tag"), "{error}");
}

#[test]
fn says_what_the_hub_refused() {
    let models = tempfile::tempdir().unwrap();
    let hub = Hub::tiny();
    let error = fetch("org/other", models.path(), &Progress::silent(), Some(&hub.endpoint)).unwrap_err();
    assert!(
        matches!(&error, PullError::Hub { repository, problem } if repository == "org/other" && problem.contains("404")),
        "{error}"
    );
}

#[test]
fn refuses_names_that_are_no_repositories() {
    let models = tempfile::tempdir().unwrap();
    for name in ["", "tiny", "a/b/c", "../x", "org/..", "org/.hidden", "org/a b", "/x", "org/"] {
        let error = fetch(name, models.path(), &Progress::silent(), None).unwrap_err();
        assert!(matches!(&error, PullError::UnknownName { .. }), "{name:?}: {error}");
    }
}

#[test]
fn selects_what_makes_a_model() {
    let select = |files: &[&str]| select(files.iter().copied());
    let all = select(&[
        "README.md",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        WEIGHTS,
        INDEX,
        "x.bin",
    ]);
    assert_eq!(
        all,
        Ok(Selection { small: vec![CONFIG, TOKENIZER, "chat_template.jinja"], weights: WEIGHTS })
    );
    assert_eq!(select(&[CONFIG, TOKENIZER, INDEX]).unwrap().weights, INDEX);
    assert!(select(&[TOKENIZER, WEIGHTS]).unwrap_err().contains(CONFIG));
    assert!(select(&[CONFIG, WEIGHTS]).unwrap_err().contains(TOKENIZER));
    assert!(select(&[CONFIG, TOKENIZER, "original/model.safetensors"]).unwrap_err().contains("neither"));
    assert!(select(&["model.Q4_K_M.gguf"]).unwrap_err().contains("GGUF files only"));
}

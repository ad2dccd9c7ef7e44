//! Whole models on disk: what loads, and what each fault is called.

pub(in crate::model) mod gguf;

use std::{collections::BTreeMap, fs, path::Path};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::json;
use tempfile::TempDir;

use super::ModelFiles;
use crate::{
    kernels::WeightDtype,
    model::{BaseWeights, ExpertsWeights, Mlp, ModelConfig, ModelError, tiny},
};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

const Q_0: &str = "model.layers.0.self_attn.q_proj.weight";

fn tiny_directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    tiny::write(directory.path(), &tiny::config(), 1).unwrap();
    directory
}

fn open(path: &Path) -> Result<ModelFiles, ModelError> {
    ModelFiles::open(path)
}

fn refusal(path: &Path) -> ModelError {
    open(path).err().expect("the model must be refused")
}

fn load(path: &Path) -> Result<BaseWeights, ModelError> {
    open(path)?.load_weights(WeightDtype::F32)
}

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, TensorView)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(tensor).collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Changes the weights of a tiny model.
fn with_tensors(change: impl FnOnce(&mut Tensors)) -> TempDir {
    let directory = tiny_directory();
    let path = directory.path().join("model.safetensors");
    let mut tensors = read_tensors(&path);
    change(&mut tensors);
    write_tensors(&path, &tensors);
    directory
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&le| f32::from_le_bytes(le)).collect()
}

fn row_0(matrix: &crate::kernels::Matrix) -> Vec<f32> {
    let mut row = vec![0.0; matrix.in_features()];
    matrix.copy_row(0, &mut row);
    row
}

/// All weights, in one order.
fn flat(weights: &BaseWeights) -> Vec<f32> {
    let mut flat = weights.final_norm.clone();
    let mut matrices = vec![&weights.embed, &weights.head];
    for l in &weights.layers {
        flat.extend(l.attn_norm.iter().chain(&l.mlp_norm));
        flat.extend(l.qkv_bias.iter().flat_map(|bias| [&bias.q, &bias.k, &bias.v]).flatten());
        flat.extend(l.qk_norm.iter().flat_map(|norm| [&norm.q, &norm.k]).flatten());
        matrices.extend([&l.q, &l.k, &l.v, &l.o]);
        let mlps = match &l.mlp {
            Mlp::Dense(mlp) => std::slice::from_ref(mlp),
            Mlp::Experts(ExpertsWeights { router, experts, .. }) => {
                matrices.push(router);
                experts
            }
        };
        matrices.extend(mlps.iter().flat_map(|mlp| [&mlp.gate, &mlp.up, &mlp.down]));
    }
    for matrix in matrices {
        let mut row = vec![0.0; matrix.in_features()];
        for output in 0..matrix.out_features() {
            matrix.copy_row(output, &mut row);
            flat.extend(&row);
        }
    }
    flat
}

#[test]
fn reads_half_precision_exactly() {
    for dtype in [Dtype::F16, Dtype::BF16] {
        let mut expected = Vec::new();
        let directory = with_tensors(|tensors| {
            for (name, (stored, _, bytes)) in tensors.iter_mut() {
                let values = floats(bytes);
                let narrowed: Vec<(Vec<u8>, f32)> = values
                    .iter()
                    .map(|&value| match dtype {
                        Dtype::F16 => {
                            (f16::from_f32(value).to_le_bytes().to_vec(), f16::from_f32(value).to_f32())
                        }
                        _ => (bf16::from_f32(value).to_le_bytes().to_vec(), bf16::from_f32(value).to_f32()),
                    })
                    .collect();
                if name == Q_0 {
                    expected = narrowed[..32].iter().map(|(_, value)| *value).collect();
                }
                *bytes = narrowed.into_iter().flat_map(|(bytes, _)| bytes).collect();
                *stored = dtype;
            }
        });
        let weights = load(directory.path()).unwrap();
        assert_eq!(row_0(&weights.layers[0].q), expected, "{dtype:?}");
    }
}

#[test]
fn reads_an_untied_head_and_shards() {
    let directory = tempfile::tempdir().unwrap();
    let config = ModelConfig { tie_word_embeddings: false, ..tiny::config() };
    tiny::write(directory.path(), &config, 1).unwrap();
    let whole = load(directory.path()).unwrap();
    assert_ne!(row_0(&whole.embed), row_0(&whole.head));

    let single = directory.path().join("model.safetensors");
    let whole_digest = open(directory.path()).unwrap().digest().unwrap();
    let tensors = read_tensors(&single);
    fs::remove_file(single).unwrap();
    let (first, second): (Tensors, Tensors) =
        tensors.into_iter().partition(|(name, _)| name.contains("layers.0"));
    let mut weight_map = BTreeMap::new();
    for (shard, tensors) in [("a.safetensors", &first), ("b.safetensors", &second)] {
        write_tensors(&directory.path().join(shard), tensors);
        weight_map.extend(tensors.keys().map(|name| (name.clone(), shard)));
    }
    let index = directory.path().join("model.safetensors.index.json");
    fs::write(&index, json!({ "metadata": {}, "weight_map": weight_map }).to_string()).unwrap();
    assert_eq!(flat(&load(directory.path()).unwrap()), flat(&whole));
    assert_ne!(
        open(directory.path()).unwrap().digest().unwrap(),
        whole_digest,
        "other files, another digest"
    );

    // The index and its shards contradict each other.
    let swapped: BTreeMap<_, _> = weight_map.keys().map(|name| (name, "a.safetensors")).collect();
    fs::write(&index, json!({ "weight_map": swapped }).to_string()).unwrap();
    assert!(
        matches!(refusal(directory.path()), ModelError::MissingTensor { path, .. } if path.ends_with("a.safetensors"))
    );
    fs::write(&index, json!({ "weight_map": weight_map }).to_string()).unwrap();
    write_tensors(&directory.path().join("b.safetensors"), &first.into_iter().chain(second).collect());
    assert!(matches!(refusal(directory.path()), ModelError::DuplicateTensor { .. }));
    fs::remove_file(directory.path().join("b.safetensors")).unwrap();
    assert!(
        matches!(refusal(directory.path()), ModelError::MissingFile { file, .. } if file == "b.safetensors")
    );
}

#[test]
fn refuses_an_index_that_reaches_outside_its_directory() {
    let directory = tiny_directory();
    fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    for shard in ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a/"] {
        let index = json!({ "weight_map": { Q_0: shard } }).to_string();
        fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
        let error = refusal(directory.path());
        assert!(
            matches!(&error, ModelError::Malformed { problem, .. } if problem.contains("no plain file name")),
            "{shard}: {error}"
        );
    }
}

#[test]
fn names_the_file_that_is_missing() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let directory = tiny_directory();
        fs::remove_file(directory.path().join(file)).unwrap();
        let error = refusal(directory.path());
        assert!(
            matches!(&error, ModelError::MissingFile { file: named, .. } if named.starts_with(file)),
            "{error}"
        );
    }
    assert!(matches!(refusal(Path::new("no/such/model")), ModelError::Unreadable { .. }));
    assert!(matches!(refusal(Path::new("/dev/null")), ModelError::Malformed { .. }), "no regular file");
}

#[test]
fn names_the_file_that_is_damaged() {
    let directory = tiny_directory();
    let weights = directory.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    for length in [0, 7, 8, 100, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        let error = refusal(directory.path());
        let named = |path: &Path| path.ends_with("model.safetensors");
        let damaged = matches!(&error, ModelError::Malformed { path, .. } | ModelError::Unreadable { path, .. } if named(path));
        assert!(damaged, "{length} bytes: {error}");
    }
    let mut forged = whole.clone();
    forged[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&weights, forged).unwrap();
    assert!(matches!(refusal(directory.path()), ModelError::Malformed { .. }));

    for (file, text) in [("config.json", "{"), ("config.json", "[]"), ("generation_config.json", "1")] {
        let directory = tiny_directory();
        fs::write(directory.path().join(file), text).unwrap();
        assert!(
            matches!(refusal(directory.path()), ModelError::Malformed { path, .. } if path.ends_with(file))
        );
    }
    let directory = tiny_directory();
    fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(refusal(directory.path()), ModelError::Tokenizer { .. }));
}

#[test]
fn refuses_text_files_beyond_any_real_size() {
    let directory = tiny_directory();
    let file = fs::File::options().write(true).open(directory.path().join("tokenizer.json")).unwrap();
    file.set_len(super::MAX_TEXT_BYTES + 1).unwrap();
    assert!(
        matches!(refusal(directory.path()), ModelError::TooLarge { path, .. } if path.ends_with("tokenizer.json"))
    );
}

#[test]
fn names_the_tensor_that_is_wrong() {
    let missing = with_tensors(|tensors| drop(tensors.remove(Q_0)));
    assert!(matches!(refusal(missing.path()), ModelError::MissingTensor { tensor, .. } if tensor == Q_0));

    let bias = "model.layers.0.self_attn.q_proj.bias";
    let unexpected = with_tensors(|tensors| {
        tensors.insert(bias.to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
    });
    assert!(
        matches!(refusal(unexpected.path()), ModelError::UnexpectedTensor { tensor, .. } if tensor == bias)
    );

    let ignored = with_tensors(|tensors| {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
        tensors.insert(name.to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
    });
    open(ignored.path()).unwrap();

    let shape = with_tensors(|tensors| tensors.get_mut(Q_0).unwrap().1 = vec![16, 64]);
    let error = refusal(shape.path());
    assert!(
        matches!(&error, ModelError::TensorShape { tensor, expected, found, .. }
            if tensor == Q_0 && expected == &[32, 32] && found == &[16, 64]),
        "{error}"
    );

    let number_format = with_tensors(|tensors| {
        tensors.insert(Q_0.to_owned(), (Dtype::F64, vec![32, 32], vec![0; 32 * 32 * 8]));
    });
    assert!(matches!(refusal(number_format.path()), ModelError::TensorType { found, .. } if found == "F64"));

    let nan = with_tensors(|tensors| {
        tensors.get_mut(Q_0).unwrap().2[4 * 5..4 * 6].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let error = load(nan.path()).err().unwrap();
    assert!(matches!(error, ModelError::NotFinite { tensor, index: 5, .. } if tensor == Q_0));
}

#[test]
fn a_tied_head_may_be_stored_only_if_it_is_the_embedding() {
    let store_head = |tensors: &mut Tensors, change: u8| {
        let mut head = tensors["model.embed_tokens.weight"].clone();
        head.2[0] ^= change;
        tensors.insert("lm_head.weight".to_owned(), head);
    };
    load(with_tensors(|tensors| store_head(tensors, 0)).path()).unwrap();
    let error = load(with_tensors(|tensors| store_head(tensors, 1)).path()).err().unwrap();
    assert!(matches!(error, ModelError::Unsupported { field, .. } if field == "tie_word_embeddings"));
}

#[test]
fn refuses_a_tokenizer_beyond_the_vocabulary() {
    let directory = tempfile::tempdir().unwrap();
    tiny::write(directory.path(), &ModelConfig { vocab_size: 258, ..tiny::config() }, 1).unwrap();
    let error = refusal(directory.path());
    assert_eq!(error.to_string(), "tokenizer: has the token id 258; the model's vocabulary ends at 258");
}

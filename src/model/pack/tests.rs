use std::{io::Write, sync::Barrier};

use candle_core::quantized::GgmlDType;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    kernels::{CodeBits, Matrix, MatrixForm, Team},
    model::{
        BaseModel, Batch, BatchSequence, Mlp, ModelConfig, Place, Workspace, decoder, files::tests::gguf,
        forward, head_logits, tiny, weights::base_digest,
    },
};

/// A model on disk and a cache for it.
struct Case {
    model: PathBuf,
    dtype: WeightDtype,
    files: ModelFiles,
    stamps: Vec<Stamp>,
    forms: Vec<Option<MatrixForm>>,
    digest: Digest,
    cache: TempDir,
    _kept: TempDir,
}

impl Case {
    fn new(kept: TempDir, model: PathBuf, dtype: WeightDtype) -> Self {
        let files = ModelFiles::open(&model).unwrap();
        let (stamps, forms) = (files.stamps().unwrap(), files.weight_forms(dtype).unwrap());
        let digest = base_digest(files.digest().unwrap(), dtype);
        let cache = tempfile::tempdir().unwrap();
        Self { model, dtype, files, stamps, forms, digest, cache, _kept: kept }
    }

    fn of(config: &ModelConfig, dtype: WeightDtype) -> Self {
        let directory = tempfile::tempdir().unwrap();
        tiny::write(directory.path(), config, 7).unwrap();
        let path = directory.path().to_owned();
        Self::new(directory, path, dtype)
    }

    fn tiny() -> Self {
        Self::of(&tiny::config(), WeightDtype::F32)
    }

    fn wanted(&self) -> Wanted<'_> {
        let Self { files, stamps, forms, model, dtype, digest, .. } = self;
        Wanted { files, stamps, forms, source: model, dtype: *dtype, digest: *digest }
    }

    /// As a process that has just started.
    fn cache(&self) -> PackCache {
        PackCache::in_directory(self.cache.path())
    }

    fn load(&self) -> BaseWeights {
        self.cache().load(&self.wanted()).unwrap()
    }

    fn in_memory(&self) -> BaseWeights {
        self.files.load_weights(self.dtype).unwrap()
    }

    fn path(&self) -> PathBuf {
        self.cache().path_of(&self.wanted())
    }

    /// Writes other bytes in the file's place, as somebody might who is not Lockstep.
    fn alter(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path()).unwrap();
        change(&mut bytes);
        fs::write(self.path(), bytes).unwrap();
        // Whatever the tick of the file system's clock is.
        let file = File::options().append(true).open(self.path()).unwrap();
        file.set_modified(std::time::SystemTime::now() + Duration::from_secs(3600)).unwrap();
    }

    fn model(&self, weights: BaseWeights) -> BaseModel {
        BaseModel {
            name: "test".to_owned(),
            config: self.files.config.clone(),
            place: Place::Cpu(weights),
            text: self.files.text.clone(),
            digest: self.digest,
        }
    }
}

fn matrices(weights: &BaseWeights) -> Vec<&Matrix> {
    let mut all = vec![&weights.embed, &weights.head];
    for layer in &weights.layers {
        all.extend([&layer.q, &layer.k, &layer.v, &layer.o]);
        match &layer.mlp {
            Mlp::Dense(mlp) => all.extend([&mlp.gate, &mlp.up, &mlp.down]),
            Mlp::Experts(mixture) => {
                all.push(&mixture.router);
                all.extend(mixture.experts.iter().flat_map(|mlp| [&mlp.gate, &mlp.up, &mlp.down]));
            }
        }
    }
    all
}

/// Everything that there is of them, as bits.
fn bits(weights: &BaseWeights) -> (Vec<MatrixForm>, Vec<Vec<u8>>, Vec<u32>) {
    let matrices = matrices(weights);
    let mut vectors = weights.final_norm.clone();
    for layer in &weights.layers {
        vectors.extend(layer.attn_norm.iter().chain(&layer.mlp_norm));
        vectors.extend(layer.qkv_bias.iter().flat_map(|bias| [&bias.q, &bias.k, &bias.v]).flatten());
        vectors.extend(layer.qk_norm.iter().flat_map(|norm| [&norm.q, &norm.k]).flatten());
    }
    (
        matrices.iter().map(|matrix| matrix.form()).collect(),
        matrices.iter().map(|matrix| matrix.packed_bytes().to_vec()).collect(),
        vectors.into_iter().map(f32::to_bits).collect(),
    )
}

fn logits(model: &BaseModel) -> Vec<u32> {
    let tokens = [1, 70, 5, 200, 9, 9, 33];
    let (mut workspace, mut logits, team) = (Workspace::default(), Vec::new(), Team::solo());
    let mut batch =
        Batch { sequences: vec![BatchSequence { tokens: &tokens, kv_cache: None, adapter: None }] };
    let hidden = forward(model, &mut batch, None, &mut workspace, &team);
    let rows: Vec<_> = (0..tokens.len()).map(|row| (row, None)).collect();
    head_logits(model, &hidden, &rows, &mut logits, &mut workspace, &team);
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn mapped_weights_are_those_in_memory_to_the_bit() {
    let dtypes = [WeightDtype::F32, WeightDtype::Bf16];
    let configs = decoder::tests::models().iter().map(|model| &model.config);
    let mut cases: Vec<Case> =
        configs.flat_map(|config| dtypes.map(|dtype| Case::of(config, dtype))).collect();
    use GgmlDType::*;
    for format in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16, F16, Q4K, Q5K, Q6K] {
        cases.extend(dtypes.map(|dtype| {
            let (directory, path) = gguf::tiny_gguf(format);
            Case::new(directory, path, dtype)
        }));
    }
    let mut forms = Vec::new();
    for case in &cases {
        let memory = case.in_memory();
        let expected = bits(&memory);
        forms.extend(expected.0.clone());
        let expected_logits = logits(&case.model(memory));
        // Packed by the first, found by the second.
        for _ in 0..2 {
            let mapped = case.load();
            assert!(bits(&mapped) == expected, "{:?}", case.files.config);
            assert_eq!(mapped.embed.shares_storage(&mapped.head), case.files.config.tie_word_embeddings);
            assert_eq!(logits(&case.model(mapped)), expected_logits);
        }
        let bytes: usize = expected.1.iter().map(Vec::len).sum::<usize>() + 4 * expected.2.len();
        let tied = if case.files.config.tie_word_embeddings { expected.1[0].len() } else { 0 };
        let reckoned = case.files.weight_bytes(case.dtype).unwrap();
        assert_eq!(reckoned, (bytes - tied) as u64, "what a node says of its memory");
    }
    let coded = [CodeBits::Four, CodeBits::Five, CodeBits::Six, CodeBits::Eight].map(MatrixForm::Blocks);
    let plain = [MatrixForm::F32, MatrixForm::Bf16, MatrixForm::RoundedBf16];
    for form in plain.into_iter().chain(coded) {
        assert!(forms.contains(&form), "no weights of the test are {form:?}");
    }
}

#[test]
fn a_file_is_written_once_and_private() {
    use std::os::unix::fs::MetadataExt;
    let case = Case::tiny();
    let barrier = Barrier::new(4);
    let weights: Vec<_> = thread::scope(|scope| {
        let load = || {
            barrier.wait();
            let weights = case.load();
            (bits(&weights), fs::metadata(case.path()).unwrap().ino())
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(weights.iter().all(|found| *found == weights[0]), "one file, the same for all");
    assert_eq!(weights[0].0, bits(&case.in_memory()));
    let metadata = fs::metadata(case.path()).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600);
    drop(case.load());
    assert_eq!(fs::metadata(case.path()).unwrap().ino(), metadata.ino());
    assert!(!case.path().with_extension("partial").exists());
}

/// Each fault is called by its name, and a start writes the file again.
#[test]
fn a_damaged_file_is_found_and_written_again() {
    type Change = fn(&mut Vec<u8>);
    type Expected = fn(&PackError) -> bool;
    let faults: [(&str, Change, Expected); 10] = [
        ("nothing", |bytes| bytes.clear(), |e| matches!(e, PackError::Foreign)),
        ("a foreign beginning", |bytes| bytes[0] ^= 1, |e| matches!(e, PackError::Foreign)),
        ("another layout", |bytes| bytes[8] ^= 0x40, |e| matches!(e, PackError::Layout { .. })),
        (
            "a table longer than any",
            |bytes| bytes[12..16].fill(255),
            |e| matches!(e, PackError::Table { .. }),
        ),
        ("a table cut off", |bytes| bytes.truncate(100), |e| matches!(e, PackError::Foreign)),
        ("a digest", |bytes| bytes[20] ^= 1, |e| matches!(e, PackError::Table { .. })),
        ("a byte of the table", |bytes| bytes[80] ^= 1, |e| matches!(e, PackError::Table { .. })),
        ("truncated", |bytes| bytes.truncate(bytes.len() - 1), |e| matches!(e, PackError::Length { .. })),
        ("something appended", |bytes| bytes.push(0), |e| matches!(e, PackError::Length { .. })),
        ("a weight", |bytes| *bytes.last_mut().unwrap() ^= 1, |e| matches!(e, PackError::Content { .. })),
    ];
    let case = Case::tiny();
    let expected = bits(&case.in_memory());
    drop(case.load());
    for (what, change, is_expected) in faults {
        case.alter(change);
        let error = case.cache().open(&case.path()).err().unwrap_or_else(|| panic!("{what} passes"));
        assert!(is_expected(&error), "{what}: {error:?}");
        assert!(!error.to_string().is_empty());
        assert!(case.cache().present(&case.wanted()).is_none(), "{what}");
        assert!(bits(&case.load()) == expected, "{what}");
        case.cache().open(&case.path()).unwrap().verify().unwrap();
    }
}

#[test]
fn another_models_file_is_not_taken() {
    let (case, other) = (Case::tiny(), Case::of(&tiny::config(), WeightDtype::Bf16));
    drop((case.load(), other.load()));
    fs::copy(other.path(), case.path()).unwrap();
    let pack = case.cache().open(&case.path()).unwrap();
    let error = case.wanted().weights_in(&pack).err().unwrap();
    assert!(matches!(error, PackError::Model { found, .. } if found == other.digest), "{error:?}");
    let wider = ModelConfig { vocab_size: 300, ..tiny::config() };
    let mut forms = other.forms.clone();
    assert!(matches!(pack.weights(&wider, other.digest, &forms), Err(PackError::Tensor { index: 0, .. })));
    let deeper = ModelConfig { num_layers: 3, ..tiny::config() };
    assert!(matches!(pack.weights(&deeper, other.digest, &forms), Err(PackError::Table { .. })));
    // As many bytes, but the rows that they meet aren't rounded.
    let last = forms.iter().rposition(Option::is_some).unwrap();
    assert_eq!(forms[last].replace(MatrixForm::Bf16), Some(MatrixForm::RoundedBf16));
    let otherwise = pack.weights(&other.files.config, other.digest, &forms).err().unwrap();
    assert!(matches!(otherwise, PackError::Tensor { index, .. } if index == last), "{otherwise:?}");
    assert_eq!(bits(&case.load()), bits(&case.in_memory()));
}

#[test]
fn weights_are_in_memory_where_nothing_can_be_written() {
    let case = Case::tiny();
    let file = case.cache.path().join("a file");
    fs::write(&file, "").unwrap();
    // No directory can be made below a file, whoever this test runs as.
    let cache = PackCache::in_directory(&file.join("cache"));
    assert_eq!(bits(&cache.load(&case.wanted()).unwrap()), bits(&case.in_memory()));
    // A reader of a lock that can't be had says so in time.
    fs::create_dir(case.cache.path().join("packing.lock")).unwrap();
    assert_eq!(bits(&case.load()), bits(&case.in_memory()));
    assert!(!case.path().exists());
}

#[test]
fn a_model_that_is_refused_leaves_no_file() {
    let case = Case::tiny();
    let path = case.model.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let stamps = &case.files.stamps().unwrap();
    let error = case.cache().load(&Wanted { stamps, ..case.wanted() }).err().unwrap();
    assert!(matches!(error, ModelError::NotFinite { .. }), "{error}");
    let left: Vec<_> = entries(case.cache.path()).collect();
    assert_eq!(left, [case.cache.path().join("packing.lock")]);
}

/// Between the look at the files and the turn to pack them, their names came to mean another model.
#[test]
fn no_pack_has_other_weights_than_its_digest_names() {
    let case = Case::tiny();
    tiny::write(&case.model, &tiny::config(), 8).unwrap();
    let error = case.cache().load(&case.wanted()).err().expect("other weights");
    assert!(matches!(error, ModelError::Changed { .. }), "{error}");
    assert!(PackFile::list(case.cache.path()).is_empty());
    // Nor has the memory of a process that can write none.
    let file = case.cache.path().join("a file");
    fs::write(&file, "").unwrap();
    let error = PackCache::in_directory(&file.join("cache")).load(&case.wanted()).err().unwrap();
    assert!(matches!(error, ModelError::Changed { .. }), "{error}");
}

#[test]
fn what_nobody_will_ask_for_is_removed() {
    let case = Case::tiny();
    let put = |name: &str, bytes: &[u8]| fs::write(case.cache.path().join(name), bytes).unwrap();
    let there = |name: &str| case.cache.path().join(name).exists();
    put("1234-0.pack", b"LSPACK\r\n\0\0\0\0 of a layout that was");
    put("1234-1.partial", b"of a writer that was killed");
    put("notes.txt", b"not ours");
    // A model that is gone, the same model in another dtype, and the same place with another model.
    let gone = Case::of(&ModelConfig { num_layers: 3, ..tiny::config() }, WeightDtype::F32);
    let forms = &case.files.weight_forms(WeightDtype::Bf16).unwrap();
    let half = Wanted { dtype: WeightDtype::Bf16, digest: Digest([2; 32]), forms, ..case.wanted() };
    let former = Wanted { digest: Digest([3; 32]), ..case.wanted() };
    for wanted in [&gone.wanted(), &half, &former] {
        case.cache().pack(wanted).map_err(|_| "written").unwrap();
    }
    let [gone_file, half_file, former_file] =
        [&gone.wanted(), &half, &former].map(|wanted| case.cache().path_of(wanted));
    assert!(gone_file.exists() && half_file.exists() && former_file.exists());
    drop(gone);
    drop(case.load());
    assert!(
        !gone_file.exists() && !former_file.exists() && !there("1234-0.pack") && !there("1234-1.partial")
    );
    assert!(half_file.exists() && there("notes.txt") && case.path().exists());
}

#[test]
fn files_are_listed_verified_and_removed() {
    let case = Case::tiny();
    assert!(PackFile::list(case.cache.path()).is_empty());
    drop(case.load());
    let [ref pack] = PackFile::list(case.cache.path())[..] else { panic!("one file") };
    let (source, dtype) = pack.holds.as_ref().unwrap();
    assert_eq!((source, dtype.as_str(), &pack.path), (&case.model, "f32", &case.path()));
    assert_eq!(pack.bytes, fs::metadata(case.path()).unwrap().len());
    pack.verify().unwrap();
    case.alter(|bytes| *bytes.last_mut().unwrap() ^= 1);
    assert!(matches!(pack.verify(), Err(PackError::Content { .. })));
    // A writer was killed.
    fs::write(case.path().with_extension("partial"), "of a pack").unwrap();
    let listed = PackFile::list(case.cache.path());
    let [_, unfinished] = &listed[..] else { panic!("two files: {listed:?}") };
    assert!(matches!(unfinished.holds, Err(PackError::Unfinished)) && unfinished.bytes == 9);
    assert!(matches!(unfinished.verify(), Err(PackError::Unfinished)));
    let removed = PackFile::clear(case.cache.path()).unwrap();
    assert_eq!(removed.len(), 2, "{removed:?}");
    let left: Vec<_> = entries(case.cache.path()).collect();
    assert_eq!(left, [case.cache.path().join("packing.lock")]);
    assert!(PackFile::clear(case.cache.path()).unwrap().is_empty());
    // What somebody else has just removed is as good as removed.
    case.cache().remove(&case.path()).unwrap();
}

/// Whoever removes unfinished files waits until none of them is being written.
#[test]
fn clearing_waits_for_a_writer() {
    let case = Case::tiny();
    drop(case.load());
    let lock = case.cache().lock().unwrap();
    thread::scope(|scope| {
        let clearing = scope.spawn(|| PackFile::clear(case.cache.path()).unwrap());
        thread::sleep(Duration::from_millis(50));
        assert!(!clearing.is_finished() && case.path().exists());
        drop(lock);
        assert_eq!(clearing.join().unwrap().len(), 1);
    });
    assert!(!case.path().exists());
}

/// A disk that is full of what nobody will ask for again has room at the next start.
#[test]
fn a_full_disk_loses_what_is_no_use() {
    let case = Case::tiny();
    drop(case.load());
    let former = Wanted { digest: Digest([3; 32]), ..case.wanted() };
    let former = case.cache().path_of(&former);
    fs::rename(case.path(), &former).unwrap();
    let unfinished = former.with_extension("partial");
    fs::write(&unfinished, "of a writer that was killed").unwrap();
    let full = PackCache { spare: u64::MAX, ..case.cache() };
    assert_eq!(bits(&full.load(&case.wanted()).unwrap()), bits(&case.in_memory()));
    assert!(!former.exists() && !unfinished.exists() && !case.path().exists());
}

#[test]
fn a_file_to_which_others_may_write_is_not_mapped() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let case = Case::tiny();
    drop(case.load());
    fs::set_permissions(case.path(), fs::Permissions::from_mode(0o620)).unwrap();
    assert!(matches!(case.cache().open(&case.path()), Err(PackError::Mode { mode: 0o620 })));
    drop(case.load());
    assert_eq!(fs::metadata(case.path()).unwrap().permissions().mode() & 0o777, 0o600, "packed anew");
    // Only root can give a file away.
    if chown(case.path(), Some(12_345), None).is_ok() {
        assert!(matches!(case.cache().open(&case.path()), Err(PackError::Owner { uid: 12_345 })));
    }
    assert_eq!(bits(&case.load()), bits(&case.in_memory()));
    case.cache().open(&case.path()).unwrap();
}

/// The bytes of a packed tiny model.
fn packed() -> &'static (Case, Vec<u8>) {
    static PACKED: std::sync::OnceLock<(Case, Vec<u8>)> = std::sync::OnceLock::new();
    PACKED.get_or_init(|| {
        let case = Case::tiny();
        drop(case.load());
        let bytes = fs::read(case.path()).unwrap();
        (case, bytes)
    })
}

/// What a reader makes of these bytes, values proved.
fn read(bytes: &[u8]) -> Result<BaseWeights, PackError> {
    let (case, _) = packed();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let pack = Pack::open(file.path())?;
    pack.verify()?;
    case.wanted().weights_in(&pack)
}

/// The same file with another table, whose digest is right.
fn with_table(bytes: &[u8], change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let length = u32::from_ne_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let mut table: serde_json::Value = serde_json::from_slice(&bytes[64..64 + length]).unwrap();
    let data = &bytes[(64 + length).next_multiple_of(64)..];
    change(&mut table);
    let table = table.to_string();
    let mut changed = bytes[..12].to_vec();
    changed.extend_from_slice(&(table.len() as u32).to_ne_bytes());
    changed.extend_from_slice(&Digest::of(table.as_bytes()).0);
    changed.resize(64, 0);
    changed.extend_from_slice(table.as_bytes());
    changed.resize(changed.len().next_multiple_of(64), 0);
    changed.extend_from_slice(data);
    changed
}

#[test]
fn a_table_may_be_longer_or_shorter() {
    let (case, bytes) = packed();
    let same = with_table(bytes, |_| {});
    assert_eq!(bits(&read(&same).unwrap()), bits(&case.in_memory()));
    let refused =
        |change: fn(&mut serde_json::Value)| read(&with_table(bytes, change)).err().expect("refused");
    assert!(matches!(refused(|t| t["more"] = 1.into()), PackError::Table { .. }));
    assert!(matches!(refused(|t| t["bytes"] = u64::MAX.into()), PackError::Length { .. }));
    assert!(matches!(refused(|t| t["content"] = "00".repeat(32).into()), PackError::Content { .. }));
    assert!(matches!(refused(|t| t["tensors"][0]["start"] = 32.into()), PackError::Tensor { index: 0, .. }));
    assert!(matches!(
        refused(|t| t["tensors"][0]["form"] = "bf16".into()),
        PackError::Tensor { index: 0, .. }
    ));
    assert!(matches!(refused(|t| drop(t["tensors"].as_array_mut().unwrap().pop())), PackError::Table { .. }));
    assert!(matches!(refused(|t| t["tensors"][1]["shape"] = vec![33].into()), PackError::Tensor { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever happens to a file's bytes, it is refused or the weights are those that were written.
    #[test]
    fn no_other_weights_come_out_of_a_changed_file(
        at in any::<prop::sample::Index>(),
        change in prop_oneof![
            (1..=255_u8).prop_map(Some),
            Just(None),
        ],
    ) {
        let (case, bytes) = packed();
        let mut changed = bytes.clone();
        match change {
            Some(bits) => changed[at.index(bytes.len())] ^= bits,
            None => changed.truncate(at.index(bytes.len())),
        }
        if let Ok(weights) = read(&changed) {
            prop_assert!(change.is_some());
            prop_assert_eq!(bits(&weights), bits(&case.in_memory()));
        }
    }

    /// A table that says nonsense is refused, whether or not it reaches outside the file.
    #[test]
    fn no_table_says_where_else_a_tensor_begins(
        tensor in any::<prop::sample::Index>(),
        start in prop_oneof![any::<u64>(), 0..200_000_u64, (0..4_000_u64).prop_map(|n| n * 64)],
    ) {
        let (_, bytes) = packed();
        let mut right = false;
        let changed = with_table(bytes, |table| {
            let tensors = table["tensors"].as_array_mut().unwrap();
            let index = tensor.index(tensors.len());
            right = tensors[index]["start"] == start;
            tensors[index]["start"] = start.into();
        });
        prop_assert_eq!(read(&changed).is_ok(), right);
    }
}

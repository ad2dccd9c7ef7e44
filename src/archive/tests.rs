use std::{fs, path::Path, sync::Arc};

use super::*;
use crate::{
    model::{Adapter, AdapterError, GradientKind, LoraLayout, TrainState, tiny},
    protocol::{ADAPTER_FILE, STATE_FILE},
    types::{AdamParams, Checkpoint, CheckpointId, CheckpointTarget, LoraConfig, RunId},
};

/// A state after one step.
fn state() -> TrainState {
    let layout = LoraLayout::new(&tiny::config(), &LoraConfig::new(4, 3)).unwrap();
    let state = TrainState::fresh(Arc::new(layout));
    let gradient: Vec<f32> = (0..state.layout.len()).map(|i| (i % 7) as f32 - 3.0).collect();
    let state = state.accumulate(&gradient, 5, GradientKind::TokenMean).unwrap();
    state.optim_step(&AdamParams::default()).unwrap().0
}

fn adapter() -> Adapter {
    state().adapter()
}

fn checkpoint(target: CheckpointTarget) -> Checkpoint {
    Checkpoint {
        id: CheckpointId(9),
        run_id: RunId(1),
        checkpoint_id: "name".into(),
        checkpoint_type: "lora".into(),
        target,
        created_at_ms: 1_700_000_000_000,
        base_model: "tests/tiny".into(),
        lora_rank: 4,
        lora_alpha: 32.0,
        step: 1,
        size_bytes: 0,
        path: "bt://loops:run-1/weights/name".into(),
        expires_at_ms: None,
    }
}

fn files(target: CheckpointTarget) -> Vec<(String, Vec<u8>)> {
    match target {
        CheckpointTarget::Trainer => vec![(STATE_FILE.to_owned(), state().to_bytes())],
        CheckpointTarget::Sampler => adapter().to_peft("tests/tiny").into(),
    }
}

/// A written checkpoint of either kind.
fn written(target: CheckpointTarget) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &checkpoint(target), &files(target)).unwrap();
    directory
}

const TARGETS: [(CheckpointTarget, &str); 2] =
    [(CheckpointTarget::Trainer, STATE_FILE), (CheckpointTarget::Sampler, ADAPTER_FILE)];

fn edit(directory: &Path, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let path = directory.join(file);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
}

fn refusal(directory: &Path) -> String {
    verify_directory(directory).unwrap_err().to_string()
}

#[test]
fn what_is_written_is_proved() {
    for (target, file) in TARGETS {
        let directory = written(target);
        let verified = verify_directory(directory.path()).unwrap();
        assert_eq!(verified.checkpoint, Some(checkpoint(target)));
        assert_eq!((verified.lora.rank, verified.step), (4, (file == STATE_FILE).then_some(1)));
        assert!(verified.files.iter().any(|it| it.name == file));
    }
}

#[test]
fn a_truncated_file_is_refused_by_name() {
    for (target, file) in TARGETS {
        for cut in [1, 1000] {
            let directory = written(target);
            edit(directory.path(), file, |bytes| bytes.truncate(bytes.len() - cut));
            let message = refusal(directory.path());
            assert!(message.starts_with(&format!("`{file}` has ")), "{message}");
        }
    }
}

#[test]
fn an_altered_file_is_refused_by_name() {
    for (target, file) in TARGETS {
        for place in [0, 100, 5000] {
            let directory = written(target);
            edit(directory.path(), file, |bytes| bytes[place] ^= 1);
            assert!(refusal(directory.path()).starts_with(&format!("`{file}` was altered")));
        }
    }
}

/// Somebody who mends the manifest, too, still has to mend the digest inside the file.
#[test]
fn an_altered_number_is_refused_without_the_manifests_help() {
    for (target, file) in TARGETS {
        let directory = written(target);
        edit(directory.path(), file, |bytes| *bytes.last_mut().unwrap() ^= 1);
        fs::remove_file(directory.path().join(MANIFEST)).unwrap();
        let error = verify_directory(directory.path()).unwrap_err();
        assert!(
            matches!(&error, ArchiveError::Content { file: found, source: AdapterError::Altered { .. } } if found == file),
            "{error}"
        );
    }
}

#[test]
fn missing_and_foreign_files_are_refused_by_name() {
    let directory = written(CheckpointTarget::Sampler);
    fs::write(directory.path().join("more.bin"), b"x").unwrap();
    assert_eq!(refusal(directory.path()), "`more.bin` is no part of this checkpoint");
    fs::remove_file(directory.path().join("more.bin")).unwrap();
    fs::remove_file(directory.path().join("adapter_config.json")).unwrap();
    assert_eq!(refusal(directory.path()), "`adapter_config.json` is missing");
}

#[test]
fn a_manifest_that_says_something_else_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let claim = Checkpoint { step: 7, ..checkpoint(CheckpointTarget::Trainer) };
    write(directory.path(), &claim, &files(CheckpointTarget::Trainer)).unwrap();
    assert_eq!(refusal(directory.path()), "`state.safetensors` says step 1, the manifest says 7");
}

#[test]
fn a_manifest_can_not_lead_outside() {
    let directory = written(CheckpointTarget::Sampler);
    edit(directory.path(), MANIFEST, |bytes| {
        let json = String::from_utf8(bytes.clone()).unwrap();
        *bytes = json.replace("adapter_config.json", "../adapter_config.json").into_bytes();
    });
    assert_eq!(
        refusal(directory.path()),
        "the manifest names `../adapter_config.json`, which is no plain file name"
    );
    let outside = [("../x".to_owned(), Vec::new())];
    let fresh = tempfile::tempdir().unwrap();
    let refused = write(fresh.path(), &checkpoint(CheckpointTarget::Sampler), &outside);
    assert!(matches!(refused, Err(ArchiveError::Name { .. })));
}

#[test]
fn nothing_is_written_over() {
    let directory = written(CheckpointTarget::Sampler);
    let again = write(directory.path(), &checkpoint(CheckpointTarget::Trainer), &[]);
    assert!(matches!(again, Err(ArchiveError::NotEmpty { .. })));
    verify_directory(directory.path()).unwrap();
}

#[test]
fn a_directory_of_something_else_is_no_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("notes.txt"), b"x").unwrap();
    assert!(refusal(directory.path()).contains("holds no checkpoint"));
    assert!(matches!(verify_directory(Path::new("/nowhere/at/all")), Err(ArchiveError::File { .. })));
}

#[test]
fn merging_refuses_an_adapter_of_another_model() {
    let model = tempfile::tempdir().unwrap();
    let other = crate::model::ModelConfig { intermediate_size: 48, ..tiny::config() };
    tiny::write(model.path(), &other, 1).unwrap();
    let adapter = written(CheckpointTarget::Sampler);
    let out = tempfile::tempdir().unwrap();
    let error = merge(adapter.path(), model.path(), out.path(), None).unwrap_err().to_string();
    assert!(error.contains("model.layers.0.mlp.gate_proj.weight"), "{error}");
    assert!(fs::read_dir(out.path()).unwrap().next().is_none(), "nothing was written");
}

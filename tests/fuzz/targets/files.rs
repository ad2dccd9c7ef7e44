use std::io::Write;

use lockstep::model::{Adapter, ModelSource, TrainState};

/// A model file that somebody downloaded.
pub fn gguf(bytes: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("written");
    let _ = ModelSource::new("fuzz", file.path()).check();
}

/// An adapter that somebody made elsewhere: the two files of PEFT, the first up to a zero byte.
pub fn adapter_files(bytes: &[u8]) {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (config, tensors) = bytes.split_at(end);
    let _ = Adapter::from_peft(config, tensors.get(1..).unwrap_or_default());
}

/// A saved training state.
pub fn train_state(bytes: &[u8]) {
    let _ = TrainState::check_bytes(bytes);
}

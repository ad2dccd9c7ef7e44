//! What bytes from outside are fed to: decoders that answer with a value or an error, never with a panic.
//! Each is driven twice: by libFuzzer (`fuzz_targets/`), and by the tests beside this folder.

#![allow(dead_code, reason = "a fuzz program drives one of them")]

mod datum_json;
mod decode_message;
mod decode_payload;
mod files;
mod join;

pub use datum_json::datum_json;
pub use decode_message::decode_message;
pub use decode_payload::decode_payload;
pub use files::{adapter_files, gguf, train_state};
pub use join::join;

//! Headers that lie.

use proptest::prelude::*;

use super::*;

/// Writes a header by hand, so that it may lie.
#[derive(Clone)]
struct Forger(Vec<u8>);

impl Forger {
    fn new(tensors: u64, pairs: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(pairs)
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(self, text: &str) -> Self {
        let mut longer = self.u64(text.len() as u64);
        longer.0.extend(text.as_bytes());
        longer
    }

    /// A tensor of f32 of which the file holds `data` bytes.
    fn tensor(self, name: &str, shape: &[u64], format: u32, offset: u64) -> Self {
        let dimensions = self.text(name).u32(shape.len() as u32);
        shape.iter().fold(dimensions, |header, &size| header.u64(size)).u32(format).u64(offset)
    }

    fn data(mut self, bytes: usize) -> Self {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + bytes, 0);
        self
    }

    fn parse(&self) -> Result<Header, ModelError> {
        Header::parse(Path::new("model.gguf"), &self.0)
    }

    fn problem(&self) -> String {
        self.parse().expect_err("the header must be refused").to_string()
    }
}

const F32: u32 = 0;
const Q4_0: u32 = 2;

#[test]
fn reads_every_type_of_value() {
    let header = Forger::new(0, 5)
        .text("number")
        .u32(10)
        .u64(u64::MAX)
        .text("text")
        .u32(8)
        .text("Grüße")
        .text("float")
        .u32(6)
        .u32(1.5f32.to_bits())
        .text("list")
        .u32(9)
        .u32(5)
        .u64(2)
        .u32(7)
        .u32(-1i32 as u32)
        .text("texts")
        .u32(9)
        .u32(8)
        .u64(2)
        .text("a")
        .text("");
    let metadata = header.parse().unwrap().metadata;
    assert_eq!(metadata["number"], Value::Integer(u64::MAX.into()));
    assert_eq!(metadata["text"], Value::Text("Grüße".to_owned()));
    assert_eq!(metadata["float"], Value::Float(1.5));
    assert_eq!(metadata["list"], Value::Integers(vec![7, -1]));
    assert_eq!(metadata["texts"], Value::Texts(vec!["a".to_owned(), String::new()]));
}

#[test]
fn places_tensors() {
    let header = Forger::new(2, 0).tensor("a", &[4, 2], F32, 0).tensor("b", &[32], Q4_0, 32).data(50);
    let tensors = header.parse().unwrap().tensors;
    let start = header.0.len() - 50;
    assert_eq!((&tensors["a"].shape[..], tensors["a"].bytes.clone()), (&[2, 4][..], start..start + 32));
    assert_eq!((&tensors["b"].shape[..], tensors["b"].bytes.clone()), (&[32][..], start + 32..start + 50));
}

#[test]
fn refuses_forged_lengths_before_believing_them() {
    let huge = u64::MAX;
    let forged = [
        (Forger::new(huge, 0), "tensors are announced"),
        (Forger::new(0, huge), "metadata pairs are announced"),
        (Forger::new(0, 1).u64(huge).data(64), "bytes of text are announced"),
        (Forger::new(0, 1).u64(1 << 40).data(64), "bytes of text are announced"),
        (Forger::new(0, 1).text("k").u32(8).u64(huge), "`k`: 18446744073709551615 bytes of text"),
        (Forger::new(0, 1).text("k").u32(9).u32(8).u64(huge), "`k`: 18446744073709551615 elements"),
        (Forger::new(0, 1).text("k").u32(9).u32(0).u64(1 << 40), "elements are announced"),
        (Forger::new(0, 1).text("k").u32(9).u32(9).u64(1).u32(9).u64(1), "array of arrays"),
        (Forger::new(0, 1).text("k").u32(9).u32(13).u64(0), "unknown type 13"),
        (Forger::new(0, 1).text("k").u32(99).u64(0), "unknown type 99"),
        (Forger::new(0, 1).text("k").u32(7).u32(2), "no bool"),
        (Forger::new(1, 0).text("t").u32(huge as u32).u64(0).u64(0), "4294967295 dimensions"),
        (Forger::new(1, 0).tensor("t", &[], F32, 0), "0 dimensions"),
        (Forger::new(1, 0).tensor("t", &[1; 5], F32, 0), "5 dimensions"),
        (Forger::new(1, 0).tensor("t", &[huge, huge], F32, 0).data(64), "truncated"),
        (Forger::new(1, 0).tensor("t", &[1 << 62, 4], F32, 0).data(64), "truncated"),
        (Forger::new(1, 0).tensor("t", &[17], F32, 0).data(64), "truncated"),
        (Forger::new(1, 0).tensor("t", &[1], F32, huge - 31).data(64), "truncated"),
        (Forger::new(1, 0).tensor("t", &[1], F32, 1).data(64), "isn't aligned"),
        (Forger::new(1, 0).tensor("t", &[0, 4], F32, 0).data(64), "not whole blocks"),
        (Forger::new(1, 0).tensor("t", &[31], Q4_0, 0).data(64), "not whole blocks"),
        (Forger::new(1, 0).tensor("t", &[32], 23, 0).data(64), "stored as IQ4_XS"),
        (Forger::new(1, 0).tensor("t", &[32], 77, 0).data(64), "ggml's type 77"),
    ];
    for (header, expected) in forged {
        let problem = header.problem();
        assert!(problem.contains(expected), "{expected}: {problem}");
    }
}

#[test]
fn refuses_what_stands_twice() {
    let pair = |header: Forger| header.text("k").u32(4).u32(1);
    assert!(pair(pair(Forger::new(0, 2))).problem().contains("`k` stands in it twice"));
    let tensor = |header: Forger| header.tensor("t", &[1], F32, 0);
    let twice = tensor(tensor(Forger::new(2, 0))).data(64).parse().unwrap_err();
    assert!(matches!(twice, ModelError::DuplicateTensor { tensor, .. } if tensor == "t"));
}

#[test]
fn refuses_other_files_and_versions() {
    let with_version = |version: u32| Forger(b"GGUF".to_vec()).u32(version).u64(0).u64(0);
    with_version(2).parse().unwrap();
    assert!(with_version(1).problem().contains("version 1"));
    assert!(with_version(4).problem().contains("version 4"));
    assert!(with_version(3u32.swap_bytes()).problem().contains("big-endian"));
    assert!(Forger(b"GGML".to_vec()).u32(3).problem().contains("doesn't begin with GGUF"));
    assert!(Forger(Vec::new()).problem().contains("ends inside the header"));
    let not_text = Forger::new(0, 1).u64(1).u32(0xFFFF_FFFF).data(64);
    assert!(not_text.problem().contains("no UTF-8"));
}

proptest! {
    /// Whatever bytes change, the parser answers: with an error, or with tensors that lie
    /// inside the file.
    #[test]
    fn survives_any_change(changes in prop::collection::vec((0usize..400, any::<u8>()), 1..8)) {
        let mut header = Forger::new(2, 3)
            .text("general.alignment").u32(4).u32(32)
            .text("texts").u32(9).u32(8).u64(2).text("one").text("two")
            .text("floats").u32(9).u32(6).u64(2).u32(0).u32(0)
            .tensor("a", &[4, 2], F32, 0)
            .tensor("b", &[32], Q4_0, 32)
            .data(64);
        let length = header.0.len();
        for (place, byte) in changes {
            header.0[place % length] = byte;
        }
        if let Ok(parsed) = header.parse() {
            for tensor in parsed.tensors.values() {
                let elements: usize = tensor.shape.iter().product();
                let bytes = elements / tensor.format.block_size() * tensor.format.type_size();
                prop_assert!(tensor.bytes.end <= length && tensor.bytes.len() == bytes);
            }
        }
    }
}

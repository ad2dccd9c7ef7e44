use std::io::Read;

use bincode::{Decode, Encode};
use thiserror::Error;

/// Bytes that are no message of ours.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CodecError {
    /// Cut off, an unknown variant, a value out of range, or a length that the bytes can't hold.
    #[error("malformed {what}: {reason}")]
    Malformed { what: &'static str, reason: String },
    /// A whole message, and more behind it.
    #[error("{trailing} bytes follow the {what}")]
    Trailing { what: &'static str, trailing: usize },
    /// More than the receiver takes.
    #[error("{what} of {got} bytes is over the limit of {limit}")]
    TooLarge { what: &'static str, got: usize, limit: usize },
}

/// Largest value that [`decode_compressed`] inflates to.
const MAX_DECOMPRESSED: usize = 1 << 30;

/// The bytes of a message.
pub fn encode<T: Encode>(message: &T) -> Vec<u8> {
    bincode::encode_to_vec(message, config::<MAX_DECOMPRESSED>())
        .expect("encoding into memory fails for no type of this room")
}

/// Reads one message of at most `limit` bytes and nothing behind it.
///
/// What a length inside the message claims is checked before anything is allocated for it: the
/// memory taken is bounded by a small multiple of `bytes`, whatever they say.
pub fn decode<T: Decode<()>>(what: &'static str, bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    if bytes.len() > limit {
        return Err(CodecError::TooLarge { what, got: bytes.len(), limit });
    }
    let (message, read) =
        decode_bounded(bytes).map_err(|e| CodecError::Malformed { what, reason: e.to_string() })?;
    match bytes.len() - read {
        0 => Ok(message),
        trailing => Err(CodecError::Trailing { what, trailing }),
    }
}

/// The canonical stored form of a large value: bincode, then zstd. What encodes to more than
/// 1 GiB can be written but not read again; callers bound their batches far below.
pub fn encode_compressed<T: Encode>(value: &T) -> Vec<u8> {
    // Level 1: payloads are token ids and floats, of which higher levels gain little.
    zstd::bulk::compress(&encode(value), 1).expect("zstd compresses memory into memory")
}

/// Reads what [`encode_compressed`] wrote; refuses what inflates past 1 GiB.
pub fn decode_compressed<T: Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T, CodecError> {
    decode(what, &inflate(what, bytes, MAX_DECOMPRESSED)?, MAX_DECOMPRESSED)
}

/// Inflates piece by piece, so that a bomb costs no more than `limit`.
fn inflate(what: &'static str, bytes: &[u8], limit: usize) -> Result<Vec<u8>, CodecError> {
    let mut plain = Vec::new();
    zstd::stream::read::Decoder::new(bytes)
        .and_then(|decoder| decoder.take(limit as u64 + 1).read_to_end(&mut plain))
        .map_err(|e| CodecError::Malformed { what, reason: e.to_string() })?;
    match plain.len() {
        got if got > limit => Err(CodecError::TooLarge { what, got, limit }),
        _ => Ok(plain),
    }
}

/// bincode's limit counts bytes in memory: a forged length is refused when its elements would
/// pass it, before they are allocated. It is a constant of the type, so the one in proportion to the
/// input is picked from four.
///
/// How much larger than its encoding a message is in memory: at most 24 times for a list of
/// empty lists (24 bytes for one), 8 times for a list of numbers. Small messages may be of any
/// kind; large ones are numbers.
fn decode_bounded<T: Decode<()>>(bytes: &[u8]) -> Result<(T, usize), bincode::error::DecodeError> {
    const KIB: usize = 1 << 10;
    const MIB: usize = 1 << 20;
    if bytes.len() <= 64 * KIB {
        bincode::decode_from_slice(bytes, config::<{ 2 * MIB }>())
    } else if bytes.len() <= 2 * MIB {
        bincode::decode_from_slice(bytes, config::<{ 64 * MIB }>())
    } else if bytes.len() <= 64 * MIB {
        bincode::decode_from_slice(bytes, config::<{ 1024 * MIB }>())
    } else {
        bincode::decode_from_slice(bytes, config::<{ 8 * MAX_DECOMPRESSED }>())
    }
}

/// bincode's fixed configuration on every wire and disk: little endian, variable-length
/// integers.
fn config<const LIMIT: usize>() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::types::Datum;

    use super::*;

    /// A length as bincode writes one past 2³².
    fn forged(length: u64) -> Vec<u8> {
        let mut bytes = vec![253];
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes
    }

    fn reason<T: Decode<()> + std::fmt::Debug>(bytes: &[u8]) -> String {
        match decode::<T>("list", bytes, usize::MAX).unwrap_err() {
            CodecError::Malformed { what: "list", reason } => reason,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_forged_length_is_refused_before_anything_is_allocated() {
        // Down to what still can't be in 9 bytes but would be allocated under a fixed limit of 1 GiB.
        for length in [u64::MAX, 1 << 60, 1 << 32, 1 << 29, 3 << 20] {
            let bytes = forged(length);
            assert_eq!(reason::<Vec<u8>>(&bytes), "LimitExceeded");
            assert_eq!(reason::<Vec<u64>>(&bytes), "LimitExceeded");
            assert_eq!(reason::<String>(&bytes), "LimitExceeded");
            assert_eq!(reason::<Vec<Datum>>(&bytes), "LimitExceeded");
            assert_eq!(reason::<BTreeMap<String, f64>>(&bytes), "LimitExceeded");
        }
    }

    #[test]
    fn a_forged_length_inside_a_large_message_is_refused() {
        let mut bytes = encode(&vec![0u8; 65 << 10]);
        bytes.extend(forged(65 << 20));
        assert_eq!(reason::<(Vec<u8>, Vec<u8>)>(&bytes), "LimitExceeded");
    }

    #[test]
    fn the_limit_grows_with_the_message() {
        // The widest in memory for their bytes: empty lists, and small numbers in 8 bytes.
        for count in [60 << 10, 1 << 20] {
            let empty = vec![Vec::<u8>::new(); count];
            assert!(decode::<Vec<Vec<u8>>>("lists", &encode(&empty), usize::MAX).unwrap() == empty);
        }
        let numbers = vec![1i64; 3 << 20];
        assert!(decode::<Vec<i64>>("numbers", &encode(&numbers), usize::MAX).unwrap() == numbers);
    }

    #[test]
    fn a_message_over_the_receivers_limit_is_refused_unread() {
        let error = decode::<Vec<u8>>("hello", &[0xff; 11], 10).unwrap_err();
        assert_eq!(error, CodecError::TooLarge { what: "hello", got: 11, limit: 10 });
    }

    #[test]
    fn a_compressed_value_comes_back_and_is_canonical() {
        let value = vec![7u32; 100_000];
        let bytes = encode_compressed(&value);
        assert!(bytes.len() < 1000);
        assert_eq!(encode_compressed(&value), bytes);
        assert_eq!(decode_compressed::<Vec<u32>>("tokens", &bytes).unwrap(), value);
    }

    #[test]
    fn a_bomb_is_refused_at_the_limit() {
        let bomb = zstd::bulk::compress(&vec![0; 8 << 20], 19).unwrap();
        assert!(bomb.len() < 2048);
        let error = inflate("payload", &bomb, 1 << 20).unwrap_err();
        assert_eq!(error, CodecError::TooLarge { what: "payload", got: (1 << 20) + 1, limit: 1 << 20 });
        assert_eq!(inflate("payload", &bomb, 8 << 20).unwrap().len(), 8 << 20);
    }

    #[test]
    fn cut_or_foreign_compressed_bytes_are_refused() {
        let bytes = encode_compressed(&vec![1u32, 2, 3]);
        for end in 0..bytes.len() {
            decode_compressed::<Vec<u32>>("tokens", &bytes[..end]).unwrap_err();
        }
        decode_compressed::<Vec<u32>>("tokens", b"no zstd at all").unwrap_err();
        let mut longer = bytes.clone();
        longer.push(0);
        decode_compressed::<Vec<u32>>("tokens", &longer).unwrap_err();
        let twice = [bytes.clone(), bytes].concat();
        let error = decode_compressed::<Vec<u32>>("tokens", &twice).unwrap_err();
        assert_eq!(error, CodecError::Trailing { what: "tokens", trailing: 4 });
    }
}

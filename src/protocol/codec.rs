use bincode::{Decode, Encode};
use thiserror::Error;

/// Bytes that are no message of ours.
#[derive(Debug, Error)]
pub enum CodecError {
    /// Cut off, an unknown variant, or a length past the limit.
    #[error("malformed {what}: {reason}")]
    Malformed { what: &'static str, reason: String },
    /// A whole message, and more behind it.
    #[error("{trailing} bytes follow the {what}")]
    Trailing { what: &'static str, trailing: usize },
    /// More than the receiver takes.
    #[error("{what} of {got} bytes is over the limit of {limit}")]
    TooLarge { what: &'static str, got: usize, limit: usize },
}

/// bincode's fixed configuration on every wire and disk: little endian, variable-length
/// integers. The limit stops a forged length before anything is allocated for it.
fn config<const LIMIT: usize>() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Largest value that [`encode_compressed`] takes and [`decode_compressed`] inflates to.
const MAX_DECOMPRESSED: usize = 1 << 30;

/// The bytes of a message.
pub fn encode<T: Encode>(message: &T) -> Vec<u8> {
    bincode::encode_to_vec(message, config::<MAX_DECOMPRESSED>())
        .expect("encoding into memory fails for no type of this room")
}

/// Reads one message of at most `limit` bytes and nothing behind it.
pub fn decode<T: Decode<()>>(what: &'static str, bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    if bytes.len() > limit {
        return Err(CodecError::TooLarge { what, got: bytes.len(), limit });
    }
    let (message, read) = bincode::decode_from_slice(bytes, config::<MAX_DECOMPRESSED>())
        .map_err(|e| CodecError::Malformed { what, reason: e.to_string() })?;
    match bytes.len() - read {
        0 => Ok(message),
        trailing => Err(CodecError::Trailing { what, trailing }),
    }
}

/// The canonical stored form of a large value: bincode, then zstd.
pub fn encode_compressed<T: Encode>(value: &T) -> Vec<u8> {
    // Level 1: payloads are token ids and floats, of which higher levels gain little.
    zstd::bulk::compress(&encode(value), 1).expect("zstd compresses memory into memory")
}

/// Reads what [`encode_compressed`] wrote; refuses what inflates past 1 GiB.
pub fn decode_compressed<T: Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T, CodecError> {
    let plain = zstd::stream::read::Decoder::new(bytes)
        .and_then(|decoder| {
            use std::io::Read;
            let mut plain = Vec::new();
            decoder.take(MAX_DECOMPRESSED as u64 + 1).read_to_end(&mut plain)?;
            Ok(plain)
        })
        .map_err(|e| CodecError::Malformed { what, reason: e.to_string() })?;
    decode(what, &plain, MAX_DECOMPRESSED)
}

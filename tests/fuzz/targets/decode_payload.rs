use lockstep::{
    protocol::{MAX_MESSAGE, decode, decode_compressed, encode_compressed},
    types::{Datum, ForwardBackwardOutput},
};

/// A payload as a client uploads it: compressed datums, or an error.
pub fn decode_payload(bytes: &[u8]) {
    if let Ok(data) = decode_compressed::<Vec<Datum>>("data", bytes) {
        let written = encode_compressed(&data);
        decode_compressed::<Vec<Datum>>("data", &written).expect("what was just written is a payload");
    }
    let _ = decode_compressed::<ForwardBackwardOutput>("output", bytes);
    // What is behind the compression, without the fuzzer having to forge zstd.
    let _ = decode::<Vec<Datum>>("data", bytes, MAX_MESSAGE);
}

use lockstep::protocol::{
    BlobReply, ClientResponse, CoordinatorMessage, GenerateReply, JoinReply, JoinRequest, MAX_MESSAGE,
    NodeMessage, RankPart, StreamOpen, decode, encode,
};

macro_rules! read_as {
    ($bytes:expr, $($message:ty),*) => {$(
        if let Ok(message) = decode::<$message>(stringify!($message), $bytes, MAX_MESSAGE) {
            let written = encode(&message);
            let again = decode::<$message>(stringify!($message), &written, MAX_MESSAGE)
                .expect("what was just written is a message");
            assert_eq!(encode(&again), written);
        }
    )*};
}

/// Bytes from a peer: a message, or an error, and never memory out of proportion. What is read must be
/// written and read again as the same bytes.
pub fn decode_message(bytes: &[u8]) {
    read_as!(
        bytes,
        StreamOpen,
        ClientResponse,
        CoordinatorMessage,
        NodeMessage,
        RankPart,
        GenerateReply,
        BlobReply,
        JoinRequest,
        JoinReply
    );
}

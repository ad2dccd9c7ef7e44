use lockstep::{join::JoinToken, transport::PublicKey};

/// What a process without a certificate shows: a token as people copy it, and a public key.
pub fn join(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(token) = text.parse::<JoinToken>()
    {
        let again: JoinToken = token.to_string().parse().expect("what was just written is a token");
        assert_eq!(again.to_string(), token.to_string());
    }
    let _ = PublicKey::from_bytes(bytes);
}

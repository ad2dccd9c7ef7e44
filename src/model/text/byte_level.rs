//! GPT-2's alphabet: every byte as one printable character.
//!
//! The printable Latin-1 bytes stand for themselves; the other 68 (controls, blank, DEL, 0x80
//! to 0xA0, soft hyphen), in ascending order, are U+0100 and up. From `bytes_to_unicode` in
//! GPT-2's encoder.py.

/// The bytes that `piece` spells; `None` if a character isn't of the alphabet.
pub(in crate::model) fn bytes_of(piece: &str) -> Option<Vec<u8>> {
    piece.chars().map(byte_of).collect()
}

/// How `byte` is written.
pub(in crate::model) fn character_of(byte: u8) -> char {
    match SHIFTED.iter().position(|&shifted| shifted == byte) {
        // U+0100 to U+0143 are characters, all of them.
        Some(place) => char::from_u32(0x100 + place as u32).expect("below U+D800"),
        None => char::from(byte),
    }
}

/// Whether a byte is written as the Latin-1 character of its own number.
const fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The bytes written as U+0100 and up, in that order.
const SHIFTED: [u8; 68] = {
    let mut shifted = [0; 68];
    let (mut byte, mut count) = (0, 0);
    while byte < 256 {
        if !stands_for_itself(byte as u8) {
            shifted[count] = byte as u8;
            count += 1;
        }
        byte += 1;
    }
    shifted
};

fn byte_of(character: char) -> Option<u8> {
    match u8::try_from(character) {
        Ok(byte) => Some(byte).filter(|&byte| stands_for_itself(byte)),
        Err(_) => SHIFTED.get(character as usize - 0x100).copied(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spells_every_byte_as_the_tokenizers_crate_does() {
        use tokenizers::{Decoder, pre_tokenizers::byte_level::ByteLevel};
        let alphabet = ByteLevel::alphabet();
        assert_eq!(alphabet.len(), 256);
        let mut seen = [false; 256];
        for character in alphabet {
            let bytes = bytes_of(&character.to_string()).unwrap();
            let decoded = ByteLevel::default().decode_chain(vec![character.to_string()]).unwrap().concat();
            assert_eq!(String::from_utf8_lossy(&bytes), decoded, "{character:?}");
            assert_eq!(character_of(bytes[0]), character);
            seen[bytes[0] as usize] = true;
        }
        assert!(seen.iter().all(|&seen| seen), "each byte has a character of its own");
        assert_eq!(bytes_of("Ġthe"), Some(b" the".to_vec()));
        assert_eq!(bytes_of("a b"), None, "a plain blank is not of the alphabet");
        assert_eq!(bytes_of("你"), None);
    }
}

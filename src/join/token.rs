use std::{fmt, str::FromStr};

use sha2::{Digest as _, Sha256};

use super::JoinError;

/// Bytes of an id and of a secret.
const ID: usize = 6;
const SECRET: usize = 32;

/// What a process shows to be let in: `ID.SECRET.CA`, each in hexadecimal.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Names the token in lists and logs; no secret.
    pub id: String,
    pub(super) secret: [u8; SECRET],
    /// SHA-256 of the certificate of the cluster's CA, hexadecimal.
    pub ca: String,
}

impl JoinToken {
    /// A fresh token of the cluster with this CA.
    pub(super) fn mint(ca: String) -> Self {
        let mut random = [0; ID + SECRET];
        getrandom::fill(&mut random).expect("the system has random bytes");
        let (id, secret) = random.split_at(ID);
        let mut token = Self { id: hex::encode(id), secret: [0; SECRET], ca };
        token.secret.copy_from_slice(secret);
        token
    }
}

/// What is kept of a secret.
pub(super) fn digest(secret: &[u8; SECRET]) -> String {
    hex::encode(Sha256::digest(secret))
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.id, hex::encode(self.secret), self.ca)
    }
}

impl fmt::Debug for JoinToken {
    /// Never shows the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({})", self.id)
    }
}

impl FromStr for JoinToken {
    type Err = JoinError;

    fn from_str(text: &str) -> Result<Self, JoinError> {
        let mut parts = text.trim().split('.');
        let (Some(id), Some(secret), Some(ca), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(JoinError::Malformed("it has not three parts"));
        };
        let lower_hex = |text: &str, bytes: usize| {
            text.len() == 2 * bytes && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        if !lower_hex(id, ID) || !lower_hex(secret, SECRET) || !lower_hex(ca, 32) {
            return Err(JoinError::Malformed("a part is cut off or not hexadecimal"));
        }
        let mut token = Self { id: id.into(), secret: [0; SECRET], ca: ca.into() };
        hex::decode_to_slice(secret, &mut token.secret)
            .map_err(|_| JoinError::Malformed("its secret is not hexadecimal"))?;
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_its_secret_is_not_in_logs() {
        let token = JoinToken::mint("ab".repeat(32));
        let text = token.to_string();
        assert_eq!(text.parse::<JoinToken>().unwrap(), token);
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains(&hex::encode(token.secret)));
    }

    #[test]
    fn what_is_cut_off_is_no_token() {
        let text = JoinToken::mint("ab".repeat(32)).to_string();
        for end in 0..text.len() {
            assert!(text[..end].parse::<JoinToken>().is_err(), "{end}");
        }
        for other in [text.to_uppercase(), format!("{text}.00"), format!("{text}00"), text.replace('.', "/")]
        {
            assert!(other.parse::<JoinToken>().is_err(), "{other}");
        }
    }
}

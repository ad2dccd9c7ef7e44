//! URLs that carry their own authority: signed for one file of one checkpoint, for a while.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hmac::{Hmac, Mac};
use serde::Deserialize;
use sha2::Sha256;

use crate::types::{CheckpointId, Digest};

use super::refusal::Refused;

/// How long a URL is good for.
const GOOD_FOR: Duration = Duration::from_secs(3600);

/// Length of a key: that of SHA-256's output, as RFC 2104 advises.
const KEY_BYTES: usize = 32;

/// What is signed begins with it, so that the key can't be used to sign anything else.
const PURPOSE: &str = "lockstep checkpoint file 1";

/// The key that URLs are signed with.
#[derive(Clone)]
pub struct PresignKey {
    /// Tells keys apart in the URLs that they signed.
    id: String,
    mac: Hmac<Sha256>,
}

/// The query of a signed URL.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Signature {
    /// Seconds since the Unix epoch.
    expires: u64,
    key: String,
    signature: String,
}

impl PresignKey {
    /// The key in `file`, made with mode 0600 if there is none.
    pub fn open_or_create(file: &Path) -> io::Result<Self> {
        match fs::read(file) {
            Ok(bytes) if bytes.len() == KEY_BYTES => Ok(Self::new(&bytes)),
            Ok(bytes) => {
                let problem = format!("{} bytes where a key of {KEY_BYTES} should be", bytes.len());
                Err(io::Error::new(io::ErrorKind::InvalidData, problem))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let bytes = random_key()?;
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?.write_all(&bytes)?;
                Ok(Self::new(&bytes))
            }
            Err(error) => Err(error),
        }
    }

    /// A key that is gone with this process, and with it every URL.
    pub fn random() -> io::Result<Self> {
        Ok(Self::new(&random_key()?))
    }

    fn new(key: &[u8]) -> Self {
        let mac = Hmac::new_from_slice(key).expect("HMAC takes keys of any length");
        Self { id: Digest::of(key).short(), mac }
    }

    /// The query that lets its bearer read one file from now on.
    pub fn sign(&self, checkpoint: CheckpointId, file: &str) -> String {
        let expires = now() + GOOD_FOR.as_secs();
        let signature = hex::encode(self.over(checkpoint, file, expires).finalize().into_bytes());
        format!("expires={expires}&key={}&signature={signature}", self.id)
    }

    /// Refuses a query that was not signed for this file, or that is no longer good.
    pub fn verify(&self, checkpoint: CheckpointId, file: &str, query: &Signature) -> Result<(), Refused> {
        let forged = || Refused::forbidden("FORGED_URL", "this URL was not signed by this service");
        let signature = hex::decode(&query.signature).map_err(|_| forged())?;
        if query.key != self.id {
            return Err(forged());
        }
        // In constant time.
        self.over(checkpoint, file, query.expires).verify_slice(&signature).map_err(|_| forged())?;
        if query.expires < now() {
            return Err(Refused::forbidden("EXPIRED_URL", "this URL is no longer good; ask for a new one"));
        }
        Ok(())
    }

    fn over(&self, checkpoint: CheckpointId, file: &str, expires: u64) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(format!("{PURPOSE}\0{checkpoint}\0{expires}\0{file}").as_bytes());
        mac
    }
}

fn random_key() -> io::Result<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    getrandom::fill(&mut key).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(key)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Signature {
        let value = |name: &str| text.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        Signature {
            expires: value("expires").unwrap().parse().unwrap(),
            key: value("key").unwrap().to_owned(),
            signature: value("signature").unwrap().to_owned(),
        }
    }

    fn reason(verdict: Result<(), Refused>) -> String {
        verdict.unwrap_err().to_string()
    }

    #[test]
    fn a_signature_is_for_one_file_of_one_checkpoint() {
        let key = PresignKey::random().unwrap();
        let good = query(&key.sign(CheckpointId(1), "a.json"));
        key.verify(CheckpointId(1), "a.json", &good).unwrap();
        for (checkpoint, file) in [(2, "a.json"), (1, "b.json"), (1, "")] {
            assert!(key.verify(CheckpointId(checkpoint), file, &good).is_err(), "{checkpoint} {file}");
        }
        let later = Signature { expires: good.expires + 1, ..good.clone() };
        assert!(key.verify(CheckpointId(1), "a.json", &later).is_err(), "its end is signed as well");
        let short = Signature { signature: good.signature[..62].to_owned(), ..good.clone() };
        assert!(key.verify(CheckpointId(1), "a.json", &short).is_err());
        assert!(PresignKey::random().unwrap().verify(CheckpointId(1), "a.json", &good).is_err());
    }

    #[test]
    fn a_signature_ends() {
        let key = PresignKey::random().unwrap();
        let expires = now() - 1;
        let signature = hex::encode(key.over(CheckpointId(1), "a", expires).finalize().into_bytes());
        let old = Signature { expires, key: key.id.clone(), signature };
        assert!(reason(key.verify(CheckpointId(1), "a", &old)).contains("no longer good"));
    }

    #[test]
    fn a_key_survives_the_process_and_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("presign.key");
        let signed = query(&PresignKey::open_or_create(&file).unwrap().sign(CheckpointId(1), "a"));
        PresignKey::open_or_create(&file).unwrap().verify(CheckpointId(1), "a", &signed).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&file, b"short").unwrap();
        assert!(PresignKey::open_or_create(&file).is_err());
    }
}

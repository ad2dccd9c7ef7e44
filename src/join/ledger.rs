use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::transport::Role;

use super::{
    JoinError,
    token::{JoinToken, digest},
};

/// Names of those let in that a token remembers.
const NAMES_KEPT: usize = 64;

/// The tokens of a cluster, in `DATA/tokens` (mode 0700): a file each, named by its id.
///
/// Its methods may be called from several processes at once; they wait for each other.
pub struct Ledger {
    home: PathBuf,
}

/// What a token is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The role that certificates will prove.
    pub role: Role,
    /// How often it is taken; absent: any number of times.
    pub uses: Option<u32>,
    /// Until when, in seconds since the Unix epoch; absent: until it is revoked.
    pub expires_at: Option<u64>,
}

/// A token as it is kept and listed: all but its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenInfo {
    pub id: String,
    /// `node`, `gateway` or `client`.
    pub role: String,
    /// Absent: any number.
    pub uses_left: Option<u32>,
    /// Seconds since the Unix epoch; absent: never.
    pub expires_at: Option<u64>,
    /// Who was let in last.
    pub names: Vec<String>,
    secret_sha256: String,
}

impl Ledger {
    /// Opens or makes the ledger of a data directory.
    pub fn open(data_dir: &Path) -> Result<Self, JoinError> {
        let home = data_dir.join("tokens");
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&home);
        made.map_err(|source| JoinError::File { path: home.clone(), source })?;
        Ok(Self { home })
    }

    /// A fresh token of the cluster whose CA has this fingerprint. Its secret is in the result and
    /// nowhere else.
    pub fn create(&self, terms: Terms, ca: String) -> Result<JoinToken, JoinError> {
        let _lock = self.lock()?;
        let token = JoinToken::mint(ca);
        self.write(&TokenInfo {
            id: token.id.clone(),
            role: terms.role.to_string(),
            uses_left: terms.uses,
            expires_at: terms.expires_at,
            names: Vec::new(),
            secret_sha256: digest(&token.secret),
        })?;
        Ok(token)
    }

    /// Takes one use of a token for a process called `name`; returns the role that it gets. The
    /// use is gone, durably, before this returns.
    ///
    /// A wrong secret, a spent and an expired token are refused alike but for the sentence, and
    /// an unknown id like a wrong secret.
    pub fn redeem(&self, id: &str, secret: &[u8; 32], name: &str, now: u64) -> Result<Role, JoinError> {
        let refused = |reason: &str| Err(JoinError::Refused(reason.to_owned()));
        let known = |id: &str| id.bytes().all(|b| b.is_ascii_hexdigit()) && !id.is_empty();
        let _lock = self.lock()?;
        let mut info = match known(id).then(|| self.read(id)).transpose()? {
            // Digests are compared, so that the time it takes says nothing of the secret.
            Some(Some(info)) if info.secret_sha256 == digest(secret) => info,
            _ => return refused("it knows no such token"),
        };
        if info.expires_at.is_some_and(|at| at <= now) {
            return refused("the token has expired");
        }
        match &mut info.uses_left {
            Some(0) => return refused("the token has been used up"),
            Some(left) => *left -= 1,
            None => {}
        }
        let Some(role) = Role::parse(&info.role) else {
            let problem = format!("no role is called {:?}", info.role);
            return Err(JoinError::Damaged { path: self.path(id), problem });
        };
        info.names.retain(|known| known != name);
        info.names.push(name.to_owned());
        let surplus = info.names.len().saturating_sub(NAMES_KEPT);
        info.names.drain(..surplus);
        self.write(&info)?;
        Ok(role)
    }

    /// All tokens, by id.
    pub fn list(&self) -> Result<Vec<TokenInfo>, JoinError> {
        let _lock = self.lock()?;
        let entries = fs::read_dir(&self.home).map_err(self.at_home())?;
        let mut tokens = Vec::new();
        for entry in entries {
            let name = entry.map_err(self.at_home())?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")) {
                tokens.extend(self.read(id)?);
            }
        }
        tokens.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(tokens)
    }

    /// Forgets a token. Those that it let in stay.
    pub fn revoke(&self, id: &str) -> Result<(), JoinError> {
        let _lock = self.lock()?;
        if !id.bytes().all(|b| b.is_ascii_hexdigit()) || self.read(id)?.is_none() {
            return Err(JoinError::Unknown { id: id.chars().take(32).collect() });
        }
        let path = self.path(id);
        fs::remove_file(&path).map_err(|source| JoinError::File { path, source })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.home.join(format!("{id}.json"))
    }

    fn at_home(&self) -> impl Fn(io::Error) -> JoinError {
        let path = self.home.clone();
        move |source| JoinError::File { path: path.clone(), source }
    }

    /// Held until it is dropped.
    fn lock(&self) -> Result<File, JoinError> {
        let path = self.home.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let held = lock.and_then(|file| file.lock().map(|()| file));
        held.map_err(|source| JoinError::File { path, source })
    }

    fn read(&self, id: &str) -> Result<Option<TokenInfo>, JoinError> {
        let path = self.path(id);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(JoinError::File { path, source }),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| JoinError::Damaged { path, problem: e.to_string() })
    }

    /// Whole or not at all, and durable: a use that a crash gave back would be a second one.
    fn write(&self, info: &TokenInfo) -> Result<(), JoinError> {
        let (path, beside) = (self.path(&info.id), self.home.join(format!("{}.new", info.id)));
        let text = serde_json::to_vec_pretty(info).expect("text and numbers are JSON");
        let written = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&beside)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&beside, &path))
            .and_then(|()| File::open(&self.home)?.sync_all());
        written.map_err(|source| JoinError::File { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONCE: Terms = Terms { role: Role::Node, uses: Some(1), expires_at: Some(1_000) };

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path()).unwrap();
        (directory, ledger)
    }

    fn refusal(result: Result<Role, JoinError>) -> String {
        match result {
            Err(JoinError::Refused(reason)) => reason,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_token_is_good_for_its_uses_and_no_more() {
        let (_directory, ledger) = ledger();
        let token = ledger.create(Terms { uses: Some(2), ..ONCE }, "ca".into()).unwrap();
        for name in ["a", "b"] {
            assert_eq!(ledger.redeem(&token.id, &token.secret, name, 999).unwrap(), Role::Node);
        }
        assert!(refusal(ledger.redeem(&token.id, &token.secret, "c", 999)).contains("used up"));
        let [info] = &ledger.list().unwrap()[..] else { panic!("one token") };
        assert_eq!((info.uses_left, &info.names[..]), (Some(0), &["a".to_owned(), "b".to_owned()][..]));
    }

    #[test]
    fn wrong_expired_and_revoked_tokens_are_refused_and_lose_no_use() {
        let (_directory, ledger) = ledger();
        let token = ledger.create(ONCE, "ca".into()).unwrap();
        let mut wrong = token.secret;
        wrong[31] ^= 1;
        let unknown = refusal(ledger.redeem("00ff00ff00ff", &token.secret, "a", 0));
        assert_eq!(refusal(ledger.redeem(&token.id, &wrong, "a", 0)), unknown);
        assert_eq!(refusal(ledger.redeem("../../etc/passwd", &token.secret, "a", 0)), unknown);
        assert!(refusal(ledger.redeem(&token.id, &token.secret, "a", 1_000)).contains("expired"));
        assert_eq!(ledger.redeem(&token.id, &token.secret, "a", 999).unwrap(), Role::Node);
        ledger.revoke(&token.id).unwrap();
        assert_eq!(refusal(ledger.redeem(&token.id, &token.secret, "a", 0)), unknown);
        assert!(matches!(ledger.revoke(&token.id), Err(JoinError::Unknown { .. })));
    }

    #[test]
    fn one_use_is_one_use_however_many_ask_at_once() {
        let (directory, ledger) = ledger();
        let token = ledger.create(ONCE, "ca".into()).unwrap();
        let taken: usize = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|i| {
                    let (path, token) = (directory.path(), &token);
                    scope.spawn(move || {
                        let ledger = Ledger::open(path).unwrap();
                        usize::from(ledger.redeem(&token.id, &token.secret, &format!("n{i}"), 0).is_ok())
                    })
                })
                .collect();
            tries.into_iter().map(|tried| tried.join().unwrap()).sum()
        });
        assert_eq!(taken, 1);
    }
}

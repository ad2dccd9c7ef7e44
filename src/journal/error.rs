use std::path::{Path, PathBuf};

use rusqlite::{Error as SqliteError, ErrorCode};

use crate::{
    protocol::CodecError,
    types::{ErrorKind, OperationError},
};

/// Why the journal can't be opened, or why facts are not durable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// At open: another process has the directory.
    #[error(
        "{} is in use by another coordinator; stop it, or give this one another data directory",
        path.display()
    )]
    Held { path: PathBuf },
    /// At open: written by another version of Lockstep. Nothing was changed.
    #[error(
        "{} has schema version {found}, this program reads {ours}; start the version of Lockstep \
         that wrote it, or give this one another data directory",
        path.display()
    )]
    Version { path: PathBuf, found: i64, ours: i64 },
    /// At open: an SQLite file of some other program. Nothing was changed.
    #[error("{} is not a journal of Lockstep; move it away", path.display())]
    Foreign { path: PathBuf },
    /// At open: the file is damaged. Runs can't be recovered from it.
    #[error("{} is damaged ({detail}); restore it from a copy, or move it away to start afresh", path.display())]
    Corrupt { path: PathBuf, detail: String },
    /// At open: the directory or the file can't be made or read.
    #[error("cannot open {}: {reason}", path.display())]
    Open { path: PathBuf, reason: String },
    /// The facts contradict what is written (a key used twice, an outcome of nothing): a fault
    /// of the caller. Nothing of this append was written; others are not affected.
    #[error("the journal refuses {record}: {reason}")]
    Refused { record: String, reason: String },
    /// No room. Nothing of this append was written; worth another try once there is.
    #[error("the disk of {} is full; make room and try again", path.display())]
    DiskFull { path: PathBuf },
    /// The disk failed. Whether this append is durable is known only after the journal has
    /// been opened again; until then nothing more is accepted.
    #[error("cannot write {}: {reason}; restart the coordinator", path.display())]
    Io { path: PathBuf, reason: String },
    /// More is waiting to be written than the queue holds. Nothing was queued; try again.
    #[error("{limit} appends are waiting for the disk; try again later")]
    Full { limit: usize },
    /// The journal was closed, or its thread is gone, before this append was written.
    #[error("the journal is closed")]
    Closed,
}

impl JournalError {
    /// Whether this journal takes nothing more: what is in the file is known only to who opens it
    /// again. Every other error leaves it as good as before.
    pub fn ends_the_journal(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Closed)
    }
}

impl From<JournalError> for OperationError {
    fn from(error: JournalError) -> Self {
        let kind = match error {
            JournalError::Full { .. } | JournalError::DiskFull { .. } => ErrorKind::ResourceExhausted,
            JournalError::Io { .. } | JournalError::Closed => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

/// What goes wrong below, where the file's path isn't known.
#[derive(Debug)]
pub(super) enum Fault {
    Sqlite(SqliteError),
    /// A row that this program can't have written.
    Corrupt(String),
    /// A record that can't be written after what is.
    Refused(String),
}

impl Fault {
    /// The error of opening or reading `path`.
    pub(super) fn while_opening(self, path: &Path) -> JournalError {
        let path = path.to_owned();
        match self {
            Self::Sqlite(e) => match e.sqlite_error_code() {
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => JournalError::Held { path },
                Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                    JournalError::Corrupt { path, detail: e.to_string() }
                }
                Some(ErrorCode::DiskFull) => JournalError::DiskFull { path },
                Some(_) => JournalError::Open { path, reason: e.to_string() },
                // Not SQLite failed but the reading of a column.
                None => JournalError::Corrupt { path, detail: e.to_string() },
            },
            Self::Corrupt(detail) => JournalError::Corrupt { path, detail },
            Self::Refused(reason) => JournalError::Open { path, reason },
        }
    }

    /// The error of writing a copy, which leaves the journal itself as it was.
    pub(super) fn while_copying(self, to: &Path) -> JournalError {
        match self.while_opening(to) {
            JournalError::Held { path } => {
                JournalError::Open { path, reason: "the journal is busy; try again".into() }
            }
            error => error,
        }
    }

    /// The error of writing a record into `path`. [`JournalError::Refused`] concerns this record
    /// alone, every other one the whole transaction.
    pub(super) fn while_writing(self, path: &Path, record: impl FnOnce() -> String) -> JournalError {
        let path = path.to_owned();
        match self {
            Self::Sqlite(e) => match e.sqlite_error_code() {
                Some(ErrorCode::ConstraintViolation) => {
                    JournalError::Refused { record: record(), reason: e.to_string() }
                }
                Some(ErrorCode::DiskFull) => JournalError::DiskFull { path },
                _ => JournalError::Io { path, reason: e.to_string() },
            },
            Self::Refused(reason) => JournalError::Refused { record: record(), reason },
            Self::Corrupt(reason) => JournalError::Io { path, reason },
        }
    }
}

impl From<SqliteError> for Fault {
    fn from(error: SqliteError) -> Self {
        Self::Sqlite(error)
    }
}

impl From<CodecError> for Fault {
    fn from(error: CodecError) -> Self {
        Self::Corrupt(error.to_string())
    }
}

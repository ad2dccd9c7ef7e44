use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use crate::{
    protocol::Epoch,
    types::{Digest, RunId},
};

use super::{
    Goal, Record, Recovered, Way, copy,
    error::{Fault, JournalError},
    recover, rows, way,
};

/// Name of the journal in the data directory.
pub const FILE: &str = "journal.sqlite";

/// Version of schema.sql and of the payloads in it.
const SCHEMA_VERSION: i64 = 4;

/// From the version of its place to the next; the first is version 2.
const MIGRATIONS: [&str; 2] = [
    "ALTER TABLE run ADD COLUMN key BLOB;
    CREATE UNIQUE INDEX run_key ON run (session, key);
    ALTER TABLE leader ADD COLUMN last_deleted_run INTEGER NOT NULL DEFAULT 0;",
    "CREATE TABLE drained (node TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
    CREATE TABLE certificate (
        role TEXT NOT NULL, name TEXT NOT NULL, ca BLOB NOT NULL,
        issued_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, PRIMARY KEY (role, name)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE revocation (
        role TEXT NOT NULL, name TEXT NOT NULL, upto INTEGER NOT NULL, PRIMARY KEY (role, name)
    ) STRICT, WITHOUT ROWID;",
];

/// The oldest version that can be brought to ours.
const OLDEST_VERSION: i64 = SCHEMA_VERSION - MIGRATIONS.len() as i64;

/// "LkSt": marks an SQLite file as ours, beside its version.
const APPLICATION_ID: i64 = 0x4c6b_5374;

/// Pages (of 4 KiB) after which the log is folded into the file: 16 MiB. Each folding syncs
/// both, so fewer are better; a restart reads the log from its start.
const CHECKPOINT_PAGES: u32 = 4096;

/// The open file, locked against every other process for as long as this lives.
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
}

impl Database {
    /// Opens or makes the journal of `directory`, raises the epoch and reads everything.
    pub(super) fn open(directory: &Path) -> Result<(Self, Recovered), JournalError> {
        let path = directory.join(FILE);
        let unopenable = |e: io::Error| JournalError::Open { path: path.clone(), reason: e.to_string() };
        fs::create_dir_all(directory).map_err(unopenable)?;
        let mut connection = lock(&path)?;
        prepare(&mut connection, &path)?;
        // SQLite syncs what is in the file; that the file is in its directory is up to us.
        File::open(directory).and_then(|d| d.sync_all()).map_err(unopenable)?;

        let opening = |fault: Fault| fault.while_opening(&path);
        let epoch = raise_epoch(&mut connection).map_err(opening)?;
        let recovered = recover::read(&connection, epoch).map_err(opening)?;
        Ok((Self { connection, path }, recovered))
    }

    /// Writes each append wholly or not at all, all in one transaction, and says what became of
    /// each. They are durable when this returns.
    pub(super) fn write<'a>(
        &mut self,
        appends: impl ExactSizeIterator<Item = &'a [Record]>,
    ) -> Vec<Result<(), JournalError>> {
        let count = appends.len();
        match self.write_transaction(appends) {
            Ok(verdicts) => verdicts,
            // A full disk or a broken one: SQLite may have rolled back more than the append
            // that met it, so nothing of the transaction stays.
            Err(error) => vec![Err(error); count],
        }
    }

    /// Those of `digests` that no row names.
    pub(super) fn unnamed(&self, digests: Vec<Digest>) -> Result<Vec<Digest>, JournalError> {
        recover::unnamed(&self.connection, digests)
            .map_err(|fault| fault.while_writing(&self.path, || "looking blobs up".into()))
    }

    /// The operations that lead a run to a step.
    pub(super) fn way_to(&self, run: RunId, goal: Goal) -> Result<Way, JournalError> {
        way::way_to(&self.connection, run, goal)
            .map_err(|fault| fault.while_writing(&self.path, || format!("reading the history of {run}")))
    }

    /// Writes all of it into a new file.
    pub(super) fn copy(&self, to: &Path) -> Result<(), JournalError> {
        copy::copy(&self.connection, to).map_err(|fault| fault.while_copying(to))
    }

    fn write_transaction<'a>(
        &mut self,
        appends: impl Iterator<Item = &'a [Record]>,
    ) -> Result<Vec<Result<(), JournalError>>, JournalError> {
        let path = &self.path;
        let failed = |e: rusqlite::Error| Fault::Sqlite(e).while_writing(path, || "a transaction".into());
        let mut transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let mut verdicts = Vec::new();
        for records in appends {
            let savepoint = transaction.savepoint().map_err(failed)?;
            let written = records.iter().try_for_each(|record| {
                rows::write(&savepoint, record).map_err(|e| e.while_writing(path, || record.to_string()))
            });
            match written {
                Ok(()) => savepoint.commit().map_err(failed)?,
                Err(JournalError::Refused { .. }) => savepoint.finish().map_err(failed)?,
                Err(error) => return Err(error),
            }
            verdicts.push(written);
        }
        transaction.commit().map_err(failed)?;
        Ok(verdicts)
    }
}

/// Opens the file and takes its lock, changing nothing in it.
fn lock(path: &Path) -> Result<Connection, JournalError> {
    let locked = || -> Result<Connection, rusqlite::Error> {
        // No mutex: one thread at a time has the connection. No URI: a path is a path.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        // Whoever holds it holds it until it exits: waiting would only delay the message.
        connection.busy_timeout(std::time::Duration::ZERO)?;
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        // The first read takes the lock, which this mode never gives back.
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(connection)
    };
    locked().map_err(|e| Fault::from(e).while_opening(path))
}

/// Checks that the file is whole and ours, or makes it so if it is new.
fn prepare(connection: &mut Connection, path: &Path) -> Result<(), JournalError> {
    let opening = |e: rusqlite::Error| Fault::from(e).while_opening(path);
    let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let (application, version) =
        (pragma("application_id").map_err(opening)?, pragma("user_version").map_err(opening)?);
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(opening)?;
    let new = (application, version, tables) == (0, 0, 0);
    if !new && application != APPLICATION_ID {
        return Err(JournalError::Foreign { path: path.to_owned() });
    }
    if !new && !(OLDEST_VERSION..=SCHEMA_VERSION).contains(&version) {
        return Err(JournalError::Version { path: path.to_owned(), found: version, ours: SCHEMA_VERSION });
    }
    configure(connection).map_err(opening)?;
    if new {
        make_tables(connection).map_err(opening)?;
    } else {
        migrate(connection, version).map_err(opening)?;
    }
    let health: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(opening)?;
    match health.as_str() {
        "ok" => Ok(()),
        _ => Err(JournalError::Corrupt { path: path.to_owned(), detail: health }),
    }
}

fn configure(connection: &Connection) -> Result<(), rusqlite::Error> {
    // This one answers with the mode that it got.
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // On macOS a plain fsync leaves data in the drive's cache; elsewhere these two do nothing.
    connection.pragma_update(None, "fullfsync", true)?;
    connection.pragma_update(None, "checkpoint_fullfsync", true)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

fn make_tables(connection: &mut Connection) -> Result<(), rusqlite::Error> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(include_str!("schema.sql"))?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()
}

/// Brings the tables of an earlier version to ours, step by step and all at once.
fn migrate(connection: &mut Connection, from: i64) -> Result<(), rusqlite::Error> {
    let steps = &MIGRATIONS[(from - OLDEST_VERSION) as usize..];
    if steps.is_empty() {
        return Ok(());
    }
    let transaction = connection.transaction()?;
    steps.iter().try_for_each(|step| transaction.execute_batch(step))?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()
}

/// The new epoch, durable.
fn raise_epoch(connection: &mut Connection) -> Result<Epoch, Fault> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let epoch: i64 = transaction.query_row(
        "INSERT INTO leader (id, epoch) VALUES (1, 1)
         ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1 RETURNING epoch",
        [],
        |row| row.get(0),
    )?;
    transaction.commit()?;
    Ok(Epoch(rows::unsigned(epoch)?))
}

use rusqlite::Connection;

use super::*;

fn file(directory: &Path) -> std::path::PathBuf {
    directory.join("journal.sqlite")
}

/// A closed journal with one operation in it.
fn written() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let data = Payload::Inline((0..60_000u32).map(|n| n as u8).collect());
    write(&journal, vec![session(1), run(1), operation(1, 1, 1, forward_backward(data))]).unwrap();
    journal.close();
    directory
}

fn refused(directory: &Path) -> JournalError {
    Journal::open(directory).err().unwrap()
}

#[test]
fn a_second_opener_is_refused_until_the_first_is_gone() {
    let directory = written();
    let (first, _) = Journal::open(directory.path()).unwrap();
    let error = refused(directory.path());
    assert_eq!(error, JournalError::Held { path: file(directory.path()) });
    assert!(error.to_string().contains("in use by another coordinator"), "{error}");
    write(&first, vec![session(2)]).unwrap();
    first.close();
    assert_eq!(recover(directory.path()).sessions.len(), 2);
}

#[test]
fn another_version_is_refused_with_both_numbers_and_not_changed() {
    let directory = written();
    let set = Connection::open(file(directory.path())).unwrap();
    set.pragma_update(None, "user_version", 7).unwrap();
    drop(set);
    let before = std::fs::read(file(directory.path())).unwrap();
    let error = refused(directory.path());
    assert!(matches!(error, JournalError::Version { found: 7, ours: 4, .. }), "{error}");
    assert!(error.to_string().contains("version 7") && error.to_string().contains("reads 4"), "{error}");
    assert_eq!(std::fs::read(file(directory.path())).unwrap(), before);
}

#[test]
fn the_file_of_another_program_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let other = Connection::open(file(directory.path())).unwrap();
    other.execute_batch("CREATE TABLE note (text TEXT)").unwrap();
    drop(other);
    assert!(matches!(refused(directory.path()), JournalError::Foreign { .. }));
}

#[test]
fn a_file_that_is_no_database_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(file(directory.path()), [7; 8192]).unwrap();
    let error = refused(directory.path());
    assert!(matches!(error, JournalError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("journal.sqlite is damaged"), "{error}");
    assert_eq!(std::fs::read(file(directory.path())).unwrap(), [7; 8192]);
}

#[test]
fn a_damaged_page_is_refused() {
    let directory = written();
    let mut bytes = std::fs::read(file(directory.path())).unwrap();
    // Every page but the first, whose header says what the file is.
    bytes[4096..].iter_mut().step_by(5).for_each(|byte| *byte ^= 0x55);
    std::fs::write(file(directory.path()), bytes).unwrap();
    let error = refused(directory.path());
    assert!(matches!(error, JournalError::Corrupt { .. }), "{error}");
}

#[test]
fn a_truncated_file_is_refused() {
    let directory = written();
    let bytes = std::fs::read(file(directory.path())).unwrap();
    std::fs::write(file(directory.path()), &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(refused(directory.path()), JournalError::Corrupt { .. }));
}

#[test]
fn a_flipped_bit_inside_a_payload_is_refused() {
    let directory = written();
    let mut bytes = std::fs::read(file(directory.path())).unwrap();
    // The payload counts up; its middle is on an overflow page, where SQLite itself checks nothing.
    let pattern: Vec<u8> = (100..200).collect();
    let at = bytes.windows(pattern.len()).rposition(|window| window == pattern).unwrap();
    bytes[at] ^= 1;
    std::fs::write(file(directory.path()), bytes).unwrap();
    let error = refused(directory.path());
    assert!(error.to_string().contains("operation 1 does not match its digest"), "{error}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let blocked = tempfile::NamedTempFile::new().unwrap();
    let error = refused(&blocked.path().join("data"));
    assert!(matches!(error, JournalError::Open { .. }), "{error}");
    assert!(error.to_string().contains(&blocked.path().display().to_string()), "{error}");
}

#[test]
fn a_journal_of_version_2_is_brought_to_ours_with_all_that_is_in_it() {
    let directory = written();
    let old = Connection::open(file(directory.path())).unwrap();
    old.execute_batch(
        "DROP TABLE drained; DROP TABLE certificate; DROP TABLE revocation;
         DROP INDEX run_key; ALTER TABLE run DROP COLUMN key;
         ALTER TABLE leader DROP COLUMN last_deleted_run; PRAGMA user_version = 2;",
    )
    .unwrap();
    drop(old);
    let found = recover(directory.path());
    assert_eq!((found.runs.len(), found.runs[0].operations.len(), found.runs[0].key), (1, 1, None));
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let keyed = match run(2) {
        Record::Run { run, create, model_digest, created_at_ms, .. } => {
            Record::Run { run, create, model_digest, key: Some(OperationKey([4; 16])), created_at_ms }
        }
        _ => unreachable!("a run"),
    };
    write(&journal, vec![keyed]).unwrap();
    journal.close();
    assert_eq!(recover(directory.path()).runs[1].key, Some(OperationKey([4; 16])));
}

/// A column's name, type, whether it may be null, and its place in the key.
type Column = (String, String, bool, i64);

#[test]
fn a_journal_of_version_3_gets_the_tables_that_a_new_one_has() {
    let tables = |directory: &Path| -> Vec<(String, Vec<Column>)> {
        let db = Connection::open(file(directory)).unwrap();
        let mut names =
            db.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").unwrap();
        let names: Vec<String> = names.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        let columns = |name: &String| {
            let mut columns = db.prepare(&format!("PRAGMA table_info({name})")).unwrap();
            let read = |row: &rusqlite::Row<'_>| Ok((row.get(1)?, row.get(2)?, row.get(3)?, row.get(5)?));
            columns.query_map([], read).unwrap().map(Result::unwrap).collect()
        };
        names.iter().map(|name| (name.clone(), columns(name))).collect()
    };
    let (directory, new) = (written(), written());
    let old = Connection::open(file(directory.path())).unwrap();
    let without =
        "DROP TABLE drained; DROP TABLE certificate; DROP TABLE revocation; PRAGMA user_version = 3;";
    old.execute_batch(without).unwrap();
    drop(old);
    assert_eq!(recover(directory.path()).runs.len(), 1);
    assert_eq!(tables(directory.path()), tables(new.path()));
}

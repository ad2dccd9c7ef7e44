//! What is left after the process or the power went.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use proptest::prelude::*;

use super::*;

/// Set for the child process of `a_killed_process_loses_only_what_it_was_not_told`.
const CHILD_DIRECTORY: &str = "LOCKSTEP_TEST_JOURNAL";

/// Two records an append, so that half of one would show.
fn pair(n: u64) -> Vec<Record> {
    vec![session(2 * n), session(2 * n + 1)]
}

/// Appends without end, and says which are durable.
#[test]
fn child() {
    let Some(directory) = std::env::var_os(CHILD_DIRECTORY) else { return };
    let (journal, recovered) = Journal::open(Path::new(&directory)).unwrap();
    let first = recovered.sessions.len() as u64 / 2;
    for n in first.. {
        journal.append(
            pair(n),
            Box::new(move |outcome| match outcome {
                Ok(()) => println!("durable {n}"),
                Err(JournalError::Full { .. }) => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }),
        );
        if n % 8 == 0 {
            write(&journal, vec![]).unwrap();
        }
    }
}

#[test]
fn a_killed_process_loses_only_what_it_was_not_told() {
    let directory = tempfile::tempdir().unwrap();
    let mut known = 0;
    for life in 1..=3u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "journal::tests::crash::child", "--nocapture"])
            .env(CHILD_DIRECTORY, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        // Killed at another place in each life, with appends queued and perhaps half-written.
        let durable = lines.by_ref().filter_map(|line| line.split_once("durable ")?.1.parse().ok());
        let last: u64 = durable.take(20 * life as usize).last().unwrap();
        assert!(matches!(refused_while_alive(directory.path()), JournalError::Held { .. }));
        child.kill().unwrap();
        child.wait().unwrap();

        let recovered = recover(directory.path());
        let sessions: Vec<_> = recovered.sessions.iter().map(|session| session.0).collect();
        assert_eq!(sessions.len() % 2, 0, "an append is there in half");
        assert!(sessions.len() as u64 > 2 * last, "an acknowledged append is gone");
        assert!(sessions.iter().copied().eq(0..sessions.len() as u64), "an append before another is gone");
        assert_eq!(recovered.epoch, Epoch(2 * life));
        known = known.max(sessions.len());
    }
    assert!(known >= 2 * 60);
}

fn refused_while_alive(directory: &Path) -> JournalError {
    Journal::open(directory).err().unwrap()
}

/// The files of a journal whose log holds `appends` pairs, as they are while it is open.
fn files(appends: u64) -> (Vec<u8>, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    for n in 0..appends {
        write(&journal, pair(n)).unwrap();
    }
    let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
    (read("journal.sqlite"), read("journal.sqlite-wal"))
}

fn recover_from(database: &[u8], log: &[u8]) -> Vec<u64> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("journal.sqlite"), database).unwrap();
    std::fs::write(directory.path().join("journal.sqlite-wal"), log).unwrap();
    recover(directory.path()).sessions.iter().map(|session| session.0).collect()
}

#[test]
fn a_log_cut_anywhere_holds_the_first_appends_whole() {
    let (database, log) = files(6);
    assert_eq!(recover_from(&database, &log).len(), 12);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    // Cut: the tail never reached the disk. Flipped: a page of it did in part.
    let damage = (0..log.len(), any::<bool>());
    runner
        .run(&damage, |(at, cut)| {
            let mut left = log.clone();
            match cut {
                true => left.truncate(at),
                false => left[at] ^= 0x40,
            }
            let sessions = recover_from(&database, &left);
            prop_assert_eq!(sessions.len() % 2, 0);
            prop_assert!(sessions.iter().copied().eq(0..sessions.len() as u64));
            Ok(())
        })
        .unwrap();
}

#[test]
fn what_was_never_committed_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    write(&journal, pair(0)).unwrap();
    journal.close();
    // As a process would leave it that dies between writing the rows and the commit.
    let database = rusqlite::Connection::open(directory.path().join("journal.sqlite")).unwrap();
    database.execute_batch("BEGIN IMMEDIATE; INSERT INTO session VALUES (7, NULL, 7)").unwrap();
    drop(database);
    assert_eq!(recover(directory.path()).sessions, [0, 1].map(SessionId));
}

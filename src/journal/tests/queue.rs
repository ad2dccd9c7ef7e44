use super::*;

/// Keeps the writer thread inside a `done` until the returned sender goes.
fn hold_writer(journal: &Journal) -> mpsc::Sender<()> {
    let (release, released) = mpsc::channel::<()>();
    let (reached, at_done) = mpsc::channel();
    journal.append(
        vec![],
        Box::new(move |_| {
            reached.send(()).unwrap();
            let _ = released.recv();
        }),
    );
    at_done.recv().unwrap();
    release
}

#[test]
fn done_is_called_in_the_order_of_the_calls() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let (answer, answers) = mpsc::channel();
    for n in 0..100 {
        let answer = answer.clone();
        journal.append(vec![session(n)], Box::new(move |outcome| answer.send((n, outcome)).unwrap()));
    }
    drop(answer);
    for n in 0..100 {
        assert_eq!(answers.recv().unwrap(), (n, Ok(())));
    }
    journal.close();
    assert_eq!(recover(directory.path()).sessions.len(), 100);
}

#[test]
fn a_full_queue_says_so_at_once_and_keeps_what_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let release = hold_writer(&journal);
    let (answer, answers) = mpsc::channel();
    let here = std::thread::current().id();
    for n in 0..=QUEUE_APPENDS as u64 {
        let answer = answer.clone();
        let done = move |outcome| answer.send((n, outcome, std::thread::current().id() == here)).unwrap();
        journal.append(vec![session(n)], Box::new(done));
    }
    let limit = QUEUE_APPENDS;
    assert_eq!(answers.recv().unwrap(), (limit as u64, Err(JournalError::Full { limit }), true));
    drop(release);
    journal.close();
    drop(answer);
    assert_eq!(answers.into_iter().filter(|(_, outcome, _)| outcome.is_ok()).count(), limit);
    assert_eq!(recover(directory.path()).sessions.len(), limit);
}

#[test]
fn an_append_after_closing_is_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    journal.clone().close();
    assert_eq!(write(&journal, vec![session(1)]), Err(JournalError::Closed));
    journal.close();
    assert_eq!(recover(directory.path()).sessions, []);
}

#[test]
fn closing_writes_what_has_queued_and_closes_what_comes_behind() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let release = hold_writer(&journal);
    let (answer, answers) = mpsc::channel();
    let append = |n| {
        let answer = answer.clone();
        journal.append(vec![session(n)], Box::new(move |outcome| answer.send((n, outcome)).unwrap()));
    };
    append(1);
    journal.0.queue.send(Command::Close).unwrap();
    append(2);
    drop(release);
    assert_eq!(answers.recv().unwrap(), (1, Ok(())));
    assert_eq!(answers.recv().unwrap(), (2, Err(JournalError::Closed)));
}

#[test]
fn dropping_the_last_handle_writes_what_has_queued() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    journal.append(vec![session(1)], Box::new(|outcome| outcome.unwrap()));
    drop(journal);
    assert_eq!(recover(directory.path()).sessions, [SessionId(1)]);
}

#[test]
fn the_last_handle_may_go_on_the_writer_thread() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    let (ended, end) = mpsc::channel::<()>();
    let last = journal.clone();
    let release = hold_writer(&journal);
    journal.append(
        vec![session(1)],
        Box::new(move |outcome| {
            outcome.unwrap();
            drop((last, ended));
        }),
    );
    drop(journal);
    drop(release);
    end.recv().unwrap_err();
}

use std::sync::mpsc::{Receiver, TryRecvError};

use super::{Record, database::Database, error::JournalError};

/// Most appends in one transaction: what waits longest waits for one commit of this many.
const GROUP_APPENDS: usize = 1024;

/// Called once, with what became of an append.
pub(super) type Done = Box<dyn FnOnce(Result<(), JournalError>) + Send>;

/// What the writer thread is asked to do.
pub(super) enum Command {
    Append(Append),
    Ask(Question),
    /// Finish what came before and close the file.
    Close,
}

/// Looks something up between two commits.
pub(super) struct Question(Box<Ask>);

type Ask = dyn FnOnce(Result<&Database, JournalError>) + Send;

impl Question {
    pub(super) fn new<T>(
        question: impl FnOnce(&Database) -> Result<T, JournalError> + Send + 'static,
        done: impl FnOnce(Result<T, JournalError>) + Send + 'static,
    ) -> Self {
        Self(Box::new(move |database| done(database.and_then(question))))
    }

    pub(super) fn answer(self, database: Result<&Database, JournalError>) {
        (self.0)(database);
    }
}

/// What ends a group of appends.
enum Then {
    GoOn,
    Ask(Question),
    Close,
}

/// Facts on their way to the disk. Dropped unwritten, it says so.
pub(super) struct Append {
    records: Vec<Record>,
    done: Option<Done>,
}

impl Append {
    pub(super) fn new(records: Vec<Record>, done: Done) -> Self {
        Self { records, done: Some(done) }
    }

    pub(super) fn finish(mut self, outcome: Result<(), JournalError>) {
        if let Some(done) = self.done.take() {
            done(outcome);
        }
    }
}

impl Drop for Append {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done(Err(JournalError::Closed));
        }
    }
}

/// The writer thread: commits what has queued, in order, until it is told to close or nobody is
/// left to ask.
pub(super) fn run(mut database: Database, queue: Receiver<Command>) {
    let mut broken = None;
    while let Ok(first) = queue.recv() {
        let (group, then) = gather(first, &queue);
        let span = tracing::debug_span!("commit", appends = group.len()).entered();
        let verdicts = match &broken {
            None => database.write(group.iter().map(|append| append.records.as_slice())),
            Some(error) => vec![Err(JournalError::clone(error)); group.len()],
        };
        drop(span);
        // After a failed sync the kernel may have dropped what it could not write, and the next
        // sync would succeed without it: only opening the file again tells what is in it.
        broken = verdicts.iter().find_map(|verdict| match verdict {
            Err(error @ JournalError::Io { .. }) => Some(error.clone()),
            _ => None,
        });
        for (append, verdict) in group.into_iter().zip(verdicts) {
            append.finish(verdict);
        }
        match then {
            Then::GoOn => {}
            Then::Ask(question) => question.answer(match &broken {
                None => Ok(&database),
                Some(error) => Err(error.clone()),
            }),
            Then::Close => break,
        }
    }
}

/// What has queued behind `first`, and what to do after it.
fn gather(first: Command, queue: &Receiver<Command>) -> (Vec<Append>, Then) {
    let mut group = Vec::new();
    let mut next = Ok(first);
    loop {
        match next {
            Ok(Command::Append(append)) => group.push(append),
            Ok(Command::Ask(question)) => return (group, Then::Ask(question)),
            Ok(Command::Close) | Err(TryRecvError::Disconnected) => return (group, Then::Close),
            Err(TryRecvError::Empty) => return (group, Then::GoOn),
        }
        if group.len() == GROUP_APPENDS {
            return (group, Then::GoOn);
        }
        next = queue.try_recv();
    }
}

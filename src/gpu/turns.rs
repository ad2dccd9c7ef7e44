use std::sync::{Condvar, Mutex, PoisonError};

/// Who uses a GPU next: in the order in which they came, so that neither the micro-batches of a
/// rank nor the steps of a replica starve the other.
#[derive(Default)]
pub(super) struct Turns {
    tickets: Mutex<Tickets>,
    next: Condvar,
}

#[derive(Default)]
struct Tickets {
    drawn: u64,
    serving: u64,
}

/// The right to use a GPU, until it is dropped.
pub struct Turn<'a>(&'a Turns);

impl Turns {
    pub(super) fn take(&self) -> Turn<'_> {
        let mut tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = tickets.drawn;
        tickets.drawn += 1;
        while tickets.serving != mine {
            tickets = self.next.wait(tickets).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.tickets.lock().unwrap_or_else(PoisonError::into_inner).serving += 1;
        self.0.next.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn turns_come_in_the_order_of_asking() {
        let turns = Turns::default();
        let (report, order) = mpsc::channel();
        thread::scope(|scope| {
            let first = turns.take();
            for number in 0..4u64 {
                let (turns, report) = (&turns, report.clone());
                scope.spawn(move || {
                    let _turn = turns.take();
                    report.send(number).unwrap();
                });
                // The next one asks only when this one has its ticket.
                while turns.tickets.lock().unwrap().drawn < number + 2 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            drop(first);
        });
        drop(report);
        assert_eq!(order.iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
    }
}

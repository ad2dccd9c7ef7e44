use std::{
    sync::{
        Barrier, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use super::{CoreBudget, Priority, Team};

#[test]
fn every_task_runs_once_whatever_the_width() {
    for cores in [1, 2, 5] {
        let budget = CoreBudget::new(cores);
        let lease = budget.lease(cores, Priority::Training);
        assert_eq!(lease.team().width(), cores);
        for tasks in [0, 1, 2, 7, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            lease.team().run(tasks, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }
    assert_eq!(Team::solo().width(), 1);
}

#[test]
fn workers_take_part() {
    let budget = CoreBudget::new(3);
    let lease = budget.lease(3, Priority::Training);
    // Each task waits for the two others, so three threads must have one each.
    let together = Barrier::new(3);
    let threads = Mutex::new(std::collections::HashSet::new());
    lease.team().run(3, |_| {
        together.wait();
        threads.lock().unwrap().insert(thread::current().id());
    });
    assert_eq!(threads.lock().unwrap().len(), 3);
}

#[test]
fn a_panicking_task_panics_in_the_caller_and_spares_the_pool() {
    let budget = CoreBudget::new(2);
    let lease = budget.lease(2, Priority::Training);
    let done = AtomicUsize::new(0);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        lease.team().run(64, |i| {
            done.fetch_add(1, Ordering::Relaxed);
            assert_ne!(i, 40, "task 40 fails");
        });
    }));
    assert!(outcome.is_err());
    assert_eq!(done.load(Ordering::Relaxed), 64);
    lease.team().run(64, |_| {
        done.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(done.load(Ordering::Relaxed), 128);
}

#[test]
fn leases_never_exceed_the_budget() {
    let budget = CoreBudget::new(3);
    let used = AtomicUsize::new(0);
    thread::scope(|scope| {
        for i in 0..6 {
            let (budget, used) = (budget.clone(), &used);
            let priority = if i % 2 == 0 { Priority::Training } else { Priority::Sampling };
            scope.spawn(move || {
                for want in (1..=4).cycle().take(200) {
                    let lease = budget.lease(want, priority);
                    let width = lease.team().width();
                    assert!((1..=want).contains(&width));
                    assert!(used.fetch_add(width, Ordering::SeqCst) + width <= 3);
                    lease.team().run(4, |_| ());
                    used.fetch_sub(width, Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(used.load(Ordering::SeqCst), 0);
    assert_eq!(budget.lease(3, Priority::Training).team().width(), 3, "all cores came back");
}

#[test]
fn training_goes_first() {
    let budget = CoreBudget::new(1);
    let held = budget.lease(1, Priority::Sampling);
    let (order, arrivals) = mpsc::channel();
    thread::scope(|scope| {
        for priority in [Priority::Sampling, Priority::Training] {
            let (budget, order) = (&budget, order.clone());
            scope.spawn(move || {
                let lease = budget.lease(1, priority);
                order.send(priority).unwrap();
                drop(lease);
            });
            // Sampling asks first: it must be in the queue before training comes.
            while budget.waiting(priority) == 0 {
                thread::yield_now();
            }
        }
        drop(held);
        assert_eq!(arrivals.recv().unwrap(), Priority::Training);
        assert_eq!(arrivals.recv().unwrap(), Priority::Sampling);
    });
}

#[test]
fn two_ranks_on_two_cores_get_one_each() {
    let budget = CoreBudget::new(2);
    let first = budget.lease(2, Priority::Training);
    assert_eq!(first.team().width(), 2, "alone, it takes all");
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            // A lease belongs to its thread; what it got is all that leaves it.
            let lease = budget.lease(2, Priority::Training);
            (lease.team().width(), budget.lease_of_another_rank())
        });
        while budget.waiting(Priority::Training) == 0 {
            thread::yield_now();
        }
        drop(first);
        assert_eq!(other.join().unwrap(), (1, 1));
    });
    // The rival does not come back: after a while the share is whole again.
    for _ in 0..16 {
        drop(budget.lease(2, Priority::Training));
    }
    assert_eq!(budget.lease(2, Priority::Training).team().width(), 2);
}

impl CoreBudget {
    /// What a rank that asks for two cores gets, on a thread of its own.
    fn lease_of_another_rank(&self) -> usize {
        let budget = self.clone();
        thread::spawn(move || budget.lease(2, Priority::Training).team().width()).join().unwrap()
    }
}

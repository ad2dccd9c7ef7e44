//! Sleeping until a word in shared memory changes.

use std::{sync::atomic::AtomicU32, time::Duration};

/// Returns when `word` was rung since it was `seen`, after `timeout`, or for no reason.
#[cfg(target_os = "linux")]
pub(super) fn wait(word: &AtomicU32, seen: u32, timeout: Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: timeout.subsec_nanos() as libc::c_long,
    };
    // SAFETY: the word and the time are valid for the call; the kernel only compares the word.
    // Not the private kind: the other side may be another process. Every result is a reason to
    // look again.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const timeout);
    }
}

/// Wakes everyone who waits for `word`, in any process.
#[cfg(target_os = "linux")]
pub(super) fn wake_all(word: &AtomicU32) {
    // SAFETY: the kernel uses the address of a live word as a key, and touches no memory.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}

/// Without futexes: looks again within a millisecond.
#[cfg(not(target_os = "linux"))]
pub(super) fn wait(_: &AtomicU32, _: u32, timeout: Duration) {
    std::thread::sleep(timeout.min(Duration::from_millis(1)));
}

#[cfg(not(target_os = "linux"))]
pub(super) fn wake_all(_: &AtomicU32) {}

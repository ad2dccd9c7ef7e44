//! Clocks and medians.

use serde::{Deserialize, Serialize};

/// One thing that one process did, on the clock that all processes of a machine share.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Span {
    /// Seconds on the monotonic clock.
    pub start_s: f64,
    pub end_s: f64,
    /// CPU time that the whole process used meanwhile, kernel included.
    pub cpu_s: f64,
}

impl Span {
    /// Runs `body` and takes its time.
    pub fn of<T>(body: impl FnOnce() -> T) -> (Self, T) {
        let (start_s, cpu) = (clock(libc::CLOCK_MONOTONIC), clock(libc::CLOCK_PROCESS_CPUTIME_ID));
        let done = body();
        let end_s = clock(libc::CLOCK_MONOTONIC);
        (Self { start_s, end_s, cpu_s: clock(libc::CLOCK_PROCESS_CPUTIME_ID) - cpu }, done)
    }

    /// From the first start to the last end, and the CPU time of all.
    pub fn together(spans: &[Self]) -> Self {
        let start_s = spans.iter().map(|span| span.start_s).fold(f64::INFINITY, f64::min);
        let end_s = spans.iter().map(|span| span.end_s).fold(f64::NEG_INFINITY, f64::max);
        Self { start_s, end_s, cpu_s: spans.iter().map(|span| span.cpu_s).sum() }
    }

    pub fn seconds(&self) -> f64 {
        self.end_s - self.start_s
    }
}

/// The middle of some values, the upper one of two; NaN of none.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn clock(id: libc::clockid_t) -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time it is given; both clocks exist on every platform that Lockstep builds for.
    unsafe { libc::clock_gettime(id, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_and_spans_join() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0]), 4.0);
        assert!(median([]).is_nan());
        let of = |start_s, end_s| Span { start_s, end_s, cpu_s: 0.5 };
        let joined = Span::together(&[of(1.0, 2.0), of(1.5, 4.0)]);
        assert_eq!((joined.seconds(), joined.cpu_s), (3.0, 1.0));
    }

    #[test]
    fn cpu_time_is_the_process_s() {
        let (span, sum) = Span::of(|| (0..20_000_000u64).fold(0, |sum, i| sum ^ std::hint::black_box(i)));
        std::hint::black_box(sum);
        assert!(span.cpu_s > 0.0 && span.seconds() > 0.0, "{span:?}");
    }
}

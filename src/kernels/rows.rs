//! Work that goes row by row.

use std::ops::Range;

use super::Team;

/// Values of a task: a few hundred KiB, enough that waking a thread pays.
const TASK_VALUES: usize = 64 * 1024;

/// Runs `work` over ranges of rows of `row_len` values; little work stays on the caller's thread.
pub(crate) fn for_rows(team: &Team, rows: usize, row_len: usize, work: impl Fn(Range<usize>) + Sync) {
    let tasks = (rows * row_len).div_ceil(TASK_VALUES).min(rows);
    team.run(tasks, |task| work(rows * task / tasks..rows * (task + 1) / tasks));
}

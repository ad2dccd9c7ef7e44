//! How a run came to a step: the nearest snapshot that is kept, and what changed the state after it.
//!
//! ```text
//!   snapshots kept      ▼ 8              ▼ 16                      (oldest: nothing before it is left)
//!   steps           …   8  9 … 15   16   17 … 20
//!                           └── way to 12: from 8, repeat 9 to 12
//! ```

use rusqlite::{Connection, OptionalExtension, params};

use crate::types::RunId;

use super::{
    RecoveredOperation, RecoveredSnapshot,
    error::Fault,
    recover::{read_operation, read_snapshots},
    rows::{signed, unsigned},
};

/// Most operations that lead from one snapshot to the next: far more than a run takes between two.
const OPERATIONS_MAX: i64 = 4_096;

/// Operations after which a state is the one of a step, and nothing has accumulated.
const STEPS: &str = "FROM operation JOIN outcome USING (run, seq)
    WHERE run = ?1 AND state IS NOT NULL AND kind IN ('init', 'optim_step', 'load_state') AND seq >= ?2";

/// Where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Goal {
    /// Of the last life of the run that came to it.
    pub step: u64,
    /// Begins at an earlier snapshot though there is one of the step itself.
    pub recompute: bool,
}

/// What leads there.
#[derive(Debug, Clone, PartialEq)]
pub enum Way {
    To {
        /// Absent: from the run's beginning.
        from: Option<RecoveredSnapshot>,
        /// In order, with their data and outcomes.
        operations: Vec<RecoveredOperation>,
    },
    /// History doesn't reach there: the first and the last step that it reaches.
    Beyond { reach: Option<(u64, u64)> },
}

pub(super) fn way_to(db: &Connection, run: RunId, goal: Goal) -> Result<Way, Fault> {
    let (id, step) = (signed(run.0)?, signed(goal.step)?);
    let snapshots = read_snapshots(db, id)?;
    // Of operations up to the oldest snapshot no data is left.
    let oldest = snapshots.first().map_or(0, |snapshot| snapshot.seq.0);
    let first = signed(oldest)? + i64::from(goal.recompute && !snapshots.is_empty());
    let target: Option<i64> = db
        .prepare_cached(&format!("SELECT max(seq) {STEPS} AND step = ?3"))?
        .query_row(params![id, first, step], |row| row.get(0))?;
    let Some(target) = target else { return beyond(db, id, first) };
    let before = |snapshot: &&RecoveredSnapshot| match goal.recompute {
        true => signed(snapshot.seq.0).is_ok_and(|seq| seq < target),
        false => signed(snapshot.seq.0).is_ok_and(|seq| seq <= target),
    };
    let from = snapshots.iter().rfind(before).cloned();
    let base = signed(from.as_ref().map_or(0, |snapshot| snapshot.seq.0))?;
    let mut statement = db.prepare_cached(
        "SELECT seq, key, incarnation, operation.payload, digest, outcome.payload, state, step
         FROM operation JOIN outcome USING (run, seq)
         WHERE run = ?1 AND seq > ?2 AND seq <= ?3
           AND (kind = 'optim_step' OR (state IS NOT NULL AND kind IN ('init', 'forward_backward', 'load_state')))
         ORDER BY seq LIMIT ?4",
    )?;
    let mut rows = statement.query(params![id, base, target, OPERATIONS_MAX + 1])?;
    let mut operations = Vec::new();
    while let Some(row) = rows.next()? {
        operations.push(read_operation(row)?);
    }
    if operations.len() as i64 > OPERATIONS_MAX {
        return Err(Fault::Refused(format!("more than {OPERATIONS_MAX} operations lead there")));
    }
    Ok(Way::To { from, operations })
}

fn beyond(db: &Connection, run: i64, first: i64) -> Result<Way, Fault> {
    let end = |order: &str| -> Result<Option<u64>, Fault> {
        let step: Option<i64> = db
            .prepare_cached(&format!("SELECT step {STEPS} ORDER BY seq {order} LIMIT 1"))?
            .query_row(params![run, first], |row| row.get(0))
            .optional()?;
        step.map(unsigned).transpose()
    };
    Ok(Way::Beyond { reach: end("ASC")?.zip(end("DESC")?) })
}

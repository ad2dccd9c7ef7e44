use rusqlite::{Connection, Params, Row};

use crate::{
    protocol::{BlobRef, Epoch, MAX_MESSAGE, OperationKey, OperationSeq, decode},
    types::{Digest, RunId, SessionId},
};

use super::{Outcome, Recovered, RecoveredOperation, RecoveredRun, error::Fault, rows::unsigned};

/// Reads everything; refuses what this program can't have written.
pub(super) fn read(db: &Connection, epoch: Epoch) -> Result<Recovered, Fault> {
    let sessions =
        all(db, "SELECT id FROM session ORDER BY id", [], |row| Ok(SessionId(unsigned(row.get(0)?)?)))?;
    let runs = all(db, "SELECT id, payload, model_digest, created_at_ms FROM run ORDER BY id", [], |row| {
        read_run(db, row)
    })?;
    let checkpoints = all(db, "SELECT payload, files, policy FROM checkpoint ORDER BY id", [], |row| {
        let policy = row.get_ref(2)?.as_blob_or_null().map_err(rusqlite::Error::from)?;
        Ok((
            decode("checkpoint", bytes(row, 0)?, MAX_MESSAGE)?,
            decode("checkpoint's files", bytes(row, 1)?, MAX_MESSAGE)?,
            policy.map(|policy| decode("checkpoint's policy", policy, MAX_MESSAGE)).transpose()?,
        ))
    })?;
    let live_blobs =
        all(db, "SELECT DISTINCT digest, size FROM blob_ref ORDER BY digest", [], |row| blob(row, 0))?;
    Ok(Recovered { epoch, sessions, runs, checkpoints, live_blobs })
}

fn read_run(db: &Connection, row: &Row) -> Result<RecoveredRun, Fault> {
    let id: i64 = row.get(0)?;
    Ok(RecoveredRun {
        run: RunId(unsigned(id)?),
        create: decode("run", bytes(row, 1)?, MAX_MESSAGE)?,
        model_digest: Digest(row.get(2)?),
        created_at_ms: unsigned(row.get(3)?)?,
        snapshot: one(
            db,
            "SELECT seq, digest, size FROM snapshot WHERE run = ? ORDER BY seq DESC LIMIT 1",
            id,
            |row| Ok((OperationSeq(unsigned(row.get(0)?)?), blob(row, 1)?)),
        )?,
        operations: all(
            db,
            "SELECT seq, key, incarnation, operation.payload, digest, outcome.payload, state, step
             FROM operation LEFT JOIN outcome USING (run, seq) WHERE run = ? ORDER BY seq",
            [id],
            read_operation,
        )?,
        slots: all(
            db,
            "SELECT policy, digest, size FROM slot WHERE run = ? ORDER BY version_zero DESC",
            [id],
            |row| Ok((decode("slot's policy", bytes(row, 0)?, MAX_MESSAGE)?, blob(row, 1)?)),
        )?,
    })
}

fn read_operation(row: &Row) -> Result<RecoveredOperation, Fault> {
    let seq = unsigned(row.get(0)?)?;
    let payload = bytes(row, 3)?;
    if Digest::of(payload) != Digest(row.get(4)?) {
        return Err(Fault::Corrupt(format!("operation {seq} does not match its digest")));
    }
    Ok(RecoveredOperation {
        seq: OperationSeq(seq),
        key: OperationKey(row.get(1)?),
        incarnation: row.get(2)?,
        operation: decode("operation", payload, MAX_MESSAGE)?,
        outcome: match row.get_ref(5)?.as_blob_or_null().map_err(rusqlite::Error::from)? {
            None => None,
            Some(payload) => Some(read_outcome(payload, row.get(6)?, row.get(7)?)?),
        },
    })
}

fn read_outcome(payload: &[u8], state: Option<[u8; 32]>, step: Option<i64>) -> Result<Outcome, Fault> {
    match (state, step) {
        (Some(state), Some(step)) => Ok(Outcome::Done {
            result: decode("operation's result", payload, MAX_MESSAGE)?,
            state: Digest(state),
            step: unsigned(step)?,
        }),
        _ => Ok(Outcome::Failed { error: decode("operation's error", payload, MAX_MESSAGE)? }),
    }
}

fn all<T>(
    db: &Connection,
    sql: &str,
    parameters: impl Params,
    read: impl Fn(&Row) -> Result<T, Fault>,
) -> Result<Vec<T>, Fault> {
    let mut statement = db.prepare_cached(sql)?;
    let mut rows = statement.query(parameters)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(read(row)?);
    }
    Ok(found)
}

fn one<T>(
    db: &Connection,
    sql: &str,
    run: i64,
    read: impl Fn(&Row) -> Result<T, Fault>,
) -> Result<Option<T>, Fault> {
    Ok(all(db, sql, [run], read)?.pop())
}

fn bytes<'a>(row: &'a Row, column: usize) -> Result<&'a [u8], Fault> {
    Ok(row.get_ref(column)?.as_blob().map_err(rusqlite::Error::from)?)
}

/// A blob's digest and size, from two columns.
fn blob(row: &Row, column: usize) -> Result<BlobRef, Fault> {
    Ok(BlobRef { digest: Digest(row.get(column)?), size: unsigned(row.get(column + 1)?)? })
}

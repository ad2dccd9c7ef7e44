use rusqlite::{Connection, Params, Row};

use crate::{
    protocol::{BlobRef, Epoch, MAX_MESSAGE, OperationKey, OperationSeq, decode},
    transport::Role,
    types::{Digest, RunId, SessionId},
};

use super::{
    KnownCertificate, Outcome, Recovered, RecoveredOperation, RecoveredRun, RecoveredSnapshot,
    SavedCheckpoint, Standing,
    error::Fault,
    rows::{signed, unsigned},
};

/// Reads everything; refuses what this program can't have written.
pub(super) fn read(db: &Connection, epoch: Epoch) -> Result<Recovered, Fault> {
    let sessions =
        all(db, "SELECT id FROM session ORDER BY id", [], |row| Ok(SessionId(unsigned(row.get(0)?)?)))?;
    let owners = all(db, "SELECT id, owner FROM session WHERE owner IS NOT NULL", [], |row| {
        Ok((SessionId(unsigned(row.get(0)?)?), row.get(1)?))
    })?;
    let owners = owners.into_iter().collect();
    let runs =
        all(db, "SELECT id, payload, model_digest, created_at_ms, key FROM run ORDER BY id", [], |row| {
            read_run(db, row)
        })?;
    let checkpoints =
        all(db, "SELECT payload, files, policy, published FROM checkpoint ORDER BY id", [], read_checkpoint)?;
    let deleted = all(db, "SELECT last_deleted_run FROM leader", [], |row| unsigned(row.get(0)?))?;
    let last_run = runs.iter().map(|run: &RecoveredRun| run.run.0).chain(deleted).max().unwrap_or(0);
    let drained = all(db, "SELECT node FROM drained", [], |row| Ok(row.get(0)?))?.into_iter().collect();
    let certificates =
        all(db, "SELECT role, name, ca, issued_at, expires_at FROM certificate", [], read_certificate)?;
    let revoked = all(db, "SELECT role, name, upto FROM revocation", [], |row| {
        Ok(((role(row)?, row.get(1)?), unsigned(row.get(2)?)?))
    })?;
    let revoked = revoked.into_iter().collect();
    Ok(Recovered { epoch, sessions, owners, runs, last_run, checkpoints, drained, certificates, revoked })
}

fn read_certificate(row: &Row) -> Result<KnownCertificate, Fault> {
    Ok(KnownCertificate {
        role: role(row)?,
        name: row.get(1)?,
        ca: Digest(row.get(2)?),
        issued_at: unsigned(row.get(3)?)?,
        expires_at: unsigned(row.get(4)?)?,
    })
}

/// From the first column.
fn role(row: &Row) -> Result<Role, Fault> {
    let name: String = row.get(0)?;
    Role::parse(&name).ok_or_else(|| Fault::Corrupt(format!("no role is called {name:?}")))
}

fn read_checkpoint(row: &Row) -> Result<SavedCheckpoint, Fault> {
    let policy = row.get_ref(2)?.as_blob_or_null().map_err(rusqlite::Error::from)?;
    Ok(SavedCheckpoint {
        checkpoint: decode("checkpoint", bytes(row, 0)?, MAX_MESSAGE)?,
        files: decode("checkpoint's files", bytes(row, 1)?, MAX_MESSAGE)?,
        policy: policy.map(|policy| decode("checkpoint's policy", policy, MAX_MESSAGE)).transpose()?,
        published: row.get(3)?,
    })
}

fn read_run(db: &Connection, row: &Row) -> Result<RecoveredRun, Fault> {
    let id: i64 = row.get(0)?;
    let snapshots = read_snapshots(db, id)?;
    let covered = snapshots.last().map_or(0, |snapshot| snapshot.seq.0);
    Ok(RecoveredRun {
        run: RunId(unsigned(id)?),
        create: decode("run", bytes(row, 1)?, MAX_MESSAGE)?,
        model_digest: Digest(row.get(2)?),
        created_at_ms: unsigned(row.get(3)?)?,
        key: row.get::<_, Option<[u8; 16]>>(4)?.map(OperationKey),
        snapshots,
        operations: all(
            db,
            "SELECT seq, key, incarnation,
                    iif(seq <= ?2 AND kind IN ('forward', 'forward_backward'), NULL, operation.payload),
                    digest, outcome.payload, state, step
             FROM operation LEFT JOIN outcome USING (run, seq) WHERE run = ?1 ORDER BY seq",
            [id, signed(covered)?],
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

pub(super) fn read_snapshots(db: &Connection, run: i64) -> Result<Vec<RecoveredSnapshot>, Fault> {
    let mut snapshots = all(
        db,
        "SELECT seq, digest, size, incarnation, step, lora FROM snapshot WHERE run = ? ORDER BY seq",
        [run],
        |row| {
            Ok(RecoveredSnapshot {
                seq: OperationSeq(unsigned(row.get(0)?)?),
                blob: blob(row, 1)?,
                standing: Standing {
                    incarnation: row.get(3)?,
                    step: unsigned(row.get(4)?)?,
                    lora: decode("snapshot's adapter", bytes(row, 5)?, MAX_MESSAGE)?,
                },
                payload_bytes: 0,
            })
        },
    )?;
    let mut after = 0;
    for snapshot in &mut snapshots {
        let upto = signed(snapshot.seq.0)?;
        let held = all(
            db,
            "SELECT ifnull(sum(size), 0) FROM blob_ref
             WHERE run = ? AND owner IN ('operation', 'outcome') AND seq > ? AND seq <= ?",
            [run, after, upto],
            |row| unsigned(row.get(0)?),
        )?;
        snapshot.payload_bytes = held.into_iter().sum();
        after = upto;
    }
    Ok(snapshots)
}

pub(super) fn read_operation(row: &Row) -> Result<RecoveredOperation, Fault> {
    let seq = unsigned(row.get(0)?)?;
    let digest = Digest(row.get(4)?);
    let payload = row.get_ref(3)?.as_blob_or_null().map_err(rusqlite::Error::from)?;
    if payload.is_some_and(|payload| Digest::of(payload) != digest) {
        return Err(Fault::Corrupt(format!("operation {seq} does not match its digest")));
    }
    Ok(RecoveredOperation {
        seq: OperationSeq(seq),
        key: OperationKey(row.get(1)?),
        incarnation: row.get(2)?,
        operation: payload.map(|payload| decode("operation", payload, MAX_MESSAGE)).transpose()?,
        digest,
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

/// Those of `digests` that no row names.
pub(super) fn unnamed(db: &Connection, digests: Vec<Digest>) -> Result<Vec<Digest>, Fault> {
    let mut statement = db.prepare_cached("SELECT 1 FROM blob_ref WHERE digest = ?")?;
    let mut unnamed = Vec::new();
    for digest in digests {
        if !statement.exists([digest.0])? {
            unnamed.push(digest);
        }
    }
    Ok(unnamed)
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

fn bytes<'a>(row: &'a Row, column: usize) -> Result<&'a [u8], Fault> {
    Ok(row.get_ref(column)?.as_blob().map_err(rusqlite::Error::from)?)
}

/// A blob's digest and size, from two columns.
fn blob(row: &Row, column: usize) -> Result<BlobRef, Fault> {
    Ok(BlobRef { digest: Digest(row.get(column)?), size: unsigned(row.get(column + 1)?)? })
}

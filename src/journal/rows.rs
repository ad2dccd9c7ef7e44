use rusqlite::{Connection, OptionalExtension, params};

use crate::{
    protocol::{BlobRef, MAX_MESSAGE, Operation, OperationKey, OperationSeq, encode},
    types::{CheckpointTarget, Digest, OperationError, PolicyId, RunId},
};

use super::{
    Outcome, Record, SavedCheckpoint, Standing,
    blobs::{blobs_of_operation, blobs_of_result},
    error::Fault,
};

/// Writes one record. After an error its rows may be there in part: the caller rolls back.
pub(super) fn write(db: &Connection, record: &Record) -> Result<(), Fault> {
    match record {
        Record::Session { session, owner, created_at_ms } => insert(
            db,
            "INSERT INTO session (id, owner, created_at_ms) VALUES (?, ?, ?)",
            params![signed(session.0)?, owner, signed(*created_at_ms)?],
        ),
        Record::Run { run, create, model_digest, key, created_at_ms } => insert(
            db,
            "INSERT INTO run (id, session, payload, model_digest, key, created_at_ms) VALUES (?, ?, ?, ?, ?, ?)",
            params![
                signed(run.0)?,
                signed(create.session.0)?,
                bounded(encode(create))?,
                model_digest.0,
                key.map(|key| key.0),
                signed(*created_at_ms)?
            ],
        ),
        Record::Operation { run, seq, key, incarnation, operation } => {
            write_operation(db, (*run, *seq), key, *incarnation, operation)
        }
        Record::Outcome { run, seq, outcome } => write_outcome(db, (*run, *seq), outcome),
        Record::Snapshot { run, seq, snapshot, standing } => {
            write_snapshot(db, (*run, *seq), snapshot, standing)
        }
        Record::Checkpoint(saved) => write_checkpoint(db, saved),
        Record::DropCheckpoint { checkpoint } => drop_checkpoint(db, signed(checkpoint.0)?),
        Record::Slot { policy, base_model, adapter } => {
            let (run, version_zero) = (signed(policy.run.0)?, i64::from(policy.step == 0));
            insert(
                db,
                "INSERT OR REPLACE INTO slot (run, version_zero, base_model, policy, digest, size)
                 VALUES (?, ?, ?, ?, ?, ?)",
                params![
                    run,
                    version_zero,
                    base_model,
                    encode(policy),
                    adapter.digest.0,
                    signed(adapter.size)?
                ],
            )?;
            hold(db, Owner { run, kind: "slot", seq: version_zero }, &[*adapter])
        }
        Record::PublishFailed { run, seq, policy, error } => {
            write_publish_failed(db, (*run, *seq), policy, error)
        }
        Record::DropSlots { run } => {
            let run = signed(run.0)?;
            insert(db, "DELETE FROM slot WHERE run = ?", params![run])?;
            insert(db, "DELETE FROM blob_ref WHERE run = ? AND owner = 'slot'", params![run])
        }
        Record::DropRun { run } => drop_run(db, signed(run.0)?),
        Record::Drained { node, drained: true } => {
            insert(db, "INSERT OR IGNORE INTO drained (node) VALUES (?)", params![node])
        }
        Record::Drained { node, drained: false } => {
            insert(db, "DELETE FROM drained WHERE node = ?", params![node])
        }
        Record::Certificate(known) => insert(
            db,
            "INSERT OR REPLACE INTO certificate (role, name, ca, issued_at, expires_at) VALUES (?, ?, ?, ?, ?)",
            params![
                known.role.as_str(),
                known.name,
                known.ca.0,
                signed(known.issued_at)?,
                signed(known.expires_at)?
            ],
        ),
        Record::ForgetCertificate { role, name } => {
            insert(db, "DELETE FROM certificate WHERE role = ? AND name = ?", params![role.as_str(), name])
        }
        Record::Revoked { role, name, upto } => insert(
            db,
            "INSERT OR REPLACE INTO revocation (role, name, upto) VALUES (?, ?, ?)",
            params![role.as_str(), name, signed(*upto)?],
        ),
        Record::Prune { run, base, upto } => prune(db, signed(run.0)?, signed(base.0)?, signed(upto.0)?),
    }
}

fn write_operation(
    db: &Connection,
    (run, seq): (RunId, OperationSeq),
    key: &OperationKey,
    incarnation: u32,
    operation: &Operation,
) -> Result<(), Fault> {
    let (run, seq) = (signed(run.0)?, signed(seq.0)?);
    let payload = bounded(encode(operation))?;
    let digest = Digest::of(&payload);
    let changed = db
        .prepare_cached(
            "INSERT INTO operation (run, seq, key, kind, incarnation, payload, digest)
             VALUES (?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (run, seq) DO UPDATE
             SET incarnation = excluded.incarnation, payload = excluded.payload, digest = excluded.digest
             WHERE key = excluded.key AND kind = excluded.kind",
        )?
        .execute(params![run, seq, key.0, operation.name(), incarnation, payload, digest.0])?;
    if changed == 0 {
        return Err(Fault::Refused("its number was given to another operation".into()));
    }
    hold(db, Owner { run, kind: "operation", seq }, &blobs_of_operation(operation))
}

fn write_outcome(db: &Connection, (run, seq): (RunId, OperationSeq), outcome: &Outcome) -> Result<(), Fault> {
    let (run, seq) = (signed(run.0)?, signed(seq.0)?);
    let (payload, state, step, blobs) = match outcome {
        Outcome::Done { result, state, step } => {
            (encode(result), Some(state.0), Some(signed(*step)?), blobs_of_result(result))
        }
        Outcome::Failed { error } => (encode(error), None, None, Vec::new()),
    };
    insert(
        db,
        "INSERT INTO outcome (run, seq, payload, state, step) VALUES (?, ?, ?, ?, ?)",
        params![run, seq, bounded(payload)?, state, step],
    )?;
    hold(db, Owner { run, kind: "outcome", seq }, &blobs)
}

fn write_snapshot(
    db: &Connection,
    (run, seq): (RunId, OperationSeq),
    snapshot: &BlobRef,
    standing: &Standing,
) -> Result<(), Fault> {
    let (run, seq) = (signed(run.0)?, signed(seq.0)?);
    insert(
        db,
        "INSERT OR REPLACE INTO snapshot (run, seq, digest, size, incarnation, step, lora)
         VALUES (?, ?, ?, ?, ?, ?, ?)",
        params![
            run,
            seq,
            snapshot.digest.0,
            signed(snapshot.size)?,
            standing.incarnation,
            signed(standing.step)?,
            bounded(encode(&standing.lora))?
        ],
    )?;
    hold(db, Owner { run, kind: "snapshot", seq }, &[*snapshot])
}

fn write_checkpoint(db: &Connection, saved: &SavedCheckpoint) -> Result<(), Fault> {
    let SavedCheckpoint { checkpoint, files, policy, published } = saved;
    let (id, run) = (signed(checkpoint.id.0)?, signed(checkpoint.run_id.0)?);
    let target = match checkpoint.target {
        CheckpointTarget::Trainer => "trainer",
        CheckpointTarget::Sampler => "sampler",
    };
    let replaced: Option<i64> = db
        .prepare_cached("DELETE FROM checkpoint WHERE run = ? AND target = ? AND name = ? RETURNING id")?
        .query_row(params![run, target, checkpoint.checkpoint_id], |row| row.get(0))
        .optional()?;
    if let Some(seq) = replaced {
        hold(db, Owner { run, kind: "checkpoint", seq }, &[])?;
    }
    insert(
        db,
        "INSERT INTO checkpoint (id, run, target, name, payload, files, policy, published)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        params![
            id,
            run,
            target,
            checkpoint.checkpoint_id,
            bounded(encode(checkpoint))?,
            bounded(encode(files))?,
            policy.as_ref().map(encode),
            published
        ],
    )?;
    let blobs: Vec<_> = files.iter().map(|file| file.blob).collect();
    hold(db, Owner { run, kind: "checkpoint", seq: id }, &blobs)
}

fn write_publish_failed(
    db: &Connection,
    (run, seq): (RunId, OperationSeq),
    policy: &PolicyId,
    error: &OperationError,
) -> Result<(), Fault> {
    let (run, seq) = (signed(run.0)?, signed(seq.0)?);
    let changed = db
        .prepare_cached(
            "UPDATE outcome SET payload = ?, state = NULL, step = NULL
             WHERE run = ?2 AND seq = ?3 AND state IS NOT NULL AND EXISTS
             (SELECT 1 FROM operation WHERE run = ?2 AND seq = ?3 AND kind = 'save_weights_for_sampler')",
        )?
        .execute(params![bounded(encode(error))?, run, seq])?;
    if changed == 0 {
        return Err(Fault::Refused("it is no publish that was done".into()));
    }
    let slot: Option<i64> = db
        .prepare_cached("DELETE FROM slot WHERE run = ? AND policy = ? RETURNING version_zero")?
        .query_row(params![run, encode(policy)], |row| row.get(0))
        .optional()?;
    match slot {
        Some(seq) => hold(db, Owner { run, kind: "slot", seq }, &[]),
        None => Ok(()),
    }
}

fn drop_checkpoint(db: &Connection, id: i64) -> Result<(), Fault> {
    let run: Option<i64> = db
        .prepare_cached("DELETE FROM checkpoint WHERE id = ? RETURNING run")?
        .query_row([id], |row| row.get(0))
        .optional()?;
    match run {
        Some(run) => hold(db, Owner { run, kind: "checkpoint", seq: id }, &[]),
        None => Ok(()),
    }
}

fn drop_run(db: &Connection, run: i64) -> Result<(), Fault> {
    for sql in [
        "DELETE FROM outcome WHERE run = ?",
        "DELETE FROM operation WHERE run = ?",
        "DELETE FROM snapshot WHERE run = ?",
        "DELETE FROM slot WHERE run = ?",
        "DELETE FROM checkpoint WHERE run = ?",
        "DELETE FROM blob_ref WHERE run = ?",
        "DELETE FROM run WHERE id = ?",
        "UPDATE leader SET last_deleted_run = max(last_deleted_run, ?)",
    ] {
        insert(db, sql, [run])?;
    }
    Ok(())
}

fn prune(db: &Connection, run: i64, base: i64, upto: i64) -> Result<(), Fault> {
    let reachable =
        db.prepare_cached("SELECT 1 FROM snapshot WHERE run = ? AND seq = ?")?.exists(params![run, base])?;
    if !reachable {
        return Err(Fault::Refused("there is no snapshot to go on from".into()));
    }
    if upto > base {
        return Err(Fault::Refused(format!("operations behind the snapshot after {base} are needed")));
    }
    for (sql, limit) in [
        ("DELETE FROM outcome WHERE run = ? AND seq <= ?", upto),
        ("DELETE FROM operation WHERE run = ? AND seq <= ?", upto),
        ("DELETE FROM snapshot WHERE run = ? AND seq < ?", base),
        ("DELETE FROM blob_ref WHERE run = ? AND owner = 'outcome' AND seq <= ?", upto),
        ("DELETE FROM blob_ref WHERE run = ? AND owner = 'operation' AND seq <= ?", base),
        ("DELETE FROM blob_ref WHERE run = ? AND owner = 'snapshot' AND seq < ?", base),
    ] {
        insert(db, sql, params![run, limit])?;
    }
    Ok(())
}

/// The row that holds blobs; see blob_ref in schema.sql.
struct Owner {
    run: i64,
    kind: &'static str,
    seq: i64,
}

/// From now on `owner` holds exactly these blobs.
fn hold(db: &Connection, owner: Owner, blobs: &[BlobRef]) -> Result<(), Fault> {
    let Owner { run, kind, seq } = owner;
    insert(db, "DELETE FROM blob_ref WHERE run = ? AND owner = ? AND seq = ?", params![run, kind, seq])?;
    for blob in blobs {
        insert(
            db,
            // A checkpoint may hold one blob under two names.
            "INSERT OR IGNORE INTO blob_ref (run, owner, seq, digest, size) VALUES (?, ?, ?, ?, ?)",
            params![run, kind, seq, blob.digest.0, signed(blob.size)?],
        )?;
    }
    Ok(())
}

fn insert(db: &Connection, sql: &str, values: impl rusqlite::Params) -> Result<(), Fault> {
    db.prepare_cached(sql)?.execute(values)?;
    Ok(())
}

/// Recovery reads no payload past [`MAX_MESSAGE`], so none is written.
fn bounded(payload: Vec<u8>) -> Result<Vec<u8>, Fault> {
    match payload.len() {
        0..=MAX_MESSAGE => Ok(payload),
        size => Err(Fault::Refused(format!("{size} bytes are over the limit of {MAX_MESSAGE}"))),
    }
}

/// SQLite's integers are signed.
pub(super) fn signed(value: u64) -> Result<i64, Fault> {
    i64::try_from(value).map_err(|_| Fault::Refused(format!("{value} is over the limit of {}", i64::MAX)))
}

/// Back from [`signed`].
pub(super) fn unsigned(value: i64) -> Result<u64, Fault> {
    u64::try_from(value).map_err(|_| Fault::Corrupt(format!("{value} where no negative number can be")))
}

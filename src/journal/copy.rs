//! A copy of a journal that is being written, and what it names.

use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use crate::{protocol::BlobRef, types::Digest};

use super::{
    error::{Fault, JournalError},
    rows::unsigned,
};

/// Writes what `db` holds into a new file, as a journal that can be opened. Not synced.
pub(super) fn copy(db: &Connection, to: &Path) -> Result<(), Fault> {
    // As good as SQLite's own backup of pages, and it leaves out the free ones.
    let path = to.to_str().ok_or_else(|| Fault::Refused("its path is no UTF-8".into()))?;
    db.execute("VACUUM INTO ?", [path])?;
    Ok(())
}

/// Every blob that a copy names, each once. Not for a journal that is open.
pub fn named_blobs(copy: &Path) -> Result<Vec<BlobRef>, JournalError> {
    let read = || -> Result<Vec<BlobRef>, Fault> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(copy, flags)?;
        let mut statement = db.prepare("SELECT DISTINCT digest, size FROM blob_ref ORDER BY digest")?;
        let mut rows = statement.query([])?;
        let mut named = Vec::new();
        while let Some(row) = rows.next()? {
            named.push(BlobRef { digest: Digest(row.get(0)?), size: unsigned(row.get(1)?)? });
        }
        Ok(named)
    };
    read().map_err(|fault| fault.while_opening(copy))
}

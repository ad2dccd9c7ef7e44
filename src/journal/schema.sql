-- Integers are u64 values below 2^63. Digests are 32 bytes. A payload is the bincode of a
-- message of protocol/. Whoever changes a table raises SCHEMA_VERSION in database.rs.

CREATE TABLE leader (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL,
    last_deleted_run INTEGER NOT NULL DEFAULT 0 -- no later run gets a number up to it
) STRICT;

CREATE TABLE session (
    id            INTEGER PRIMARY KEY,
    owner         TEXT,
    created_at_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE run (
    id            INTEGER PRIMARY KEY,
    session       INTEGER NOT NULL REFERENCES session (id),
    payload       BLOB NOT NULL, -- CreateRun
    model_digest  BLOB NOT NULL,
    created_at_ms INTEGER NOT NULL,
    key           BLOB -- under which its session asked for it
) STRICT;

CREATE UNIQUE INDEX run_key ON run (session, key);

CREATE TABLE operation (
    run         INTEGER NOT NULL REFERENCES run (id),
    seq         INTEGER NOT NULL,
    key         BLOB NOT NULL,
    kind        TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    payload     BLOB NOT NULL, -- Operation
    digest      BLOB NOT NULL, -- of payload
    PRIMARY KEY (run, seq),
    UNIQUE (run, key)
) STRICT;

CREATE TABLE outcome (
    run     INTEGER NOT NULL,
    seq     INTEGER NOT NULL,
    payload BLOB NOT NULL, -- done: OperationResult; failed: OperationError
    state   BLOB,          -- done: digest of the run's state
    step    INTEGER,       -- done: optimiser steps
    PRIMARY KEY (run, seq),
    FOREIGN KEY (run, seq) REFERENCES operation (run, seq),
    CHECK ((state IS NULL) = (step IS NULL))
) STRICT;

CREATE TABLE snapshot (
    run         INTEGER NOT NULL REFERENCES run (id),
    seq         INTEGER NOT NULL,
    digest      BLOB NOT NULL,
    size        INTEGER NOT NULL,
    incarnation INTEGER NOT NULL, -- of the run after seq, and so its steps and its adapter
    step        INTEGER NOT NULL,
    lora        BLOB NOT NULL,    -- LoraConfig
    PRIMARY KEY (run, seq)
) STRICT;

-- No reference to run: checkpoints outlive their run.
CREATE TABLE checkpoint (
    id        INTEGER NOT NULL UNIQUE,
    run       INTEGER NOT NULL,
    target    TEXT NOT NULL,
    name      TEXT NOT NULL,
    payload   BLOB NOT NULL,    -- Checkpoint
    files     BLOB NOT NULL,    -- the manifest: Vec<SavedFile>
    policy    BLOB,             -- PolicyId
    published INTEGER NOT NULL, -- 1: pushed out by later publishes of the run
    PRIMARY KEY (run, target, name)
) STRICT;

CREATE TABLE slot (
    run          INTEGER NOT NULL REFERENCES run (id),
    version_zero INTEGER NOT NULL, -- 1: published before the first step; 0: the live policy
    base_model   TEXT NOT NULL,
    policy       BLOB NOT NULL, -- PolicyId
    digest       BLOB NOT NULL, -- of the adapter's blob
    size         INTEGER NOT NULL,
    PRIMARY KEY (run, version_zero)
) STRICT;

-- Which row holds which blob; what is named here may not leave the store. An operation that replay
-- can't reach any more lets go of its data before its row goes.
-- seq: an operation's, an outcome's or a snapshot's; a checkpoint's id; a slot's version_zero.
CREATE TABLE blob_ref (
    run    INTEGER NOT NULL,
    owner  TEXT NOT NULL,
    seq    INTEGER NOT NULL,
    digest BLOB NOT NULL,
    size   INTEGER NOT NULL,
    PRIMARY KEY (run, owner, seq, digest)
) STRICT, WITHOUT ROWID;

CREATE INDEX blob_ref_digest ON blob_ref (digest);

-- Nodes that get nothing new.
CREATE TABLE drained (
    node TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

-- The newest certificate that a process has shown; times in seconds since the Unix epoch.
CREATE TABLE certificate (
    role       TEXT NOT NULL,
    name       TEXT NOT NULL,
    ca         BLOB NOT NULL, -- SHA-256 of the CA's certificate that signed it
    issued_at  INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (role, name)
) STRICT, WITHOUT ROWID;

-- What was issued to a name up to then is refused.
CREATE TABLE revocation (
    role TEXT NOT NULL,
    name TEXT NOT NULL,
    upto INTEGER NOT NULL,
    PRIMARY KEY (role, name)
) STRICT, WITHOUT ROWID;

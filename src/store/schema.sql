-- The tables of the metadata. docs/format.md explains each column. A change here is a new SCHEMA_VERSION.

CREATE TABLE numbers (
    first_id INTEGER NOT NULL,
    next_id INTEGER NOT NULL
) STRICT;

CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    depth INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('view', 'active', 'committed')),
    live INTEGER NOT NULL CHECK (live IN (0, 1)),
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    labels TEXT NOT NULL,
    ref TEXT,
    digest TEXT,
    repository TEXT,
    size INTEGER,
    inodes INTEGER
) STRICT;

CREATE INDEX snapshots_by_parent ON snapshots (parent, live) WHERE parent IS NOT NULL;

CREATE INDEX snapshots_by_ref ON snapshots (ref, parent, key) WHERE ref IS NOT NULL;

CREATE TABLE cleanup (
    id INTEGER PRIMARY KEY,
    begun INTEGER NOT NULL CHECK (begun IN (0, 1))
) STRICT;

CREATE TABLE scans (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    repository TEXT NOT NULL,
    result BLOB NOT NULL,
    UNIQUE (digest, repository)
) STRICT;

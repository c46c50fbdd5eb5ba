-- Version 2 of the schema (PRAGMA user_version says which one a file has).
-- Changes are additive: for a minute of a deploy the old code works on the new file.

CREATE TABLE visitor (
    number      INTEGER PRIMARY KEY,   -- the order of creation: of several visitors, the oldest
    id          TEXT    NOT NULL,      -- `_id`; random, and without an index, which would cost each insert
    token       TEXT    NOT NULL UNIQUE,
    username    TEXT    NOT NULL,      -- need not be unique
    name        TEXT,
    email       TEXT,                  -- trimmed, lowercased
    phone       TEXT,
    department  TEXT,
    ts          INTEGER NOT NULL,      -- creation, milliseconds since 1970
    updated     INTEGER NOT NULL,      -- last write, never going back
    search      TEXT    NOT NULL,      -- what a search looks into: storage.visitors.search_text
    fields      TEXT    NOT NULL,      -- custom fields: a JSON object of strings, in order of creation
    digits      TEXT                   -- of the phone
) STRICT;

-- One row: the last number given to a guest. It outlives the visitors, so no number is used twice.
CREATE TABLE guest (
    last        INTEGER NOT NULL
) STRICT;

INSERT INTO guest (last) VALUES (1);   -- the first one is guest-2, as in the document

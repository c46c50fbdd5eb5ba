-- The schema, version after version: a new file takes every step, an older one those that it lacks.
-- PRAGMA user_version says which one was the last. A released step never changes. A new one only
-- adds, as for a minute of a deploy the old code works on the new file; it may call `search_text`
-- and `phone_digits` of fields.py. Each begins with a line "-- Version ...".

-- Version 1

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
    search      TEXT    NOT NULL,      -- what a search looks into: search_text in fields.py
    fields      TEXT    NOT NULL       -- custom fields: a JSON object of strings, in order of creation
) STRICT;

-- One row: the last number given to a guest. It outlives the visitors, so no number is used twice.
CREATE TABLE guest (
    last        INTEGER NOT NULL
) STRICT;

INSERT INTO guest (last) VALUES (1);   -- the first one is guest-2, as in the document

-- Version 2: texts are compared as Unicode has it, and phones by their digits

ALTER TABLE visitor ADD COLUMN digits TEXT;

UPDATE visitor SET
    digits = phone_digits(phone),
    search = search_text(username, coalesce(name, ''), fields);

-- Version 3: the visitors of each day, for the statistics. Triggers keep them, as other programs
-- delete and import too; an index of `ts` would cost each registration more, and the statistics a
-- scan of it.

CREATE TABLE day (
    number      INTEGER PRIMARY KEY,   -- days since 1970-01-01, in UTC
    registered  INTEGER NOT NULL,      -- the visitors there are who were created on that day
    changes     INTEGER NOT NULL       -- how often one of them was written or deleted
) STRICT;

CREATE TRIGGER visitor_created AFTER INSERT ON visitor BEGIN
    INSERT INTO day VALUES (NEW.ts / 86400000, 1, 1)
        ON CONFLICT DO UPDATE SET registered = registered + 1, changes = changes + 1;
END;

CREATE TRIGGER visitor_changed AFTER UPDATE ON visitor BEGIN
    UPDATE day SET changes = changes + 1 WHERE number = NEW.ts / 86400000;
END;

CREATE TRIGGER visitor_deleted AFTER DELETE ON visitor BEGIN
    UPDATE day SET registered = registered - 1, changes = changes + 1
        WHERE number = OLD.ts / 86400000;
END;

INSERT INTO day SELECT ts / 86400000, count(*), 0 FROM visitor GROUP BY 1;

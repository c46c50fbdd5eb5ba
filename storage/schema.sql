-- One section for each version. A new file runs all of them, an older file those that it lacks;
-- PRAGMA user_version is the number of sections that a file has run. A released section is never
-- changed. A new one may add tables, and columns that are nullable or have a default: during a deploy
-- the release before still inserts rows. It runs in a transaction, and may call
-- search_text(username, name, fields) and phone_digits(phone), which migrations.py defines.
-- A section begins with a line "-- Version ...".

-- Version 1

CREATE TABLE visitor (
    number      INTEGER PRIMARY KEY,   -- the order of creation; of several that match, the lowest is taken
    id          TEXT    NOT NULL,      -- `_id`; random; no index, as one would slow every insert
    token       TEXT    NOT NULL UNIQUE,
    username    TEXT    NOT NULL,      -- need not be unique
    name        TEXT,
    email       TEXT,                  -- trimmed, lowercased
    phone       TEXT,
    department  TEXT,
    ts          INTEGER NOT NULL,      -- creation, milliseconds since 1970
    updated     INTEGER NOT NULL,      -- the last write, in milliseconds; never goes back
    search      TEXT    NOT NULL,      -- what a search looks into: search_text in fields.py
    fields      TEXT    NOT NULL       -- custom fields: a JSON object of strings, in order of creation
) STRICT;

-- One row: the last number given to a guest. It outlives the visitors, so no number is used twice.
CREATE TABLE guest (
    last        INTEGER NOT NULL
) STRICT;

INSERT INTO guest (last) VALUES (1);   -- the first one is guest-2, as in Rocket.Chat's documentation

-- Version 2: texts are compared as Unicode has it, and phones by their digits

ALTER TABLE visitor ADD COLUMN digits TEXT;

UPDATE visitor SET
    digits = phone_digits(phone),
    search = search_text(username, coalesce(name, ''), fields);

-- Version 3: the registrations of each day, for the statistics. Triggers keep them, because other
-- programs insert and delete too. An index of `ts` would cost each registration more, and the
-- statistics a scan of it.

CREATE TABLE day (
    number      INTEGER PRIMARY KEY,   -- days since 1970-01-01, in UTC
    registered  INTEGER NOT NULL,      -- visitors that were created on that day and still exist
    changes     INTEGER NOT NULL       -- how often one of them was written or deleted; only grows
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

// The same registration with Express, better-sqlite3 and ajv; DATABASE, PORT and SYNCHRONOUS
// (better-sqlite3's default is NORMAL in WAL mode) come from the environment.
'use strict';

const crypto = require('node:crypto');
const Ajv = require('ajv');
const Database = require('better-sqlite3');
const express = require('express');

const db = new Database(process.env.DATABASE);
db.pragma('journal_mode = WAL');
if (process.env.SYNCHRONOUS) db.pragma(`synchronous = ${process.env.SYNCHRONOUS}`);
db.exec(`
  CREATE TABLE IF NOT EXISTS visitor (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL, token TEXT NOT NULL UNIQUE, name TEXT,
    email TEXT, phone TEXT, department TEXT, ts TEXT NOT NULL, updated TEXT NOT NULL,
    fields TEXT NOT NULL
  );
  CREATE INDEX IF NOT EXISTS visitor_phone ON visitor (phone);
  CREATE INDEX IF NOT EXISTS visitor_email ON visitor (email);
`);

const text = (maxLength) => ({ type: 'string', maxLength });
const check = new Ajv().compile({
  type: 'object',
  required: ['visitor'],
  additionalProperties: false,
  properties: {
    visitor: {
      type: 'object',
      required: ['token'],
      properties: {
        token: { ...text(256), minLength: 1 },
        name: text(256),
        email: text(254),
        phone: text(64),
        department: text(128),
        customFields: {
          type: 'array',
          maxItems: 64,
          items: {
            type: 'object',
            required: ['key', 'value', 'overwrite'],
            properties: { key: text(128), value: text(4096), overwrite: { type: 'boolean' } },
          },
        },
      },
    },
  },
});

const by = (column) =>
  db.prepare(`SELECT * FROM visitor WHERE ${column} = ? ORDER BY number LIMIT 1`);
const [byToken, byPhone, byEmail] = ['token', 'phone', 'email'].map(by);
const insert = db.prepare(`
  INSERT INTO visitor (id, token, name, email, phone, department, ts, updated, fields)
  VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
`);
const update = db.prepare(`
  UPDATE visitor SET token = ?, name = ?, email = ?, phone = ?, department = ?, updated = ?,
    fields = ? WHERE number = ?
`);

function meet({ token, phone, email }) {
  let met = byToken.get(token);
  if (!met && phone) met = byPhone.get(phone);
  if (!met && email) {
    met = byEmail.get(email);
    if (met) met.token = token;
  }
  return met;
}

const register = db.transaction((given) => {
  const now = new Date().toISOString();
  let visitor = meet(given);
  const fields = visitor ? JSON.parse(visitor.fields) : {};
  for (const { key, value, overwrite } of given.customFields ?? []) {
    if (overwrite || !fields[key]) fields[key] = value;
  }
  const known = visitor;
  visitor ??= { id: crypto.randomBytes(9).toString('base64url'), token: given.token, ts: now };
  const { token } = visitor;
  const name = given.name || visitor.name || null;
  const email = given.email || visitor.email || null;
  const phone = given.phone || visitor.phone || null;
  const department = given.department || visitor.department || null;
  const json = JSON.stringify(fields);
  let { number } = visitor;
  if (known) {
    update.run(token, name, email, phone, department, now, json, number);
  } else {
    const row = [visitor.id, token, name, email, phone, department, now, now, json];
    number = insert.run(row).lastInsertRowid;
  }
  return {
    _id: visitor.id,
    username: `guest-${number}`,
    status: 'online',
    ts: visitor.ts,
    _updatedAt: now,
    token,
    name: name ?? undefined,
    phone: phone ? [{ phoneNumber: phone }] : undefined,
    visitorEmails: email ? [{ address: email }] : undefined,
    department: department ?? undefined,
    livechatData: fields,
  };
}).immediate;

const app = express();
app.disable('x-powered-by');
app.disable('etag');
app.use(express.json());
app.post('/api/v1/livechat/visitor', (req, res) => {
  if (!check(req.body)) {
    res.status(400).json({ success: false, error: check.errors });
    return;
  }
  res.json({ visitor: register(req.body.visitor), success: true });
});
app.listen(Number(process.env.PORT), '127.0.0.1');

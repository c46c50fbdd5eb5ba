"""The same registration with Flask, SQLAlchemy and marshmallow, in WAL mode with FULL."""

import os
import secrets
from datetime import UTC, datetime

from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from marshmallow import EXCLUDE, Schema, ValidationError, fields
from marshmallow.validate import Length
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{os.environ['DATABASE']}"
app.json.sort_keys = False
db = SQLAlchemy(app, session_options={"expire_on_commit": False})


class Visitor(db.Model):
    number = db.Column(db.Integer, primary_key=True)
    id = db.Column(db.String, nullable=False)
    token = db.Column(db.String, nullable=False, unique=True)
    name = db.Column(db.String)
    email = db.Column(db.String, index=True)
    phone = db.Column(db.String, index=True)
    department = db.Column(db.String)
    ts = db.Column(db.DateTime, nullable=False)
    updated = db.Column(db.DateTime, nullable=False)
    fields = db.Column(db.JSON, nullable=False)

    def wire(self):
        shape = {
            "_id": self.id,
            "username": f"guest-{self.number}",
            "status": "online",
            "ts": date(self.ts),
            "_updatedAt": date(self.updated),
            "token": self.token,
            "name": self.name,
            "phone": self.phone and [{"phoneNumber": self.phone}],
            "visitorEmails": self.email and [{"address": self.email}],
            "department": self.department,
            "livechatData": self.fields,
        }
        return {key: value for key, value in shape.items() if value}


def date(moment):
    return moment.isoformat(timespec="milliseconds") + "Z"


class FieldSchema(Schema):
    key = fields.Str(required=True)
    value = fields.Str(required=True)
    overwrite = fields.Bool(required=True)


class VisitorSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    token = fields.Str(required=True, validate=Length(1, 256))
    name = fields.Str()
    email = fields.Email()
    phone = fields.Str()
    department = fields.Str()
    custom_fields = fields.List(fields.Nested(FieldSchema), data_key="customFields")


class BodySchema(Schema):
    visitor = fields.Nested(VisitorSchema, required=True)


schema = BodySchema()


@app.post("/api/v1/livechat/visitor")
def visitor():
    try:
        given = schema.load(request.get_json())["visitor"]
    except ValidationError as error:
        return {"success": False, "error": error.messages}, 400
    try:
        found = register(given)
    except IntegrityError:  # another worker has registered that token meanwhile
        db.session.rollback()
        found = register(given)
    return {"visitor": found, "success": True}


def register(given):
    now = datetime.now(UTC).replace(tzinfo=None)
    found = meet(given)
    if found is None:
        found = Visitor(id=secrets.token_urlsafe(9), token=given["token"], ts=now, fields={})
        db.session.add(found)
    for key in ("name", "email", "phone", "department"):
        if given.get(key):
            setattr(found, key, given[key])
    held = dict(found.fields)
    for field in given.get("custom_fields", ()):
        if field["overwrite"] or not held.get(field["key"]):
            held[field["key"]] = field["value"]
    found.fields = held
    found.updated = now
    db.session.commit()
    return found.wire()


def meet(given):
    for column in ("token", "phone", "email"):
        if not given.get(column):
            continue
        found = Visitor.query.filter_by(**{column: given[column]}).first()
        if found is not None:
            if column == "email":
                found.token = given["token"]
            return found
    return None


with app.app_context():

    @event.listens_for(db.engine, "connect")
    def configure(connection, _record):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    db.create_all()
    db.engine.dispose()  # gunicorn forks after this

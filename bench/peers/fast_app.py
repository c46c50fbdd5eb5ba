"""The same registration with FastAPI and SQLModel, in WAL mode with FULL."""

import os
import secrets
from contextlib import suppress
from datetime import UTC, datetime

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic import Field as Limit
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import JSON, Column, Field, Session, SQLModel, create_engine, select

engine = create_engine(f"sqlite:///{os.environ['DATABASE']}", connect_args={"timeout": 30})


@event.listens_for(engine, "connect")
def configure(connection, _record):
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


class Visitor(SQLModel, table=True):
    number: int | None = Field(default=None, primary_key=True)
    id: str
    token: str = Field(unique=True)
    name: str | None = None
    email: str | None = Field(default=None, index=True)
    phone: str | None = Field(default=None, index=True)
    department: str | None = None
    ts: datetime
    updated: datetime
    fields: dict = Field(sa_column=Column(JSON, nullable=False))

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
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class FieldBody(BaseModel):
    key: str = Limit(min_length=1, max_length=128)
    value: str = Limit(max_length=4096)
    overwrite: bool


class VisitorBody(BaseModel):
    token: str = Limit(min_length=1, max_length=256)
    name: str = Limit("", max_length=256)
    email: str = Limit("", max_length=254)
    phone: str = Limit("", max_length=64)
    department: str = Limit("", max_length=128)
    custom_fields: list[FieldBody] = Limit([], max_length=64, alias="customFields")


class Body(BaseModel, extra="forbid"):
    visitor: VisitorBody


app = FastAPI()


@app.post("/api/v1/livechat/visitor")
def visitor(body: Body):
    try:
        found = register(body.visitor)
    except IntegrityError:  # another one has registered that token meanwhile
        found = register(body.visitor)
    return {"visitor": found, "success": True}


def register(given):
    now = datetime.now(UTC)
    with Session(engine) as session:
        found = meet(session, given)
        if found is None:
            found = Visitor(
                id=secrets.token_urlsafe(9), token=given.token, ts=now, updated=now, fields={}
            )
        for key in ("name", "email", "phone", "department"):
            if getattr(given, key):
                setattr(found, key, getattr(given, key))
        held = dict(found.fields)
        for field in given.custom_fields:
            if field.overwrite or not held.get(field.key):
                held[field.key] = field.value
        found.fields = held
        found.updated = now
        session.add(found)
        session.flush()
        wire = found.wire()
        session.commit()
        return wire


def meet(session, given):
    for column in ("token", "phone", "email"):
        value = getattr(given, column)
        if not value:
            continue
        query = select(Visitor).where(getattr(Visitor, column) == value)
        found = session.exec(query.order_by(Visitor.number).limit(1)).first()
        if found is not None:
            if column == "email":
                found.token = given.token
            return found
    return None


with suppress(OperationalError):  # where the other worker makes the tables
    SQLModel.metadata.create_all(engine)

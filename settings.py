"""The environment, read once into one frozen dataclass (contract, section 8)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

VERSION = "0.1.0"  # of this service

# What makes two registrations one visitor; the order is the order of looking.
MATCH_FORMS = ("token", "token,phone", "token,email", "token,phone,email")


class SettingError(Exception):
    """A value that cannot be meant: one line that names the variable and the reason."""


@dataclass(frozen=True)
class Settings:
    """What can be configured; every default is the contract's."""

    bind: str = "127.0.0.1:3000"  # PORT and LIVECHAT_HOST; gunicorn judges it
    database: str = "livechat.db"  # LIVECHAT_DB
    match: tuple[str, ...] = ("token",)  # LIVECHAT_MATCH
    departments: Mapping[str, str] = field(default_factory=dict)  # id or name -> id; empty: any
    custom_fields: frozenset[str] = frozenset()  # the keys that are kept; empty: any
    # The user id and the token of the read side; none: nobody reads. Never shown.
    agent: tuple[str, str] | None = field(default=None, repr=False)
    cors_origins: str | tuple[str, ...] = "*"  # "*", or the origins whose pages may ask
    rate_limit: int | None = None  # calls a minute of one client to one route; none: any number
    trusted_proxies: int = 0  # in front of us, each of which appends to X-Forwarded-For
    standin: str = ""  # "1" or "any": who may call /standin/; empty: it is not there

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read `environ`; raise `SettingError` for a value that cannot be meant."""

        def read(name: str, default: str = "") -> str:
            value = environ.get(name, default)
            try:
                value.encode()
            except UnicodeEncodeError:
                raise SettingError(f"{name}: not UTF-8") from None
            return value

        return cls(
            bind=_bind(read("LIVECHAT_HOST"), read("PORT")),
            database=_database(read("LIVECHAT_DB", cls.database)),
            match=_match(read("LIVECHAT_MATCH") or "token"),
            departments=_departments(read("LIVECHAT_DEPARTMENTS")),
            custom_fields=frozenset(_items(read("LIVECHAT_CUSTOM_FIELDS"))),
            agent=_agent(read("LIVECHAT_AGENT")),
            cors_origins=_origins(read("LIVECHAT_CORS_ORIGINS") or "*"),
            rate_limit=_number("LIVECHAT_RATE_LIMIT", read("LIVECHAT_RATE_LIMIT"), 1),
            trusted_proxies=_number("LIVECHAT_TRUSTED_PROXIES", read("LIVECHAT_TRUSTED_PROXIES"), 0)
            or 0,
            standin=_standin(read("LIVECHAT_STANDIN")),
        )


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]


def _bind(host: str, port: str) -> str:
    # A host that sets PORT routes to it from outside; without one this is somebody's laptop.
    host = host or ("0.0.0.0" if port else "127.0.0.1")
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    if port.isdecimal() and int(port) > 65_535:  # of which gunicorn makes a traceback, and late
        raise SettingError(f"PORT: {port!r} is not a port, which ends at 65535")
    return f"{host}:{port or 3000}"


def _database(path: str) -> str:
    if not path.strip():
        raise SettingError("LIVECHAT_DB: the name is empty")
    if path == ":memory:" or path.startswith("file:"):
        # It would be lost with the process.
        raise SettingError(f"LIVECHAT_DB: {path!r} is not a file; give the path of one")
    return os.path.realpath(path)  # SQLite's WAL is beside the file itself


def _match(value: str) -> tuple[str, ...]:
    form = tuple(_items(value))
    if ",".join(form) not in MATCH_FORMS:
        raise SettingError(f"LIVECHAT_MATCH: {value!r} is none of {' | '.join(MATCH_FORMS)}")
    return form


def _departments(value: str) -> dict[str, str]:
    ids: dict[str, str] = {}
    names: dict[str, str] = {}
    for item in _items(value):
        id_, colon, name = (part.strip() for part in item.partition(":"))
        name = name if colon else id_
        if not id_ or not name:
            raise SettingError(f"LIVECHAT_DEPARTMENTS: {item!r} is not id:name")
        if id_ in ids or name in names:
            raise SettingError(f"LIVECHAT_DEPARTMENTS: {item!r} stands there twice")
        ids[id_] = names[name] = id_
    return names | ids  # an id wins over another department's name


def _agent(value: str) -> tuple[str, str] | None:
    user_id, _, token = value.partition(":")
    if value and not (user_id and token):
        raise SettingError("LIVECHAT_AGENT: not userId:authToken, both not empty")
    return (user_id, token) if value else None


def _origins(value: str) -> str | tuple[str, ...]:
    origins = tuple(origin.lower() for origin in _items(value))  # as browsers send them
    if origins == ("*",):
        return "*"
    for origin in origins:
        if not re.fullmatch("[a-z][a-z0-9+.-]*://[^/?#@*\\s]+", origin):
            raise SettingError(
                f"LIVECHAT_CORS_ORIGINS: {origin!r} is no origin such as https://example.org"
            )
    return origins


def _standin(value: str) -> str:
    if value not in ("", "1", "any"):
        raise SettingError(f"LIVECHAT_STANDIN: {value!r} is none of 1 | any")
    return value


def _number(name: str, value: str, least: int) -> int | None:
    if not value.strip():
        return None
    if not re.fullmatch("[0-9]{1,9}", value.strip()) or int(value) < least:
        raise SettingError(f"{name}: {value!r} is not a number from {least} on")
    return int(value)

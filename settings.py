"""The environment, read once into one frozen dataclass (contract, section 8)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from ipaddress import IPv6Address
from typing import Any

VERSION = "0.1.0"  # of this service

# What makes two registrations one visitor; the order is the order of looking.
MATCH_FORMS = ("token", "token,phone", "token,email", "token,phone,email")

# What env files, shells and editors leave in a value: a pattern, and what it says of the value.
LEFTOVERS = {
    "[\ud800-\udfff]": "is not UTF-8",  # how Python reads other bytes
    r"^\s|\s$": "begins or ends with a blank or a line break",
    "^['\"]|['\"]$": "begins or ends with a quote, which would be a part of it",
    r"\s#(\s|$)": "contains a comment, which would be a part of it",
    "[\x00-\x1f\x7f]": "contains a control character",
}
# What is not the path of a file.
NOT_A_PATH = {
    "^$": "is empty",
    "^:memory:$": "is not a file, and would be lost with the process",
    "^[A-Za-z][A-Za-z0-9+.-]*://|^(file|sqlite):": "is a URL",
    r"^[A-Za-z]:|\\": "is a path of Windows",
    r"^~|\$|^%": "begins with ~ or % or contains $, which are not replaced here",
    r"\s#": "contains a comment, which would be a part of it",
    "/$": "is a folder",
}
PASSWORD = re.compile("//[^/]*@")  # of a URL, perhaps
# What Kubernetes sets in every container, for a Service whose name begins with "livechat".
KUBERNETES = re.compile(
    r"LIVECHAT_(\w+_)?(SERVICE_(HOST|PORT\w*)=|PORT_\d+_(TCP|UDP|SCTP)\w*=|PORT=\w+://).*"
)


class SettingError(Exception):
    """An environment variable has an invalid value or name: one line that says which and why."""


# A parser raises ValueError with what is wrong, to be read after the value.


def _refuse(value: str, patterns: Mapping[str, str]) -> None:
    for pattern, problem in patterns.items():
        if re.search(pattern, value):
            raise ValueError(problem)


def _items(value: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _number(least: int, most: int, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or not least <= int(value) <= most:
        raise ValueError("is not valid")
    return int(value)


def _host(value: str) -> str:
    if ":" in value:
        try:
            return f"[{IPv6Address(value.removeprefix('[').removesuffix(']'))}]"
        except ValueError:
            raise ValueError("is not valid") from None
    if not re.fullmatch(r"[\w.-]+", value):
        raise ValueError("is not valid")
    return value


def _database(value: str) -> str:
    _refuse(value, NOT_A_PATH)
    return os.path.realpath(value)  # SQLite's WAL is beside the file itself


def _match(value: str) -> tuple[str, ...]:
    form = _items(value)
    if ",".join(form) not in MATCH_FORMS:
        raise ValueError("is not valid")
    return form


def _departments(value: str) -> dict[str, str]:
    ids: dict[str, str] = {}
    names: dict[str, str] = {}
    for item in _items(value):
        id_, colon, name = (part.strip() for part in item.partition(":"))
        name = name if colon else id_
        if not id_ or not name:
            raise ValueError(f"lacks the id or the name in {item!r}")
        if id_ in ids or name in names:
            raise ValueError(f"has the id or the name of {item!r} twice")
        ids[id_] = names[name] = id_
    return names | ids  # an id wins over another department's name


def _agent(value: str) -> tuple[str, str]:
    user_id, _, token = value.partition(":")
    if not (user_id and token):
        raise ValueError("lacks the colon, or what is before or after it")
    return user_id, token


def _origins(value: str) -> str | tuple[str, ...]:
    origins = tuple(origin.lower() for origin in _items(value))  # as browsers send them
    if origins == ("*",):
        return "*"
    for origin in origins:
        if not re.fullmatch("[a-z][a-z0-9+.-]*://[^/?#@*\\s]+", origin):
            raise ValueError(f"contains {origin!r}, which is no origin")
    return origins


def _standin(value: str) -> str:
    if value not in ("1", "any"):
        raise ValueError("is not valid")
    return value


def _variable(name: str, parse: Callable[[str], Any], form: str) -> dict[str, Any]:
    return {"name": name, "parse": parse, "form": form}


@dataclass(frozen=True)
class Settings:
    """What can be configured; every default is the contract's."""

    port: int | None = field(
        default=None,  # 3000, for this machine alone
        metadata=_variable("PORT", partial(_number, 0, 65_535), "a number from 0 to 65535"),
    )
    host: str | None = field(
        default=None,
        metadata=_variable("LIVECHAT_HOST", _host, "an IP address or a host's name, without port"),
    )
    database: str = field(
        default_factory=partial(_database, "livechat.db"),
        metadata=_variable(
            "LIVECHAT_DB", _database, "the path of a file, such as /var/lib/livechat/livechat.db"
        ),
    )
    match: tuple[str, ...] = field(
        default=("token",), metadata=_variable("LIVECHAT_MATCH", _match, " | ".join(MATCH_FORMS))
    )
    departments: Mapping[str, str] = field(  # id or name -> id; empty: any
        default_factory=dict,
        metadata=_variable("LIVECHAT_DEPARTMENTS", _departments, "id:name,... or name,..."),
    )
    custom_fields: frozenset[str] = field(  # the keys that are kept; empty: any
        default=frozenset(),
        metadata=_variable(
            "LIVECHAT_CUSTOM_FIELDS", lambda value: frozenset(_items(value)), "key,..."
        ),
    )
    # The user id and the token of the read side; none: nobody reads. Never shown.
    agent: tuple[str, str] | None = field(
        default=None, repr=False, metadata=_variable("LIVECHAT_AGENT", _agent, "userId:authToken")
    )
    cors_origins: str | tuple[str, ...] = field(  # "*", or the origins whose pages may ask
        default="*",
        metadata=_variable(
            "LIVECHAT_CORS_ORIGINS", _origins, "* or origins such as https://example.org,..."
        ),
    )
    rate_limit: int | None = field(  # calls a minute of one client to one route; none: any number
        default=None,
        metadata=_variable(
            "LIVECHAT_RATE_LIMIT", partial(_number, 1, 10**9), "a whole number from 1 on"
        ),
    )
    trusted_proxies: int = field(  # in front of us, each of which appends to X-Forwarded-For
        default=0,
        metadata=_variable(
            "LIVECHAT_TRUSTED_PROXIES", partial(_number, 0, 10**9), "a whole number from 0 on"
        ),
    )
    standin: str = field(  # who may call /standin/; empty: it is not there
        default="", metadata=_variable("LIVECHAT_STANDIN", _standin, "1 or any")
    )
    configured: tuple[str, ...] = ()  # NAME=value of each variable that is set; no secret
    unknown: tuple[str, ...] = ()  # the names of variables that look like ours and are not

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read `environ`; raise `SettingError` for an invalid value or a misspelled name."""
        unknown = _unknown(environ)
        values: dict[str, Any] = {}
        configured = []
        for name, variable in VARIABLES.items():
            value = environ.get(name)
            if value is None or (not value and name != "LIVECHAT_DB"):
                continue  # an empty value counts as not set, but for the database
            secret = not variable.repr
            try:
                _refuse(value, LEFTOVERS)
                values[variable.name] = variable.metadata["parse"](value)
            except ValueError as problem:
                said = f"{'its value' if secret else repr(value)} {problem}"
                raise SettingError(
                    f"{name}: {PASSWORD.sub('//...@', said)};"
                    f" it has to be {variable.metadata['form']}"
                ) from None
            configured.append(f"{name}={'(not shown)' if secret else value}")
        return cls(**values, configured=tuple(configured), unknown=unknown)

    @property
    def bind(self) -> str:
        """Return the address to listen on, as gunicorn takes it."""
        # A host that sets PORT routes to it from outside; without one this is somebody's laptop.
        host = self.host or ("127.0.0.1" if self.port is None else "0.0.0.0")
        return f"{host}:{3000 if self.port is None else self.port}"


VARIABLES = {
    variable.metadata["name"]: variable for variable in fields(Settings) if variable.metadata
}
KNOWN = (*VARIABLES, "LIVECHAT_STANDIN_HOME")  # the last is read by livechat_standin.py alone
# What may follow LIVECHAT_ in a misspelled name, and the variable that is meant.
SHORT = {"DATABASE": "LIVECHAT_DB"} | {name.removeprefix("LIVECHAT_"): name for name in KNOWN}


def _unknown(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the unknown names that begin with LIVECHAT_; raise for one that is nearly known."""
    unknown = []
    for name, value in sorted(environ.items()):
        short = name.upper().removeprefix("LIVECHAT_")
        if short == name.upper() or name in KNOWN or KUBERNETES.fullmatch(f"{name}={value}"):
            continue
        close = get_close_matches(short, SHORT, cutoff=0.75)
        # LIVECHAT_DB_PATH is LIVECHAT_DB, unless that is set too.
        close += [
            known
            for known in SHORT
            if (known.startswith(short) or short.startswith(known)) and SHORT[known] not in environ
        ]
        if close:
            raise SettingError(
                f"{name}: there is no such variable; did you mean {SHORT[close[0]]}?"
            )
        unknown.append(name)
    return tuple(unknown)

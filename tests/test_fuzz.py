"""Whatever hypothesis thinks of, held against the contract written a second time, here.

A few examples in `make test`, many in `make fuzz`; what that finds becomes a row of
tests/test_hostile.py.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import tempfile
import time
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import storage
from resources.body import parse
from resources.errors import MAX_BODY
from settings import MATCH_FORMS
from tests.server import PATH, Server
from tests.service import Service
from tests.wire import chunks, send_in_pieces

API = "/api/v1/livechat"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def examples(few, many=EXAMPLES, **more):
    """Return the settings of a test: always the same few examples, or as many as are asked for."""
    return settings(max_examples=many or few, derandomize=not EXAMPLES, deadline=None, **more)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    environ = {"LIVECHAT_AGENT": "agent:secret"}
    service = Service(tmp_path_factory.mktemp("fuzz") / "livechat.db", environ)
    service.http.lint = False  # which refuses to send some
    yield service
    service.database.close()


# The door: what strict JSON is (contract, 1), by a grammar of bytes.

CHARACTER = rb"""(?x:
    [\x20\x21\x23-\x5b\x5d-\x7f] | [\xc2-\xdf][\x80-\xbf]
    | \xe0[\xa0-\xbf][\x80-\xbf] | [\xe1-\xec\xee\xef][\x80-\xbf]{2} | \xed[\x80-\x9f][\x80-\xbf]
    | \xf0[\x90-\xbf][\x80-\xbf]{2} | [\xf1-\xf3][\x80-\xbf]{3} | \xf4[\x80-\x8f][\x80-\xbf]{2}
    | \\["\\/bfnrt]
    | \\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}
    | \\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}
)"""
LEXEME = re.compile(
    rb"(?P<space>[ \t\n\r]+)"
    rb'|(?P<string>"' + CHARACTER + rb'*")'
    rb"|(?P<value>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null)"
    rb"|(?P<mark>[\[\]{},:])"
    rb"|(?P<wrong>.)",
    re.DOTALL,
)
INNERMOST = re.compile(rb"\[(?:[sv](?:,[sv])*)?\]|\{(?:s:[sv](?:,s:[sv])*)?\}")


def is_strict_json(data):
    """Say whether bytes are JSON of at most 100 levels, by folding one level after the other."""
    short = {"space": b"", "string": b"s", "value": b"v", "wrong": b"!"}
    text = LEXEME.sub(lambda found: short.get(found.lastgroup, found[0]), data)
    for _ in range(100):
        text = INNERMOST.sub(b"v", text)
    return text in (b"s", b"v")


ANY_TEXT = st.text(st.characters() | st.sampled_from("\ud83d\ude00"), max_size=8)
SCRAPS = (
    rb"""
    { } [ ] , : " ' \ / \u \ud83d \ude00 \uD83D\uDE00 \ud83d\ude00\ud83d \udfff \u0000 \x \" \\ "":
    0 01 - + . 1e 1e999 -0.0E-5 .5 5. 0x1 NaN Infinity -Infinity true false null nul None "a" {} []
    {"visitor": "token": {"visitor":{"token":"t"}} // # $set __proto__
""".split()
    + [
        *[b" ", b"\t", b"\n", b"\r", b"\0", b"\x0b", b"\x0c", b"\x1b", b"\x7f", b"\x80", b"\xff"],
        *[b"\xa0", b"\xc2\xa0", b"\xef\xbb\xbf", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"],
        *["é".encode(), "\u2028".encode(), "\U0001f600".encode(), "{}".encode("utf-16")],
        *[b"[" * 99, b"]" * 99, b"9" * 400, b"9" * 5_000],
    ]
)
SCRAP = st.sampled_from(SCRAPS) | st.binary(max_size=3)


def json_values(texts, numbers):
    scalars = st.sampled_from([None, True, False]) | numbers | texts | texts
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=8,
    )


EDIT = st.tuples(st.integers(0, 5_000), st.integers(0, 3), SCRAP)


@st.composite
def mutated_json(draw):
    """Return the bytes of a real JSON text, often deep and often with something wrong in it."""
    value = draw(json_values(ANY_TEXT, st.integers() | st.floats()))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.none() | st.just(1)))
    data = text.encode("utf-8", "surrogatepass")
    levels = draw(st.sampled_from([0, 0, 0, 97, 98, 99, 100, 101]))
    opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"":', b"}")]))
    data = opening * levels + data + closing * levels
    for place, cut, scrap in draw(st.just([]) | st.lists(EDIT, min_size=1, max_size=2)):
        place %= len(data) + 1
        data = data[:place] + scrap + data[place + cut :]
    return data


BYTES = mutated_json() | mutated_json() | st.lists(SCRAP, max_size=12).map(b"".join)


@examples(150)
@given(BYTES)
def test_the_door_takes_strict_json_and_nothing_else(data):
    try:
        parse(data)
        taken = True
    except (ValueError, RecursionError):
        taken = False
    assert taken == is_strict_json(data)


TEXT = st.text(max_size=8)
VALUE = json_values(TEXT, st.integers() | st.floats(allow_nan=False, allow_infinity=False))


@examples(50)
@given(VALUE, st.booleans())
def test_what_the_door_takes_it_reads_as_it_was_sent(value, escaped):
    assert parse(json.dumps(value, ensure_ascii=escaped).encode()) == value


# The checks: which bodies are taken (contract, 2 to 5).


def texts(most, least=0):
    """Return texts of `least` to `most` characters, and now and then what is none."""
    usual = st.text(st.characters(exclude_characters="\0"), min_size=least, max_size=8)
    odd = [*["x" * size for size in (0, most, most + 1)], "\0", "x\0", "\ud83d", "😀" * most]
    return usual | usual | usual | st.sampled_from(odd) | VALUE


def objects(members, optional=()):
    """Return objects of these members, and now and then others, and what is none."""
    required = {key: value for key, value in members.items() if key not in optional}
    others = {key: members[key] for key in optional}
    right = st.fixed_dictionaries(required, optional=others)
    wrong = st.fixed_dictionaries({}, optional={**members, "other": VALUE, "\u202e" * 70: VALUE})
    return right | right | right | wrong | VALUE


LIMITS = {"name": 256, "email": 254, "department": 128, "phone": 64, "username": 128}
# What JavaScript, Python or nobody trims.
WHITE = st.text("\t\n\v\f\r\x1c\x1f \x85\xa0\u180e\u2003\u200b\u2028\u202f\ufeff", max_size=2)
EMAILS = st.tuples(WHITE, st.sampled_from(["a@b", ""]), WHITE).map("".join) | st.sampled_from(
    ["a@b", "@", "a@", "a@b@c", "É@ß", "a b@c\n d"]
)
FIELD_MEMBERS = {
    "key": texts(128, least=1),
    "value": texts(4_096),
    "overwrite": st.booleans() | st.booleans() | st.booleans() | VALUE,
}
FIELDS = st.lists(objects(FIELD_MEMBERS), max_size=3) | st.sampled_from([[None] * 65, {}, [[]]])
BODIES = {
    "visitor": objects(
        {
            "visitor": objects(
                {
                    "token": texts(256) | WHITE,
                    **{key: texts(most) for key, most in LIMITS.items()},
                    "email": texts(254) | EMAILS | EMAILS | EMAILS,
                    "customFields": FIELDS,
                },
                optional=[*LIMITS, "customFields"],
            )
        }
    ),
    "visitor.status": objects({"token": texts(256), "status": texts(64)}),
    "custom.field": objects({"token": texts(256), **FIELD_MEMBERS}),
    "custom.fields": objects({"token": texts(256), "customFields": FIELDS}),
}


def is_text(value, most, least=0):
    return isinstance(value, str) and least <= len(value) <= most and "\0" not in value


def are_fields(value, closed):
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(field, dict) and is_field(field, closed) for field in value)
    )


def is_field(field, closed, more=frozenset()):
    keys = {"key", "value", "overwrite", *more}
    return (
        (keys == field.keys() if closed else keys <= field.keys())
        and is_text(field["key"], 128, 1)
        and is_text(field["value"], 4_096)
        and isinstance(field["overwrite"], bool)
    )


def trimmed(text):
    """Return a text without JavaScript's white space around it."""
    while text and is_white(text[0]):
        text = text[1:]
    while text and is_white(text[-1]):
        text = text[:-1]
    return text


def is_white(character):
    return character in "\t\n\v\f\r\ufeff\u2028\u2029" or unicodedata.category(character) == "Zs"


def verdict(name, body):
    """Return the error that the contract has for a body, or 200; nobody has that token."""
    if re.search("[\ud800-\udfff]", json.dumps(body, ensure_ascii=False)):
        return "error-invalid-json"
    if not isinstance(body, dict):
        return "invalid-params"
    if name == "visitor":
        visitor = body.get("visitor")
        if not (
            body.keys() == {"visitor"}
            and isinstance(visitor, dict)
            and is_text(visitor.get("token"), 256)
            and all(is_text(visitor.get(key, ""), most) for key, most in LIMITS.items())
            and are_fields(visitor.get("customFields", []), closed=False)
        ):
            return "invalid-params"
        email = trimmed(visitor.get("email", ""))
        if not trimmed(visitor["token"]):
            return "error-invalid-token"
        if visitor.get("email") and ("" in email.split("@") or email.count("@") != 1):
            return "error-invalid-email"
        return 200
    right = is_text(body.get("token"), 256) and (
        (name == "visitor.status" and len(body) == 2 and is_text(body.get("status"), 64))
        or (name == "custom.field" and is_field(body, True, {"token"}))
        or (
            name == "custom.fields"
            and len(body) == 2
            and are_fields(body.get("customFields"), True)
        )
    )
    return "invalid-token" if right else "invalid-params"


FORMS = re.compile(
    r"Match error: ("
    r"(Expected (object|string|boolean), got (null|string|number|boolean|object)"
    r"|Expected plain object|Expected array, got .{1,64}"
    r"|Missing key '(visitor|token|status|key|value|overwrite)'"
    r"|Expected at most (\d{2,4} characters|64 items)|Expected at least 1 character"
    r"|Expected text without NUL characters)"
    r"( in field (visitor|token|status)(\.[a-z]{4,10}|\.customFields(\[\d\d?\](\.[a-z]{3,9})?)?)?)?"
    r"|Unknown key in field .{0,64})"
    r"|(must be (object|string|boolean|array)|must have required property '[a-zA-Z]{3,12}'"
    r"|must NOT have additional properties|must NOT have more than (\d{2,4} characters|64 items)"
    r"|must NOT have fewer than 1 characters|must NOT contain NUL characters) \[invalid-params\]"
    r"|Token cannot be empty \[error-invalid-token\]|Invalid email .{0,260} \[error-invalid-email\]"
    r"|\[?invalid-token\]?|The request body is not valid JSON: [a-zA-Z0-9 ,-]+ \[error-invalid-json\]",
    re.DOTALL,
)


@pytest.mark.parametrize("name", BODIES)
@examples(40)
@given(data=st.data())
def test_a_body_is_taken_exactly_when_the_contract_takes_it(service, name, data):
    body = json.loads(json.dumps(data.draw(BODIES[name])))  # two surrogates may make a pair
    assume(len(json.dumps(body)) <= MAX_BODY)
    before = service.content()
    answer = service.post(body, path=f"{API}/{name}")
    if answer.status_int == 200:
        assert verdict(name, body) == 200
        path = f"{PATH}/{quote(body['visitor']['token'], safe='')}"
        assert service.http.get(path).json == answer.json
        service.http.delete(path)
    else:
        assert answer.json["errorType"] == verdict(name, body)
        assert FORMS.fullmatch(answer.json["error"]), answer.text
        assert service.content() == before


# The whole app: any request at all.

PATHS = [
    *["/", "/livez", "/health", "/readyz", "/api/info", "/api/openapi.json"],
    *[f"{API}/{name}" for name in (*BODIES, "visitors.info", "visitors.search")],
]
PIECES = ["", *PATHS, "/", "//", "..", "?", "\0", "\r\n", "%", "a", "\xff", "\xc3\xa9", "\xed\xa0"]
LATIN = st.text(st.characters(max_codepoint=255), max_size=8)
ANY_PATH = (
    st.sampled_from(PATHS)
    | LATIN.map(lambda token: f"{PATH}/{token}")
    | st.lists(
        st.sampled_from(PIECES) | st.text(st.characters(max_codepoint=255), max_size=3), max_size=3
    ).map(lambda pieces: "/" + "".join(pieces).removeprefix("/"))
)
QUERY = st.lists(
    st.sampled_from(
        ["term=", "count=", "offset=", "sort=", "visitorId=", "&", "%", "=", "%00", "%ff"]
    )
    | st.sampled_from(['{"name":1}', "-1", "1e999", "9" * 400, "NaN", "[" * 1_000, "a", "%F0%9F"]),
    max_size=6,
).map("".join)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Content-Type": st.sampled_from(["application/json", "*/*", "text/plain"]) | LATIN,
        "Content-Encoding": LATIN,
        "Accept": LATIN,
        "Origin": LATIN,
        "Cookie": LATIN,
        "Access-Control-Request-Method": LATIN,
        "Access-Control-Request-Headers": LATIN,
        "X-User-Id": st.just("agent") | LATIN,
    },
)
METHODS = ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "TRACE", "CONNECT", "FOO", "get", ""]


@examples(80)
@given(
    method=st.sampled_from(METHODS[:4]) | st.sampled_from(METHODS),
    path=ANY_PATH,
    query=QUERY,
    headers=HEADERS,
    body=BYTES
    | st.sampled_from(list(BODIES)).flatmap(BODIES.get).map(lambda b: json.dumps(b).encode()),
)
def test_whatever_is_asked_is_answered_in_the_contracts_shape(
    service, method, path, query, headers, body
):
    before = service.content()
    answer = service.http.request(
        "/",
        method=method,
        environ={"PATH_INFO": path, "QUERY_STRING": query},
        headers={"X-User-Id": "agent", "X-Auth-Token": "secret"} | headers,
        body=body,
        expect_errors=True,
    )
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    if answer.status_int == 200:
        return
    assert 400 <= answer.status_int < 500
    assert service.content() == before
    assert len(answer.text) < 1_500
    if method != "HEAD":
        keys = list(answer.json)
        expected = ["success", "error", "status", "message"]
        if answer.status_int != 401:
            expected = ["success", "error", "errorType", "details"][: max(3, len(keys))]
        assert keys == expected
        assert answer.json["success"] is False


# The server: any bytes at all, in any pieces.

REGISTER = b'{"visitor":{"token":"t"}}'
LINES = st.builds(
    b"%s %s HTTP/%s".__mod__,
    st.tuples(
        st.sampled_from(
            [b"POST"] * 4 + [b"GET", b"DELETE", b"OPTIONS", b"CONNECT", b"PRI", b"FOO"]
        ),
        st.sampled_from(
            [PATH.encode()] * 4
            + [b"/livez", b"/nothing", f"{PATH}/nobody".encode(), b"*", b"http://x", b"//", b"x:80"]
        ),
        st.sampled_from([b"1.1"] * 8 + [b"1.0", b"2.0"]),
    ),
)
FRAMES = st.sampled_from(
    [
        (b"Content-Length: %d" % len(REGISTER), REGISTER),
        (b"Content-Length: %d" % len(REGISTER), REGISTER[:9]),
        (b"Content-Length: 65537", b" " * 99),
        (b"Content-Length: 0", b""),
        *[(b"Transfer-Encoding: chunked", chunks(REGISTER, size)) for size in (1, 9, 99)],
        (b"Transfer-Encoding: chunked", chunks(REGISTER, 9)[:-2] + b"Host: y\r\nX_Y: z\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"19;x=y\r\n" + REGISTER + b"\r\n0\r\n"),
        (b"Transfer-Encoding: gzip", REGISTER),
        (b"X: y", b""),
    ]
)
FIELD_LINES = st.lists(
    st.sampled_from(
        [
            *[b"Connection: Upgrade", b"Upgrade: h2c", b"Connection: close", b"Host: y", b"X_Y: z"],
            *[b"Expect: 100-continue", b"Expect: x", b"Content-Type: text/plain", b"Origin: x"],
            *[b"Content-Length: 3", b"Transfer-Encoding: chunked", b"X: " + b"y" * 3_000, b"X:y "],
        ]
    ),
    max_size=3,
)
WIRE_SCRAPS = st.sampled_from(
    [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b":", b"\0", b"\xff", b";", b"0\r\n\r\n", b"5\r\n"]
) | st.binary(max_size=3)
MORE = st.sampled_from([b"", b"", b"\r\n", b"x", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"])


@st.composite
def wire_requests(draw):
    """Return the bytes of a request, often with something wrong in it or behind it."""
    framing, body = draw(FRAMES)
    fields = draw(st.permutations([b"Host: x", framing, *draw(FIELD_LINES)]))
    data = b"\r\n".join([draw(LINES), *fields, b"", body])
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:place] + draw(WIRE_SCRAPS) + data[place + cut :]
    return data + draw(MORE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("fuzz-server")).wait()
    yield server
    server.kill()
    assert not re.search("ERROR|CRITICAL|Traceback", server.log())


def exchange(server, parts):
    """Send bytes in parts and end the sending side; return the answers: status, headers, body."""
    data = b""
    with server.connect() as client:
        with contextlib.suppress(OSError):  # the server may close after a refusal
            send_in_pieces(client, parts)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while more := client.recv(65_536):
                data += more
    answers = []
    while data := data.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"):
        head, _, rest = data.partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        headers = {key.lower(): value for key, value in (field.split(": ") for field in fields)}
        assert line.startswith("HTTP/1.1 ")
        length = int(headers["content-length"])
        assert len(rest) >= length
        answers.append((int(line.split()[1]), headers, rest[:length]))
        data = rest[length:]
    return answers


def outcome(answer):
    """Return what has to be the same each time; the visitor has other dates."""
    status, _, body = answer
    return status, None if status == 200 else json.loads(body)


@examples(80)
@given(wire_requests(), st.lists(st.integers(0, 400), max_size=4))
def test_bytes_in_any_pieces_get_the_same_first_answer_and_in_one_piece_no_other(
    server, data, cuts
):
    answers = exchange(server, [data])
    if b"\r\n\r\n" not in data.lstrip(b"\r\n"):  # no head has come to its end
        assert not answers or answers[0][0] in (400, 414, 431)
    else:
        [(status, headers, body)] = answers
        assert status in (200, 400, 404, 405, 413, 415, 417, 501)
        assert headers["content-type"] == "application/json"
        assert status == 200 or json.loads(body)["success"] is False
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(places)]
    again = exchange(server, parts)
    assert [outcome(answer) for answer in again[:1]] == [outcome(answer) for answer in answers]


# The store: a model of contract 2.3, 5 and 6.

TOKENS = st.sampled_from(["a", "b", "A", "e\u0301", "\u00e9"])
PHONES = st.sampled_from(["1", "%"])
ADDRESSES = st.sampled_from(["a@x", "é@x"])
WORDS = st.sampled_from(
    ["Ann", "ANN", "ann%", "Straße", "STRASSE", "İ", "Σίσυφος", "_", "a\u0301", "x"]
)
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "username": WORDS,
        "name": WORDS,
        "email": ADDRESSES,
        "phone": PHONES,
        "department": WORDS,
    },
)
SOME_FIELD = st.fixed_dictionaries(
    {
        "key": st.sampled_from(["k", "K", "a.b", "__proto__"]),
        "value": st.just("") | WORDS,
        "overwrite": st.booleans(),
    }
)
# Each of these has 4,096 bytes in JSON, or some more.
LONG_VALUES = st.sampled_from(["", "v" * 4_094, "é" * 2_047, '"' * 2_047, "\x01" * 682])


def some_fields(start, number, value):
    return [
        {"key": f"{key}", "value": value, "overwrite": True} for key in range(start, start + number)
    ]


SOME_FIELDS = (
    st.lists(SOME_FIELD, max_size=4)
    | st.builds(some_fields, st.sampled_from([0, 128, 200]), st.just(128), st.just("v"))
    | st.builds(some_fields, st.sampled_from([0, 8]), st.sampled_from([8, 15, 16]), LONG_VALUES)
)
SORT = st.lists(
    st.tuples(st.sampled_from(["name", "username", "ts", "_updatedAt"]), st.sampled_from([1, -1])),
    unique_by=lambda pair: pair[0],
    max_size=2,
).map(dict)
TERMS = (
    st.just("")
    | WORDS
    | PHONES
    | ADDRESSES
    | ADDRESSES.map(str.upper)
    | st.sampled_from(
        ["n", "N", "ss", "ß", "i\u0307", "ς", "\u0301", "guest-", "v", "k", "\0", "Ann\0", "?"]
    )
)


class StoreMachine(RuleBasedStateMachine):
    """The store on a real file beside a list of dicts, in the order of creation."""

    def __init__(self, form, keys):
        super().__init__()
        self.match, self.keys = form.split(","), keys
        self.folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self.folder.name) / "livechat.db")
        self.visitors, self.ids, self.guests = [], set(), 1
        self.now = 1_656_482_701_392
        storage.prepare(self.path, tuple(self.match))
        self.open()

    def open(self):
        self.database = storage.Database(self.path)
        self.store = storage.VisitorStore(
            self.database, tuple(self.match), self.keys, clock=lambda: self.now
        )

    def teardown(self):
        self.database.close()
        self.folder.cleanup()

    def met(self, token, given):
        """Return whom a registration meets, by token, then phone, then email: the oldest."""
        wanted = {"token": token, **given}
        for key in self.match:
            for visitor in self.visitors:
                if key in wanted and visitor.get(key) == wanted[key]:
                    return visitor, token if key == "email" else visitor["token"]
        return None, token

    def with_fields(self, visitor, fields):
        """Return a visitor's custom fields after these, or the error that they are."""
        held = dict(visitor["fields"])
        for field in fields:
            if field["overwrite"] or held.get(field["key"], "") == "":
                held[field["key"]] = field["value"]
        if len(held) > 256:
            return storage.OverLimit
        if len(json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()) > 65_536:
            return storage.OverLimit  # nobody has more from an earlier time here
        return held

    def wire(self, visitor):
        """Return a visitor as the contract answers it (2.4)."""
        shape = {
            "_id": visitor["_id"],
            "username": visitor["username"],
            "status": "online",
            "ts": date(visitor["ts"]),
            "_updatedAt": date(visitor["_updatedAt"]),
            "token": visitor["token"],
        }
        if "name" in visitor:
            shape["name"] = visitor["name"]
        if "phone" in visitor:
            shape["phone"] = [{"phoneNumber": visitor["phone"]}]
        if "email" in visitor:
            shape["visitorEmails"] = [{"address": visitor["email"]}]
        if "department" in visitor:
            shape["department"] = visitor["department"]
        if visitor["fields"]:
            shape["livechatData"] = visitor["fields"]
        return shape

    def known(self, token):
        return next((visitor for visitor in self.visitors if visitor["token"] == token), None)

    @rule(token=TOKENS, given=GIVEN, fields=SOME_FIELDS)
    def register(self, token, given, fields):
        visitor, kept = self.met(token, given)
        new = visitor is None
        if new:
            visitor = {"ts": self.now, "_updatedAt": self.now, "fields": {}}
            visitor["username"] = given.get("username") or f"guest-{self.guests + 1}"
        skipped = [field for field in fields if not self.keys or field["key"] in self.keys]
        held = self.with_fields(visitor, skipped)
        if not isinstance(held, dict):
            with pytest.raises(held):
                self.store.register(token, given, fields)
            return
        answer = self.store.register(token, given, fields)
        given = {key: value for key, value in given.items() if key != "username"}
        updated = max(self.now, visitor["_updatedAt"])
        if new:
            self.guests += visitor["username"] == f"guest-{self.guests + 1}"
            assert re.fullmatch("[2-9A-HJ-NP-Za-km-z]{17}", answer["_id"])
            assert answer["_id"] not in self.ids
            self.ids.add(answer["_id"])
            visitor["_id"] = answer["_id"]
            self.visitors.append(visitor)
        visitor.update(given, token=kept, fields=held, _updatedAt=updated)
        assert list(answer.items()) == list(self.wire(visitor).items())

    @rule(token=TOKENS, fields=SOME_FIELDS)
    def set_fields(self, token, fields):
        visitor = self.known(token)
        unknown = self.keys and any(field["key"] not in self.keys for field in fields)
        held = visitor and self.with_fields(visitor, fields)
        error = (
            storage.VisitorNotFound
            if visitor is None
            else storage.UnknownField
            if unknown or not fields
            else held
            if not isinstance(held, dict)
            else None
        )
        if error:
            with pytest.raises(error):
                self.store.set_fields(token, fields)
        else:
            self.store.set_fields(token, fields)
            visitor.update(fields=held, _updatedAt=max(self.now, visitor["_updatedAt"]))
        self.find(token)

    @rule(token=TOKENS)
    def find(self, token):
        visitor = self.known(token)
        if visitor is None:
            with pytest.raises(storage.VisitorNotFound):
                self.store.find(token)
        else:
            assert self.store.find(token) == self.wire(visitor)
            assert self.store.find(visitor["_id"], "id") == self.wire(visitor)

    @rule(token=TOKENS)
    def erase(self, token):
        visitor = self.known(token)
        if visitor is None:
            with pytest.raises(storage.VisitorNotFound):
                self.store.erase(token)
        else:
            assert self.store.erase(token) == {"_id": visitor["_id"], "ts": date(self.now)}
            self.visitors.remove(visitor)
            with pytest.raises(storage.VisitorNotFound):
                self.store.find(visitor["_id"], "id")

    @rule(term=TERMS, sort=SORT, offset=st.integers(0, 4), count=st.integers(1, 4))
    def search(self, term, sort, offset, count):
        found = [visitor for visitor in reversed(self.visitors) if self.is_found(visitor, term)]
        for key, way in reversed(sort.items()):
            # Who has no name stands before everybody who has one.
            found.sort(key=lambda one, key=key: (key in one, one.get(key, "")), reverse=way < 0)
        keys = ("_id", "username", "name", "phone", "livechatData", "visitorEmails")
        keys += ("department", "ts", "_updatedAt")
        wires = [self.wire(visitor) for visitor in found[offset : offset + count]]
        page = [{key: wire[key] for key in keys if key in wire} for wire in wires]
        assert self.store.search(term, sort, offset, count) == (page, len(found))

    def is_found(self, visitor, term):
        texts = [visitor.get("name", ""), visitor["username"], *visitor["fields"].values()]
        return (
            term == ""
            or term.lower() == visitor.get("email")
            or term == visitor.get("phone")
            or (digits(term) is not None and digits(term) == digits(visitor.get("phone", "")))
            or any(folded(term) in folded(text) for text in texts)
        )

    @rule(passed=st.integers(-5_000, 60_000))
    def time_passes(self, passed):
        self.now += passed

    @rule(closed=st.booleans())
    def reopen(self, closed):
        if closed:
            self.database.close()
        self.open()


def folded(text):
    """Return a text as the contract compares it (6)."""
    normal = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return normal.replace("i\u0307", "i")


def digits(phone):
    """Return the digits of what looks like a phone, else None."""
    text = unicodedata.normalize("NFKC", phone)
    found = "".join(sign for sign in text if sign.isdecimal())
    return found if found and not re.sub(r"[\d\s+()./-]", "", text) else None


def date(ms):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ms // 1000)) + f".{ms % 1000:03}Z"


@pytest.mark.parametrize(
    ("form", "keys"), [*[(form, ()) for form in MATCH_FORMS], ("token", ("k", "a.b"))], ids=str
)
def test_the_store_does_what_the_contract_says_whatever_happened_before(form, keys):
    histories = []

    def machine():
        histories.append(None)  # hypothesis does not say how many there were
        return StoreMachine(form, keys)

    sizes = examples(6, many=EXAMPLES // 5, stateful_step_count=30 if EXAMPLES else 20)
    run_state_machine_as_test(machine, settings=sizes)
    print(f"{len(histories)} passing histories of the store")

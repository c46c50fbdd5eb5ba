"""Refused bodies of POST /api/v1/livechat/visitor (contract, 2.2): each literal, nothing written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import schemas

ITEM = {"key": "k", "value": "v", "overwrite": True}
LONG = "x" * 300


def visitor(**fields):
    return {"visitor": {"token": "t", **fields}}


def items(*fields):
    return visitor(customFields=list(fields))


# What is sent (bytes as they are), and the error after "Match error: ".
ROWS = [
    (b"", "Missing key 'visitor'"),
    ({}, "Missing key 'visitor'"),
    (None, "Expected object, got null"),
    (5, "Expected object, got number"),
    (1.5, "Expected object, got number"),
    ("x", "Expected object, got string"),
    (True, "Expected object, got boolean"),
    ([], "Expected plain object"),
    ([{"visitor": {"token": "t"}}], "Expected plain object"),
    ({"token": "t"}, "Unknown key in field token"),
    ({**visitor(), "foo": 1}, "Unknown key in field foo"),
    ({**visitor(), "f" * 65: 1}, f"Unknown key in field {'f' * 64}"),
    ({**visitor(), "a b.c[0]": 1}, "Unknown key in field a b.c[0]"),
    ({**visitor(), "": 1}, "Unknown key in field "),
    ({**visitor(), "__proto__": 1}, "Unknown key in field __proto__"),
    ({"visitor": None}, "Expected object, got null in field visitor"),
    ({"visitor": "x"}, "Expected object, got string in field visitor"),
    ({"visitor": 5}, "Expected object, got number in field visitor"),
    ({"visitor": True}, "Expected object, got boolean in field visitor"),
    ({"visitor": []}, "Expected plain object in field visitor"),
    ({"visitor": {}}, "Missing key 'token' in field visitor"),
    ({"visitor": {"name": "N"}}, "Missing key 'token' in field visitor"),
    *[
        (visitor(**{key: value}), f"Expected string, got {kind} in field visitor.{key}")
        for key in ("token", "name", "email", "department", "phone", "username")
        for value, kind in [
            (None, "null"),
            (1, "number"),
            (0.5, "number"),
            ({}, "object"),
            ([], "object"),
            (True, "boolean"),
        ]
    ],
    *[
        (visitor(customFields=value), f"Expected array, got {quoted} in field visitor.customFields")
        for value, quoted in [
            (None, "null"),
            ("x", '"x"'),
            (5, "5"),
            (False, "false"),
            ({"a": 1}, '{"a":1}'),
            ({"é": [1, "\n"]}, '{"é":[1,"\\n"]}'),
            ("y" * 100, '"' + "y" * 63),
        ]
    ],
    (items("x"), "Expected object, got string in field visitor.customFields[0]"),
    (items(None), "Expected object, got null in field visitor.customFields[0]"),
    (items(7), "Expected object, got number in field visitor.customFields[0]"),
    (items([]), "Expected plain object in field visitor.customFields[0]"),
    (items({}), "Missing key 'key' in field visitor.customFields[0]"),
    (items({"key": "k"}), "Missing key 'value' in field visitor.customFields[0]"),
    (
        items({"value": "v", "key": "k"}),
        "Missing key 'overwrite' in field visitor.customFields[0]",
    ),
    (
        items(ITEM, ITEM | {"value": 1}),
        "Expected string, got number in field visitor.customFields[1].value",
    ),
    (
        items(ITEM | {"key": None}),
        "Expected string, got null in field visitor.customFields[0].key",
    ),
    (
        items(ITEM | {"overwrite": "true"}),
        "Expected boolean, got string in field visitor.customFields[0].overwrite",
    ),
    (
        items(ITEM | {"overwrite": 1}),
        "Expected boolean, got number in field visitor.customFields[0].overwrite",
    ),
    *[
        (
            visitor(**{key: "x" * (most + 1)}),
            f"Expected at most {most} characters in field visitor.{key}",
        )
        for key, most in [
            ("token", 256),
            ("name", 256),
            ("email", 254),
            ("department", 128),
            ("phone", 64),
            ("username", 128),
        ]
    ],
    (visitor(name=" " * 257), "Expected at most 256 characters in field visitor.name"),
    (
        items(ITEM | {"key": "k" * 129}),
        "Expected at most 128 characters in field visitor.customFields[0].key",
    ),
    (
        items(ITEM | {"value": "v" * 4097}),
        "Expected at most 4096 characters in field visitor.customFields[0].value",
    ),
    (
        items(ITEM | {"key": ""}),
        "Expected at least 1 character in field visitor.customFields[0].key",
    ),
    (items(*[ITEM] * 65), "Expected at most 64 items in field visitor.customFields"),
    *[
        (visitor(**{key: "a\0b"}), f"Expected text without NUL characters in field visitor.{key}")
        for key in ("token", "name", "email", "department", "phone", "username")
    ],
    *[
        (
            items(ITEM | {key: "\0"}),
            f"Expected text without NUL characters in field visitor.customFields[0].{key}",
        )
        for key in ("key", "value")
    ],
    # One error is reported: the first in the order in which the client sent the keys ...
    ({"visitor": {"name": 1, "token": 2}}, "Expected string, got number in field visitor.name"),
    ({"visitor": {"token": 2, "name": 1}}, "Expected string, got number in field visitor.token"),
    ({"foo": 1, "visitor": None}, "Unknown key in field foo"),
    ({"visitor": None, "foo": 1}, "Expected object, got null in field visitor"),
    (
        items({"overwrite": 1, "key": 2, "value": 3}),
        "Expected boolean, got number in field visitor.customFields[0].overwrite",
    ),
    # ... of a key that stands twice the last value, at the place of the first ...
    (
        b'{"visitor":{"token":"t","name":"N","phone":1,"name":2}}',
        "Expected string, got number in field visitor.name",
    ),
    # ... and a missing key only after every key that is there has passed, in the contract's order.
    ({"visitor": {"name": 1}}, "Expected string, got number in field visitor.name"),
    (items({"value": 1}), "Expected string, got number in field visitor.customFields[0].value"),
    (items({"value": "v"}), "Missing key 'key' in field visitor.customFields[0]"),
    ({"foo": 1}, "Unknown key in field foo"),
    # Within one value: its type, its count or length, NUL, its items in order.
    (visitor(name=LONG + "\0"), "Expected at most 256 characters in field visitor.name"),
    (items(*["x"] * 65), "Expected at most 64 items in field visitor.customFields"),
    (items(ITEM, None, {}), "Expected object, got null in field visitor.customFields[1]"),
    # A number of any size is a number.
    (b'{"visitor":{"token":1e999}}', "Expected string, got number in field visitor.token"),
    (
        b'{"visitor":{"token":-' + b"9" * 5000 + b"}}",
        "Expected string, got number in field visitor.token",
    ),
    # The schema comes before the meaning.
    ({"visitor": {"token": " ", "name": 1}}, "Expected string, got number in field visitor.name"),
]


@pytest.mark.parametrize(("body", "error"), ROWS)
def test_a_match_error_is_literal_and_writes_nothing(service, body, error):
    expected = {"success": False, "error": f"Match error: {error}", "errorType": "invalid-params"}
    assert service.refused(body) == json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
    assert service.register("next")["username"] == "guest-2"


BLANK = (
    '{"success":false,"error":"Token cannot be empty [error-invalid-token]",'
    '"errorType":"error-invalid-token","details":{"method":"livechat/visitor"}}'
)
DEPARTMENT = (
    '{"success":false,"error":"The provided department is invalid [error-invalid-department]",'
    '"errorType":"error-invalid-department"}'
)


def invalid_email(email):
    quoted = json.dumps(email, ensure_ascii=False)
    return (
        f'{{"success":false,"error":"Invalid email {quoted[1:-1]} [error-invalid-email]",'
        '"errorType":"error-invalid-email","details":'
        f'{{"function":"Livechat.validateEmail","email":{quoted}}}}}'
    )


@pytest.mark.parametrize("token", ["", " ", "\t\n\v\f\r ", "\u00a0\ufeff\u2028\u2029\u3000\u1680"])
def test_a_token_of_which_javascripts_trim_leaves_nothing_is_blank(service, token):
    assert service.refused({"visitor": {"token": token}}) == BLANK


@pytest.mark.parametrize("token", ["\u200b", "\x1c", "\u0085", "\x00a".strip("\0")])
def test_a_token_that_only_pythons_strip_empties_is_a_token(service, token):
    assert service.register(token)["token"] == token


@pytest.mark.parametrize(
    ("email", "quoted"),
    [
        ("foo", "foo"),
        (" FOO ", "foo"),
        (" ", ""),
        ("\ufeff\n", ""),
        ("@", "@"),
        ("a@", "a@"),
        ("@b", "@b"),
        ("a@ ", "a@"),
        ("a@b@c", "a@b@c"),
        ("a@@b", "a@@b"),
        ('É{x}"<>', 'é{x}"<>'),
    ],
)
def test_an_invalid_email_is_quoted_trimmed_and_in_lower_case(service, email, quoted):
    assert service.refused(visitor(email=email)) == invalid_email(quoted)


def test_white_space_alone_is_an_invalid_email_of_two_spaces(service):
    assert "Invalid email  [error-invalid-email]" in service.refused(visitor(email="  "))


@pytest.mark.parametrize("department", ["support", "Sales", "d", " d1", "d1:Support"])
def test_an_unknown_department_is_refused_where_departments_are_configured(
    make_service, department
):
    service = make_service(LIVECHAT_DEPARTMENTS="d1:Support,d2:Billing")
    assert service.refused(visitor(department=department)) == DEPARTMENT


def test_the_meaning_is_checked_token_email_department_count_and_bytes_in_this_order(make_service):
    service = make_service(LIVECHAT_DEPARTMENTS="d1")
    for start in range(0, 256, 64):
        fields = [ITEM | {"key": f"k{number}"} for number in range(start, start + 64)]
        service.register("t", customFields=fields)
    large = [ITEM | {"value": "v" * 4_000, "key": f"new{number}"} for number in range(16)]
    known = [field | {"key": field["key"].replace("new", "k")} for field in large]
    wrong = {"customFields": large, "department": "d9", "email": "foo", "token": " "}
    answers = []
    for fixed in (
        {},
        {"token": "t"},
        {"email": "a@b"},
        {"department": "d1"},
        {"customFields": known},
    ):
        wrong |= fixed
        answers.append(service.refused({"visitor": wrong}))
    assert answers[:3] == [BLANK, invalid_email("foo"), DEPARTMENT]
    assert "Expected at most 256 items in field visitor.customFields" in answers[3]
    assert "Expected at most 65536 bytes in field visitor.customFields" in answers[4]


@pytest.mark.parametrize(
    "wrong", [{"token": " "}, {"email": "foo"}, {"department": "none"}], ids=str
)
def test_a_refused_registration_spends_no_guest_number(make_service, wrong):
    service = make_service(LIVECHAT_DEPARTMENTS="d1")
    service.refused({"visitor": {"token": "t"} | wrong})
    assert service.register("next")["username"] == "guest-2"


TEXTS = st.text(max_size=3) | st.sampled_from(["a\0", "x" * 129, "x" * 257, "x" * 4097])
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
FIELD = {"key": TEXTS, "value": TEXTS, "overwrite": st.booleans()}
FIELDS = st.lists(st.fixed_dictionaries({}, optional=FIELD) | VALUES, max_size=3)
NEARLY = {
    "visitor": st.fixed_dictionaries(
        {
            "visitor": st.fixed_dictionaries(
                {"token": TEXTS}, optional={"name": VALUES, "customFields": FIELDS}
            )
        },
        optional={"foo": VALUES},
    ),
    "visitor.status": st.fixed_dictionaries(
        {"token": TEXTS}, optional={"status": TEXTS, "foo": VALUES}
    ),
    "custom.field": st.fixed_dictionaries(FIELD, optional={"token": VALUES, "foo": VALUES}),
    "custom.fields": st.fixed_dictionaries(
        {"token": TEXTS}, optional={"customFields": FIELDS, "foo": VALUES}
    ),
}


@pytest.mark.parametrize("name", NEARLY)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_refused_is_what_jsonschema_itself_refuses(name, data):
    value = data.draw(NEARLY[name] | VALUES)
    make = schemas.match_checker if name.startswith("visitor") else schemas.ajv_checker
    check = make(name)
    try:
        check(value)
        taken = True
    except schemas.InvalidParams:
        taken = False
    assert taken == Draft202012Validator(schemas.load(name)).is_valid(value)

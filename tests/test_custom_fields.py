"""POST /api/v1/livechat/custom.field and custom.fields (contract, section 5)."""

import json

import pytest

ONE = "/api/v1/livechat/custom.field"
MANY = "/api/v1/livechat/custom.fields"
FIELD = {"key": "address", "value": "Rocket.Chat street", "overwrite": True}


def kept(service, token="t"):
    answer = service.http.get(f"/api/v1/livechat/visitor/{token}")
    return answer.json["visitor"].get("livechatData")


def refused(service, path, body):
    """Send a body that has to be refused with 400 and write nothing; return the answer's text."""
    before = service.content()
    answer = service.post(body, path=path)
    assert answer.status_int == 400, answer.text
    assert service.content() == before
    return answer.text


def params(error):
    return f'{{"success":false,"error":"{error} [invalid-params]","errorType":"invalid-params"}}'


UNKNOWN = '{"success":false,"error":"invalid-token","errorType":"invalid-token"}'
INVALID = '{"success":false,"error":"invalid-custom-field","errorType":"invalid-custom-field"}'


def test_one_field_is_set_and_answered_as_it_was_sent(service):
    before = service.register("t")
    service.now += 16
    answer = service.post({"overwrite": True, "value": "v", "key": "k.é", "token": "t"}, path=ONE)
    assert answer.text == '{"field":{"key":"k.é","value":"v","overwrite":true},"success":true}'
    after = service.http.get("/api/v1/livechat/visitor/t").json["visitor"]
    assert after == before | {
        "_updatedAt": "2022-06-29T06:05:01.408Z",
        "livechatData": {"k.é": "v"},
    }


def test_without_overwrite_the_old_value_stays_and_the_answer_is_the_same(service):
    service.register("t", customFields=[FIELD, {**FIELD, "key": "empty", "value": ""}])
    for key, value in (("address", "Rocket.Chat street"), ("empty", "new"), ("new", "new")):
        body = {"token": "t", "key": key, "value": "new", "overwrite": False}
        answer = service.post(body, path=ONE)
        assert answer.json["field"] == {"key": key, "value": "new", "overwrite": False}
        assert kept(service)[key] == value


def test_several_fields_are_answered_in_their_order_with_a_capital_key(service):
    service.register("t")
    fields = [
        {"value": "1", "overwrite": True, "key": "b"},
        {"key": "a", "value": "2", "overwrite": False},
        {"key": "b", "value": "3", "overwrite": False},
    ]
    answer = service.post({"token": "t", "customFields": fields}, path=MANY)
    assert answer.text == (
        '{"fields":[{"Key":"b","value":"1","overwrite":true},'
        '{"Key":"a","value":"2","overwrite":false},'
        '{"Key":"b","value":"3","overwrite":false}],"success":true}'
    )
    assert kept(service) == {"b": "1", "a": "2"}


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        *[
            (path, body, error)
            for path in (ONE, MANY)
            for body, error in [
                (b"", "must have required property 'token'"),
                ({}, "must have required property 'token'"),
                (None, "must be object"),
                ([], "must be object"),
                ("x", "must be object"),
                (5, "must be object"),
                ({"x": 1}, "must have required property 'token'"),
            ]
        ],
        (ONE, {"token": "t"}, "must have required property 'key'"),
        (ONE, {"token": "t", "key": "k"}, "must have required property 'value'"),
        (ONE, {"value": 1, "key": 1, "token": 1}, "must have required property 'overwrite'"),
        (ONE, {"x": 1, "token": 1, **FIELD}, "must NOT have additional properties"),
        (ONE, {**FIELD, "value": 1, "key": 2, "token": 3}, "must be string"),
        (ONE, {"token": "t", **FIELD, "overwrite": 1, "value": 1}, "must be string"),
        (ONE, {"token": "t", **FIELD, "overwrite": "true"}, "must be boolean"),
        (ONE, {"token": "t", **FIELD, "value": None}, "must be string"),
        (ONE, {"token": "t", **FIELD, "key": ""}, "must NOT have fewer than 1 characters"),
        (ONE, {"token": "t", **FIELD, "key": "k" * 129}, "must NOT have more than 128 characters"),
        (
            ONE,
            {"token": "t", **FIELD, "value": "v" * 4097},
            "must NOT have more than 4096 characters",
        ),
        (ONE, {"token": "t" * 257, **FIELD, "key": ""}, "must NOT have more than 256 characters"),
        (ONE, {"token": "\0", **FIELD}, "must NOT contain NUL characters"),
        (MANY, {"token": "\0", "customFields": [FIELD]}, "must NOT contain NUL characters"),
        (ONE, {"token": "t", **FIELD, "key": "\0"}, "must NOT contain NUL characters"),
        (ONE, {"token": "t", **FIELD, "value": "\0"}, "must NOT contain NUL characters"),
        (MANY, {"token": "t"}, "must have required property 'customFields'"),
        (MANY, {"token": "t", "customFields": [], "x": 1}, "must NOT have additional properties"),
        (MANY, {"token": 1, "customFields": 1}, "must be string"),
        (MANY, {"token": "t", "customFields": {}}, "must be array"),
        (MANY, {"token": "t", "customFields": None}, "must be array"),
        (MANY, {"token": "t", "customFields": [FIELD, 1]}, "must be object"),
        (MANY, {"token": "t", "customFields": [{}]}, "must have required property 'key'"),
        (MANY, {"token": "t", "customFields": [{"key": 1}]}, "must have required property 'value'"),
        (
            MANY,
            {"token": "t", "customFields": [FIELD | {"x": 1, "key": 1}]},
            "must NOT have additional properties",
        ),
        (
            MANY,
            {"token": "t", "customFields": [FIELD, FIELD | {"overwrite": None}]},
            "must be boolean",
        ),
        (
            MANY,
            {"token": "t", "customFields": [FIELD, FIELD | {"key": ""}]},
            "must NOT have fewer than 1 characters",
        ),
        (MANY, {"token": "t", "customFields": [5] * 65}, "must NOT have more than 64 items"),
        # Parameters come before the token.
        (MANY, {"token": "unknown", "customFields": 5}, "must be array"),
    ],
)
def test_one_error_object_by_object_from_the_outside_in(service, path, body, error):
    service.register("t")
    assert refused(service, path, body) == params(error)


def test_an_unknown_token_is_named_without_brackets(service):
    assert refused(service, ONE, {"token": "t", **FIELD}) == UNKNOWN
    assert refused(service, MANY, {"token": "t", "customFields": [FIELD]}) == UNKNOWN
    assert refused(service, MANY, {"token": "t", "customFields": []}) == UNKNOWN


def test_a_key_that_is_not_configured_or_an_empty_list_is_refused_whole(make_service):
    service = make_service(LIVECHAT_CUSTOM_FIELDS="address")
    service.register("t")
    other = FIELD | {"key": "other"}
    assert refused(service, ONE, {"token": "t", **other}) == INVALID
    assert refused(service, MANY, {"token": "t", "customFields": [FIELD, other]}) == INVALID
    assert refused(service, MANY, {"token": "t", "customFields": []}) == INVALID
    assert refused(service, MANY, {"token": "x", "customFields": [other]}) == UNKNOWN
    assert service.post({"token": "t", **FIELD}, path=ONE).status_int == 200


def test_a_visitor_holds_256_fields_and_the_keys_are_looked_at_first(make_service):
    keys = [f"k{number}" for number in range(257)]
    service = make_service(LIVECHAT_CUSTOM_FIELDS=",".join(keys))
    service.register("t")
    for start in range(0, 256, 64):
        fields = [FIELD | {"key": key} for key in keys[start : start + 64]]
        service.post({"token": "t", "customFields": fields}, path=MANY)
    full = params("must NOT have more than 256 items")
    assert len(kept(service)) == 256
    assert refused(service, ONE, {"token": "t", **FIELD, "key": "k256"}) == full
    fields = [FIELD | {"key": "k0", "value": "new"}, FIELD | {"key": "k256"}]
    assert refused(service, MANY, {"token": "t", "customFields": fields}) == full
    fields.append(FIELD | {"key": "other"})
    assert refused(service, MANY, {"token": "t", "customFields": fields}) == INVALID


LIMIT = 65_536  # bytes of the custom fields of a visitor, as JSON in UTF-8
TOO_LARGE = {
    "registration": json.dumps(
        {
            "success": False,
            "error": "Match error: Expected at most 65536 bytes in field visitor.customFields",
            "errorType": "invalid-params",
        },
        separators=(",", ":"),
    ),
    ONE: params("must NOT have more than 65536 bytes"),
    MANY: params("must NOT have more than 65536 bytes"),
}
WAYS = list(TOO_LARGE)


def set_fields(service, way, fields):
    """Set custom fields of the visitor "t" in one of three ways; return the answer."""
    fields = [{"key": key, "value": value, "overwrite": True} for key, value in fields.items()]
    if way == "registration":
        return service.post({"visitor": {"token": "t", "customFields": fields}})
    if way == MANY:
        return service.post({"token": "t", "customFields": fields}, path=MANY)
    (field,) = fields
    return service.post({"token": "t", **field}, path=ONE)


def size(service):
    return len(json.dumps(kept(service), ensure_ascii=False, separators=(",", ":")).encode())


def fill(service, left):
    """Register "t" with custom fields that leave so many bytes of the limit."""
    service.register("t")
    fields = {f"k{number:02}": "v" * 4000 for number in range(16)}  # 64,161 bytes
    for start in (0, 8):
        part = dict(list(fields.items())[start : start + 8])
        assert set_fields(service, MANY, part).status_int == 200
    rest = {"rest": "v" * (LIMIT - left - size(service) - len(',"rest":""'))}
    assert set_fields(service, ONE, rest).status_int == 200
    assert size(service) == LIMIT - left


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "bytes_of_json"),
    [
        ("v" * 20, 20),
        ("é" * 10, 20),
        ("王" * 6 + "vv", 20),
        ("\U0001f600" * 5, 20),
        ("\u2028" * 6 + "vv", 20),
        ('"' * 10, 20),
        ("\\\n" * 5, 20),
        ("\x01" * 3 + "vv", 20),
    ],
)
def test_the_custom_fields_of_a_visitor_are_at_most_65536_bytes_as_json(
    service, way, value, bytes_of_json
):
    fill(service, left=len(',"é":""'.encode()) + bytes_of_json)
    before = service.content()
    answer = set_fields(service, way, {"é": value + "v"})
    assert (answer.status_int, answer.text) == (400, TOO_LARGE[way])
    assert service.content() == before
    assert set_fields(service, way, {"é": value}).status_int == 200
    assert size(service) == LIMIT
    assert kept(service)["é"] == value


@pytest.fixture
def before_the_limit(service):
    """A visitor "t" of a time without the limit, whose 20 custom fields have 80,981 bytes."""
    service.register("t", name="N", customFields=[FIELD])
    fields = {f"k{number:02}": "v" * 4040 for number in range(20)}
    sql = "UPDATE visitor SET fields = ?"
    service.database.write(
        lambda c: c.execute(sql, (json.dumps(fields, separators=(",", ":")),)).get
    )
    assert size(service) == 80_981
    return fields


@pytest.mark.parametrize("way", WAYS)
def test_who_has_more_already_stays_readable_and_may_shrink_but_not_grow(
    service, before_the_limit, way
):
    before = service.content()
    for value in ("v" * 4041, "é" * 2021):
        answer = set_fields(service, way, {"k00": value})
        assert (answer.status_int, answer.text) == (400, TOO_LARGE[way])
    answer = set_fields(service, way, {"another": ""})
    assert (answer.status_int, answer.text) == (400, TOO_LARGE[way])
    assert service.content() == before
    assert kept(service) == before_the_limit
    for value in ("w" * 4040, "é" * 2020, "w" * 4039):
        assert set_fields(service, way, {"k00": value}).status_int == 200
        assert kept(service) == before_the_limit | {"k00": value}
    assert set_fields(service, way, {"k00": "w" * 4040}).text == TOO_LARGE[way]  # as it was
    for number in range(20):
        assert set_fields(service, way, {f"k{number:02}": ""}).status_int == 200
    assert set_fields(service, way, {"another": "v"}).status_int == 200


def test_who_has_more_already_registers_as_ever(service, before_the_limit):
    assert service.register("t", name="M")["name"] == "M"
    field = {"key": "k00", "value": "longer" * 680, "overwrite": False}  # so the old one stays
    assert service.register("t", customFields=[field])["livechatData"] == before_the_limit
    assert service.http.delete("/api/v1/livechat/visitor/t").status_int == 200


def test_one_field_of_a_request_may_make_room_for_another(service):
    fill(service, left=0)
    both = {"k00": "", "new": "v" * (4000 - len(',"new":""'))}
    for way in ("registration", MANY):
        for fields in (both, dict(reversed(both.items()))):
            assert set_fields(service, way, fields).status_int == 200
            assert size(service) == LIMIT
            assert set_fields(service, MANY, {"new": "", "k00": "v" * 3991}).status_int == 200
    assert set_fields(service, MANY, both | {"k01": "v" * 4001}).text == TOO_LARGE[MANY]


@pytest.mark.parametrize("way", WAYS)
def test_the_keys_come_before_the_count_and_the_count_before_the_bytes(make_service, way):
    keys = [f"k{number:03}" for number in range(257)]
    service = make_service(LIVECHAT_CUSTOM_FIELDS=",".join(keys))
    service.register("t")
    for start in range(0, 256, 64):
        fields = dict.fromkeys(keys[start : start + 64], "v" * 240)
        assert set_fields(service, MANY, fields).status_int == 200
    count = {
        "registration": params("").replace(
            " [invalid-params]",
            "Match error: Expected at most 256 items in field visitor.customFields",
        )
    }.get(way, params("must NOT have more than 256 items"))
    large = {"k000": "v" * 4096}
    assert set_fields(service, way, large).text == TOO_LARGE[way]
    assert set_fields(service, way, {"k256": "v" * 4096}).text == count
    if way == MANY:
        assert set_fields(service, way, large | {"k256": ""}).text == count
        assert set_fields(service, way, large | {"k256": "", "other": ""}).text == INVALID
    assert kept(service) == dict.fromkeys(keys[:256], "v" * 240)


@pytest.mark.parametrize("path", [ONE, MANY])
def test_the_door_is_the_same(service, path):
    assert json.loads(service.post(b"{", path=path).text)["errorType"] == "error-invalid-json"
    assert service.post(b"{}", path=path, content_type="x/y").status_int == 415
    assert service.post(b" " * 65_537, path=path).status_int == 413
    assert service.http.get(path, expect_errors=True).status_int == 405

"""POST /api/v1/livechat/visitor.status (contract, section 4)."""

import json

import pytest

PATH = "/api/v1/livechat/visitor.status"


@pytest.mark.parametrize("status", ["busy", "online", "", " ", "é" * 64])
def test_any_status_is_echoed_and_the_visitor_stays_as_it_is(service, status):
    before = service.register("t")
    service.now += 5
    answer = service.post({"status": status, "token": "t"}, path=PATH)
    quoted = json.dumps(status, ensure_ascii=False)
    assert answer.text == f'{{"token":"t","status":{quoted},"success":true}}'
    assert service.http.get("/api/v1/livechat/visitor/t").json["visitor"] == before


@pytest.mark.parametrize("token", ["unknown", "", " "])
def test_an_unknown_token_is_refused(service, token):
    answer = service.post({"token": token, "status": "busy"}, path=PATH)
    assert (answer.status_int, answer.text) == (
        400,
        '{"success":false,"error":"[invalid-token]","errorType":"invalid-token"}',
    )


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "Missing key 'token'"),
        ({}, "Missing key 'token'"),
        ({"status": "busy"}, "Missing key 'token'"),
        ({"token": "t"}, "Missing key 'status'"),
        ({"token": "t", "status": "busy", "x": 1}, "Unknown key in field x"),
        ({"x": 1, "token": 5}, "Unknown key in field x"),
        ({"token": 5, "x": 1}, "Expected string, got number in field token"),
        ({"token": "t", "status": None}, "Expected string, got null in field status"),
        ({"token": "t", "status": []}, "Expected string, got object in field status"),
        ({"token": "t" * 257, "status": ""}, "Expected at most 256 characters in field token"),
        ({"token": "t", "status": "s" * 65}, "Expected at most 64 characters in field status"),
        ({"token": "t", "status": "\0"}, "Expected text without NUL characters in field status"),
        (None, "Expected object, got null"),
        ([], "Expected plain object"),
    ],
)
def test_refusals_are_worded_and_ordered_as_those_of_a_registration(service, body, error):
    service.register("t")
    answer = service.post(body, path=PATH)
    assert (answer.status_int, answer.text) == (
        400,
        f'{{"success":false,"error":"Match error: {error}","errorType":"invalid-params"}}',
    )

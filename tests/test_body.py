"""The door: what of a body is looked at before its schema, in the contract's order (section 1)."""

import gc
import json
import time

import pytest

from tests.conftest import PATH

REGISTER = b'{"visitor":{"token":"t"}}'
TOO_LARGE = (413, "The request body is larger than 65536 bytes", "error-body-too-large")
NOT_JSON_TYPE = (
    415,
    "The request body must be sent as application/json",
    "error-unsupported-media-type",
)
INCOMPLETE = (400, "The request body is incomplete", "error-incomplete-body")
NOT_JSON = (400, "The request body is not valid JSON", "error-invalid-json")


def assert_refused(service, answer, expected):
    status, error, error_type = expected
    assert answer.text == (
        f'{{"success":false,"error":"{error} [{error_type}]","errorType":"{error_type}"}}'
    )
    assert answer.status_int == status
    assert service.content() == [[], [(1,)]]


def nested(levels, opening=b"[", closing=b"]"):
    """Return a body of so many levels, the first of which is an object with a visitor."""
    return b'{"visitor":{"token":"t","x":' + opening * (levels - 2) + closing * (levels - 2) + b"}}"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"visitor":{"token":"t"}',
        REGISTER + b"x",
        REGISTER + REGISTER,
        b"\xef\xbb\xbf" + REGISTER,
        REGISTER.decode().encode("utf-16"),
        b'{"visitor":{"token":"\xe9"}}',  # Latin-1
        b'{"visitor":{"token":"\xc0\xaf"}}',  # overlong
        b'{"visitor":{"token":"\xed\xa0\x80"}}',  # a surrogate in UTF-8
        b'{"visitor":{"token":"t","x":NaN}}',
        b'{"visitor":{"token":"t","x":Infinity}}',
        b'{"visitor":{"token":"t","x":-Infinity}}',
        b'{"visitor":{"token":"\\ud800"}}',
        b'{"visitor":{"token":"t","x":["\\uDfFf"]}}',
        b'{"visitor":{"token":"t","\\ud83d":1}}',
        b'{"visitor":{"token":"t","x":"\\ude00\\ud83d"}}',
        b'{"visitor":{"token":"t","x":"\\ud83d\\ud83d\\ude00"}}',
        b'{"visitor":{"token":"t","x":"\\\\\\ud83d"}}',
        b'{"visitor":{"token":"t","x":"\\ud83d","x":1}}',  # hidden by a key that stands twice
        b'{"\\ud83d":1}',
        b'{"visitor":{"token":"a\x00"}}',
        b'{"visitor":{"token":"a\nb"}}',
        b"{'visitor':{'token':'t'}}",
        b'{"visitor":{"token":"t",}}',
        b" ",
        b"\t\r\n ",
        b"token=t",
        b"[" * 30_000 + b"]" * 30_000,
        nested(101),
        nested(101, b'{"a":', b"1}").replace(b"1}", b"}").replace(b'{"a":}', b'{"a":1}'),
        nested(900),
        nested(1100),
        b'{"visitor":{"token":"t","x":' + b"[" * 99 + b"]" * 99 + b',"x":1}}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_that_is_not_strict_json_is_refused(service, body):
    assert_refused(service, service.post(body), NOT_JSON)


@pytest.mark.parametrize(
    "body",
    [
        b" \t\r\n" + REGISTER + b"\n",
        b'{"visitor":{"token":"t","x":"\\ud83d\\ude00"}}',
        b'{"visitor":{"token":"t","x":"\\\\ud83d"}}',
        b'{"visitor":{"token":"t","x":1e999,"y":' + b"9" * 5000 + b"}}",
        b'{"visitor":{"token":"t","x":-0.0e-5000}}',
        nested(100),
        b'{"visitor":{"token":"t","x":"' + b"[" * 200 + b'\\"{"}}',
        b'{"visitor":{"token":"t","x":[' + b"[],{}," * 200 + b"1]}}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_strict_json_is_read(service, body):
    assert service.post(body).status_int == 200


def test_a_surrogate_pair_is_one_character(service):
    answer = service.post(b'{"visitor":{"token":"\\ud83d\\ude00"}}')
    assert answer.json["visitor"]["token"] == "\U0001f600"


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "*/*",
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;x",
        " application/json ",
    ],
)
def test_these_content_types_are_json(service, content_type):
    assert service.post(REGISTER, content_type=content_type).status_int == 200


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/vnd.api+json",
        "application/*",
        "json",
        ",",
    ],
)
def test_a_body_of_another_content_type_is_refused(service, content_type):
    assert_refused(service, service.post(REGISTER, content_type=content_type), NOT_JSON_TYPE)


@pytest.mark.parametrize("encoding", ["gzip", "br", "x"])
def test_a_content_encoding_is_refused(service, encoding):
    answer = service.post(REGISTER, **{"Content-Encoding": encoding})
    assert_refused(service, answer, NOT_JSON_TYPE)


def test_an_empty_body_needs_no_content_type(service):
    answer = service.post(b"", content_type="text/plain")
    assert "Missing key 'visitor'" in answer.text


def test_a_body_may_have_65536_bytes_and_no_more(service):
    largest = REGISTER + b" " * (65_536 - len(REGISTER))
    assert_refused(service, service.post(largest + b" "), TOO_LARGE)
    assert service.post(largest).status_int == 200


def test_a_body_of_no_announced_length_is_empty_where_the_server_does_not_end_it(service):
    # Without wsgi.input_terminated, as with wsgiref, reading on would block for ever.
    class Endless:
        def read(self, size):
            raise AssertionError("read beyond the body")

    environ = {"wsgi.input": Endless(), "CONTENT_LENGTH": ""}
    service.http.lint = False
    answer = service.http.request(PATH, method="POST", environ=environ, expect_errors=True)
    assert "Missing key 'visitor'" in answer.text


@pytest.mark.parametrize("length", ["x", "-1", "1.5"])
def test_a_length_that_is_no_number_is_a_clear_400(service, length):
    service.http.lint = False  # which refuses to send it
    answer = service.post(REGISTER, **{"Content-Length": length})
    expected = (400, "The request is invalid", "error-invalid-request")
    assert_refused(service, answer, expected)


def test_size_comes_before_content_type_before_json_before_schema(service):
    large = b"{" * 65_537
    assert_refused(service, service.post(large, content_type="text/plain"), TOO_LARGE)
    assert_refused(service, service.post(b"{", content_type="text/plain"), NOT_JSON_TYPE)
    assert_refused(service, service.post(b'{"foo":1,"bar":NaN}'), NOT_JSON)


HOSTILE = {
    "20,000 keys": b"{" + b",".join(b'"%d":0' % number for number in range(6_900)) + b"}",
    "20,000 ignored keys": b'{"visitor":{'
    + b",".join(b'"%d":0' % number for number in range(6_900))
    + b"}}",
    "21,000 bad items": b'{"visitor":{"token":"t","customFields":[' + b"0," * 32_000 + b"0]}}",
    "64 bad items": b'{"visitor":{"token":"t","customFields":[' + b"{}," * 63 + b"{}]}}",
    "a bad value": b'{"visitor":{"token":[' + b"0," * 32_000 + b"0]}}",
    "a large object": b'{"visitor":{"token":"t","customFields":{'
    + b'"a":[0],' * 6_000
    + b'"":0}}}',
    "brackets": b"[" * 65_536,
    "closed brackets": b"[" * 32_768 + b"]" * 32_768,
    "many arrays": b"[" + b"[]," * 21_000 + b"[]]",
    "brackets in strings": b'["' + b'[{\\"' * 16_000 + b'"]',
    "escapes": b'"' + b"\\ud83d\\ude00" * 5_400 + b'"',
    "backslashes": b'"' + b"\\\\" * 32_000 + b'"',
    "an open string": b'"' + b'\\"' * 32_000,
    "quotes": b'"' * 65_000,
    "white space": b" " * 65_000,
    "digits": b"9" * 65_000,
    "long integers": b"[" + b",".join([b"9" * 4_000] * 16) + b"]",
    "a fraction": b"0." + b"9" * 65_000,
    "two-byte characters": json.dumps("é" * 32_000, ensure_ascii=False).encode(),
    "white space in an email": b'{"visitor":{"token":"t","email":"' + b" " * 254 + b'"}}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_body_costs_more_than_50_ms_of_cpu(service, body):
    assert len(body) <= 65_536

    def cost():
        gc.collect()
        start = time.process_time()
        assert service.post(body).status_int == 400
        return time.process_time() - start

    assert min(cost() for _ in range(3)) < 0.050

"""The door, where no socket shows it; tests/test_hostile.py has what clients send (contract, 1)."""

import pytest

from tests.server import PATH

REGISTER = b'{"visitor":{"token":"t"}}'


def test_a_surrogate_pair_is_one_character(service):
    answer = service.post(b'{"visitor":{"token":"\\ud83d\\ude00"}}')
    assert answer.json["visitor"]["token"] == "\U0001f600"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"visitor":{"token":"S3CRET\xff"}}', "not UTF-8"),
        (b'{"visitor":{"token":"\\ud800S3CRET"}}', "half a surrogate pair"),
        (b'{\n\n"visi\xc3\xa9": S3CRET}', "line 3, column 10"),
        (b'{"NaN":\n  NaN}', "line 2, column 3"),
        (b'{"Infinity\\"":1,"a":-Infinity}', "line 1, column 21"),
        (b"\xef\xbb\xbf{]", "line 1, column 2"),
        (b" ", "line 1, column 2"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100 levels"),
        (b'{"a":' * 12_000, "nested deeper than 100 levels"),
    ],
)
def test_what_is_no_json_is_told_what_is_wrong_and_where(service, body, reason):
    wanted = error(f"The request body is not valid JSON: {reason}", "error-invalid-json")
    assert service.refused(body) == wanted


@pytest.mark.parametrize("media_type", [None, "", "*/*", "text/plain", "application/jsonp"])
def test_only_application_json_is_taken_for_json(service, media_type):
    answer = service.post(REGISTER, content_type=media_type)
    assert (answer.status_int, answer.text) == (415, OTHER_TYPE)
    empty = service.post(b"", content_type=media_type)
    assert (empty.status_int, "Missing key 'visitor'" in empty.text) == (400, True)


def test_a_body_that_is_compressed_or_encoded_is_told_so(service):
    answer = service.post(REGISTER, **{"Content-Encoding": "gzip"})
    reason = "The request body must not be compressed or encoded"
    assert answer.text == error(reason, "error-unsupported-media-type")
    assert service.post(REGISTER, **{"Content-Encoding": "identity"}).status_int == 200


def test_a_byte_order_mark_is_skipped(service):
    assert service.post(b"\xef\xbb\xbf" + REGISTER).status_int == 200


class Input:
    """What another server than ours gives the app to read: some bytes, and then an end of a kind.

    An end that is an exception is raised; without one, whoever reads on would wait for ever.
    """

    def __init__(self, data=b"", end=AssertionError):
        self.data, self.end = data, end

    def read(self, size):
        part, self.data = self.data[:size], self.data[size:]
        if part or self.end is None:
            return part
        raise self.end


def send(service, body, method="POST", path=PATH, **environ):
    """Send a body that WebTest would not; return status and text of the answer."""
    service.http.lint = False
    environ = {"wsgi.input": body, "CONTENT_TYPE": "application/json", **environ}
    answer = service.http.request(path, method=method, environ=environ, expect_errors=True)
    return answer.status_int, answer.text


def error(reason, error_type):
    return f'{{"success":false,"error":"{reason} [{error_type}]","errorType":"{error_type}"}}'


TOO_LARGE = error("The request body is larger than 65536 bytes", "error-body-too-large")
OTHER_TYPE = error(
    "The request body must be sent as application/json", "error-unsupported-media-type"
)
INCOMPLETE = error("The request body is incomplete", "error-incomplete-body")
LATE = error("The request did not come in time", "error-request-timeout")


def test_a_body_of_no_announced_length_is_empty_where_the_server_does_not_end_it(service):
    # Without wsgi.input_terminated, as with wsgiref, reading on would block for ever.
    status, text = send(service, Input(), CONTENT_LENGTH="")
    assert (status, "Missing key 'visitor'" in text) == (400, True)


CHUNKED = {"wsgi.input_terminated": True}


def test_a_body_of_no_announced_length_is_read_where_the_server_ends_it(service):
    assert send(service, Input(REGISTER, None), **CHUNKED)[0] == 200
    largest = REGISTER.ljust(65_536)
    assert send(service, Input(largest, None), **CHUNKED)[0] == 200
    assert send(service, Input(largest + b" "), **CHUNKED) == (413, TOO_LARGE)


def test_a_body_that_is_announced_as_too_large_is_not_read(service):
    assert send(service, Input(), CONTENT_LENGTH="65537") == (413, TOO_LARGE)


@pytest.mark.parametrize("environ", [{"CONTENT_LENGTH": "100"}, CHUNKED], ids=["length", "chunks"])
def test_a_body_that_breaks_off_under_another_server_is_told_so_after_its_type(service, environ):
    # Each server has an exception of its own for chunks that break off.
    for end in (OSError, ValueError) if environ is CHUNKED else (None, OSError, ValueError):
        assert send(service, Input(REGISTER, end), **environ) == (400, INCOMPLETE)
        assert send(service, Input(b"", end), **environ) == (400, INCOMPLETE)
        other = {**environ, "CONTENT_TYPE": "text/plain"}
        assert send(service, Input(REGISTER, end), **other) == (415, OTHER_TYPE)
    assert send(service, Input(REGISTER, TimeoutError), **environ) == (408, LATE)
    assert service.content() == [[], [(1,)], []]


def test_a_body_that_nobody_reads_does_not_matter_under_another_server(service):
    environ = {"CONTENT_LENGTH": "100", "CONTENT_TYPE": "text/plain"}
    assert send(service, Input(), "GET", "/livez", **environ) == (200, '{"status":"ok"}')
    service.register("t")
    assert send(service, Input(), "DELETE", f"{PATH}/t", **environ)[0] == 200


@pytest.mark.parametrize("length", ["x", "-1", "1.5"])
def test_a_length_that_is_no_number_is_a_clear_400(service, length):
    service.http.lint = False  # which refuses to send it
    answer = service.post(REGISTER, **{"Content-Length": length})
    assert (answer.status_int, answer.text) == (
        400,
        '{"success":false,"error":"The request is invalid [error-invalid-request]",'
        '"errorType":"error-invalid-request"}',
    )
    assert service.content() == [[], [(1,)], []]

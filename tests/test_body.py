"""The door, where no socket shows it; tests/test_hostile.py has what clients send (contract, 1)."""

import pytest

from tests.conftest import PATH

REGISTER = b'{"visitor":{"token":"t"}}'


def test_a_surrogate_pair_is_one_character(service):
    answer = service.post(b'{"visitor":{"token":"\\ud83d\\ude00"}}')
    assert answer.json["visitor"]["token"] == "\U0001f600"


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
    assert (answer.status_int, answer.text) == (
        400,
        '{"success":false,"error":"The request is invalid [error-invalid-request]",'
        '"errorType":"error-invalid-request"}',
    )
    assert service.content() == [[], [(1,)]]

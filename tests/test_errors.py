"""What every answer has in common, and the errors of no route in particular (contract, 1)."""

import logging

import falcon
import pytest

from app import create_app
from settings import Settings
from tests.server import PATH
from tests.service import Service

NOT_FOUND = (
    '{"success":false,"error":"Resource not found [error-not-found]","errorType":"error-not-found"}'
)
NOT_ALLOWED = (
    '{"success":false,"error":"Method not allowed [error-method-not-allowed]",'
    '"errorType":"error-method-not-allowed"}'
)


@pytest.fixture
def answers(service):
    """One answer of each kind."""
    request = service.http.request
    return [
        service.post({"visitor": {"token": "t"}}),
        service.post({}),
        service.post(b"{"),
        service.post(b"{}", content_type="text/plain"),
        request("/nothing", expect_errors=True),
        request(PATH, method="PUT", expect_errors=True),
    ]


def test_every_answer_is_uncached_json_that_is_not_sniffed(answers):
    for answer in answers:
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.body == answer.text.encode()


def test_every_answer_says_first_or_last_whether_it_went_well(answers):
    assert answers[0].text.endswith(',"success":true}')
    for answer in answers[1:]:
        assert answer.text.startswith('{"success":false,"error":"')


@pytest.mark.parametrize(
    "accept", ["", "text/html", "application/xml", "*/*", "text/html;q=0", "\xff", "a, ;;=,"]
)
def test_an_answer_is_json_whatever_the_client_accepts(service, accept):
    for path, status in ((PATH, 400), ("/nothing", 404)):
        answer = service.post({}, path=path, **{"Accept": accept})
        assert answer.headers["Content-Type"] == "application/json"
        assert (answer.status_int, answer.json["success"]) == (status, False)


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/api/v1/livechat",
        "/api/v1/livechat/visitors",
        "/API/v1/livechat/visitor",
        "/api/v1/livechat/visitor%00",
        "/api/v1/livechat/visitor%ff",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_404(service, path, method):
    answer = service.http.request(path, method=method, body=b"x", expect_errors=True)
    assert (answer.status_int, answer.text) == (404, NOT_FOUND)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "QUERY", "FOO", "WEBSOCKET", "LOCK"])
@pytest.mark.parametrize("path", [PATH, f"{PATH}/"])
def test_a_wrong_method_on_a_known_path_is_405_with_allow(service, path, method):
    app = service.http
    app.lint = False  # which does not know made-up methods
    answer = app.request(path, method=method, body=b"x", expect_errors=True)
    assert (answer.status_int, answer.text) == (405, NOT_ALLOWED)
    assert "POST" in answer.headers["Allow"].split(", ")
    assert method not in answer.headers["Allow"]


def test_a_made_up_method_on_an_unknown_path_is_404(service):
    service.http.lint = False
    for method in ("FOO", "WEBSOCKET"):
        answer = service.http.request("/nothing", method=method, expect_errors=True)
        assert (answer.status_int, answer.text) == (404, NOT_FOUND)


class BrokenStore:
    """Not a mock of the store, but a bug in it: whatever is asked, it raises."""

    def register(self, **registration):
        raise ZeroDivisionError(registration["token"])


def test_what_nobody_foresaw_is_a_500_that_shows_and_logs_no_data(tmp_path, caplog):
    service = Service(tmp_path / "livechat.db", {})
    service.http.app = create_app(BrokenStore(), Settings())
    answer = service.post({"visitor": {"token": "secret"}})
    assert (answer.status_int, answer.text) == (
        500,
        '{"success":false,"error":"Internal server error [error-internal]",'
        '"errorType":"error-internal"}',
    )
    assert "Unforeseen ZeroDivisionError" in caplog.text
    assert "in register" in caplog.text
    assert "secret" not in caplog.text


def test_a_database_that_cannot_be_used_is_a_503_and_recovers_by_itself(service, tmp_path, caplog):
    service.database.close()
    (tmp_path / "livechat.db").rename(tmp_path / "elsewhere")
    answer = service.post({"visitor": {"token": "secret"}})
    assert (answer.status_int, answer.text) == (
        503,
        '{"success":false,"error":"The visitor database is unavailable'
        ' [error-database-unavailable]","errorType":"error-database-unavailable"}',
    )
    assert answer.headers["Retry-After"] == "5"
    assert "The visitor database is unavailable: FileNotFoundError" in caplog.text
    assert "secret" not in caplog.text
    assert not (tmp_path / "livechat.db").exists()  # never a silent empty one
    (tmp_path / "elsewhere").rename(tmp_path / "livechat.db")
    assert service.register("t")["username"] == "guest-2"


def test_a_request_is_one_line_in_the_log_with_the_routes_template(service, caplog):
    caplog.set_level(logging.INFO)
    service.post({"visitor": {"token": "secret", "name": "secret"}})
    service.post({}, path=f"{PATH}?secret=secret")
    service.http.request("/secret\n", expect_errors=True)
    lines = [line.partition(" ms")[0].rsplit(" ", 1)[0] for line in caplog.messages]
    assert lines == [f"POST {PATH} 200", f"POST {PATH} 400", "GET - 404"]


def test_the_app_for_any_server_prepares_its_database_itself(tmp_path, monkeypatch):
    import app

    monkeypatch.setenv("LIVECHAT_DB", str(tmp_path / "folder" / "livechat.db"))
    assert isinstance(app.get_app(), falcon.App)
    assert (tmp_path / "folder" / "livechat.db").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LIVECHAT_MATCH", "phone", "LIVECHAT_MATCH: 'phone' is not valid; "),
        ("LIVECHAT_DB", "/usr", "/usr: a folder, not a file"),
    ],
)
def test_what_cannot_be_used_ends_any_server_with_one_line(monkeypatch, name, value, said):
    import app

    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        app.get_app()
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)

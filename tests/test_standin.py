"""What LIVECHAT_STANDIN adds below /standin/ (contract, section 10)."""

import contextlib
import http.client
import json
import threading

import pytest
from jsonschema import Draft202012Validator

from settings import SettingError, Settings
from tests.server import PATH, wait_until

OWN = [
    ("GET", "visitors"),
    ("DELETE", "visitors"),
    ("GET", "requests"),
    ("POST", "failures"),
    ("DELETE", "failures"),
]
REFUSED = {
    "success": False,
    "error": "Only programs on this machine are admitted, with LIVECHAT_STANDIN=any those on others"
    " too, but no web pages [error-standin-refused]",
    "errorType": "error-standin-refused",
}


@pytest.fixture
def standin(make_service):
    return make_service(LIVECHAT_STANDIN="1")


@pytest.fixture
def server(make_server):
    return make_server(LIVECHAT_STANDIN="1").wait()


def fail(service, **failure):
    """Ask for a failure; return what is still to come."""
    answer = service.post(failure, path="/standin/failures")
    assert answer.status_int == 200, answer.text
    return answer.json["failures"]


def ask(server, **failure):
    """Ask a real server for a failure; return its status and answer."""
    headers = {"Content-Type": "application/json"}
    status, _, answer = server.request("POST", "/standin/failures", json.dumps(failure), headers)
    return status, answer


def arrived(server):
    """Wait for a registration; return the oldest one there is."""

    def registrations():
        kept = server.request("GET", "/standin/requests")[2]["requests"]
        return [one for one in kept if one["route"] == PATH]

    return wait_until(registrations, "a registration has come")[0]


def requests(service):
    return service.http.get("/standin/requests").json["requests"]


@pytest.mark.parametrize(("method", "name"), OWN)
def test_without_it_there_is_nothing(service, method, name):
    answer = service.http.request(f"/standin/{name}", method=method, expect_errors=True)
    assert answer.status_int == 404
    assert answer.json["errorType"] == "error-not-found"
    assert "/standin/" not in service.http.get("/api/openapi.json").text


@pytest.mark.parametrize("value", ["0", "true", "ANY", " 1", "1,any"])
def test_a_value_that_is_neither_1_nor_any_does_not_start(value):
    with pytest.raises(SettingError, match=r"^LIVECHAT_STANDIN: "):
        Settings.from_environ({"LIVECHAT_STANDIN": value})


def test_a_reset_is_as_a_first_start(standin):
    assert [standin.register(token)["username"] for token in "ab"] == ["guest-2", "guest-3"]
    fail(standin, status=500)
    assert standin.http.delete("/standin/visitors").json == {"success": True}
    assert requests(standin) == []
    assert standin.http.get("/standin/visitors").json == {"visitors": [], "success": True}
    assert standin.register("b")["username"] == "guest-2"


def test_the_visitors_are_those_of_the_answers_in_the_order_of_creation(standin):
    registered = [standin.register(token, department=token) for token in "cab"]
    shown = standin.http.get("/standin/visitors").json["visitors"]
    assert shown == registered
    standin.http.head("/standin/visitors")


def test_the_requests_are_what_came_and_how_it_was_answered(standin):
    body = b'\xef\xbb\xbf{"visitor": {"token": "t", "token": "u"}}'
    standin.post(body, **{"X-Auth-Token": "secret"})
    standin.post(b"not JSON \xff")
    standin.post(b"x" * 65_537)
    standin.http.get(f"{PATH}/a%2Fb?x=1", status=404)
    standin.http.get("/nothing", status=404)
    standin.http.put(PATH, status=405)
    kept = requests(standin)
    assert [(one["method"], one["route"], one["status"]) for one in kept] == [
        ("POST", PATH, 200),
        ("POST", PATH, 400),
        ("POST", PATH, 413),
        ("GET", f"{PATH}/{{token}}", 404),
        ("GET", None, 404),
        ("PUT", PATH, 405),
    ]
    assert kept[0]["body"] == body.decode()
    assert kept[0]["headers"] == {"content-type": "application/json", "x-auth-token": "secret"}
    assert kept[1]["body"] == "not JSON \ufffd"
    assert kept[2]["body"] == kept[3]["body"] == ""
    assert kept[3]["path"].endswith("?x=1")


def test_the_last_1000_requests_are_kept(standin):
    for number in range(1001):
        standin.http.get("/livez", {"n": number})
    kept = requests(standin)
    assert len(kept) == 1000
    assert (kept[0]["path"], kept[-1]["path"]) == ("/livez?n=1", "/livez?n=1000")


TOO_MANY = (
    "Error, too many requests. Please slow down. You must wait 1 seconds before trying this"
    " endpoint again. [error-too-many-requests]"
)


@pytest.mark.parametrize(
    ("status", "error", "retry"),
    [
        (404, "Resource not found [error-not-found]", None),
        (429, TOO_MANY, "1"),
        (500, "Internal server error [error-internal]", None),
        (503, "The visitor database is unavailable [error-database-unavailable]", "5"),
    ],
)
def test_a_failure_is_worded_as_the_service_words_it(standin, status, error, retry):
    fail(standin, status=status)
    failed = standin.post({"visitor": {"token": "t"}}, Origin="https://example.org")
    assert failed.status_int == status
    assert failed.json == {
        "success": False,
        "error": error,
        "errorType": error.rpartition("[")[2][:-1],
    }
    assert failed.headers.get("Retry-After") == retry
    assert ("X-RateLimit-Reset" in failed.headers) == (status == 429)
    assert failed.headers["Access-Control-Allow-Origin"] == "*"
    assert requests(standin)[-1]["status"] == status
    assert requests(standin)[-1]["body"] == '{"visitor": {"token": "t"}}'
    assert standin.http.get("/standin/visitors").json["visitors"] == []
    assert standin.register("t")["username"] == "guest-2"


def test_a_failure_is_for_its_route_and_method_and_so_many_requests(standin):
    standin.register("t")
    fail(standin, route=f"{PATH}/{{token}}", method="DELETE", status=503, times=2)
    assert len(fail(standin, method="GET", status=500)) == 2
    assert standin.http.options(f"{PATH}/t").status_int == 200
    standin.register("t")
    assert [standin.http.get(f"{PATH}/t", expect_errors=True).status_int for _ in "ab"] == [
        500,
        200,
    ]
    deleted = [standin.http.delete(f"{PATH}/t", expect_errors=True).status_int for _ in "abc"]
    assert deleted == [503, 503, 200]
    assert len(fail(standin, status=500, times=9)) == 1
    assert standin.http.options(PATH).status_int == 200
    assert standin.http.put(PATH, status=405).json["errorType"] == "error-method-not-allowed"
    assert len(fail(standin, status=503)) == 2
    assert standin.http.delete("/standin/failures").json == {"success": True}
    standin.register("t")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ({}, "must match a schema in anyOf"),
        ([], "must be object"),
        ({"times": 2}, "must match a schema in anyOf"),
        ({"status": 500, "drop": True}, "must NOT be valid"),
        ({"status": 200}, "must be equal to one of the allowed values"),
        ({"status": "500"}, "must be equal to one of the allowed values"),
        ({"drop": False}, "must be equal to one of the allowed values"),
        ({"delay": -1}, "must be >= 0"),
        ({"delay": 60.5}, "must be <= 60"),
        ({"delay": "1"}, "must be number"),
        ({"status": 500, "times": 0}, "must be >= 1"),
        ({"status": 500, "times": 1.5}, "must be integer"),
        ({"status": 500, "once": True}, "must NOT have additional properties"),
        ({"status": 500, "method": "PUT"}, "must be equal to one of the allowed values"),
        ({"status": 500, "route": "/nothing"}, "must be a route and a method of it"),
        ({"status": 500, "route": PATH, "method": "GET"}, "must be a route and a method of it"),
        ({"status": 500, "route": "/standin/visitors"}, "must be a route and a method of it"),
    ],
)
def test_a_failure_that_would_never_happen_is_refused(standin, failure, error):
    answer = standin.post(failure, path="/standin/failures")
    assert answer.status_int == 400
    assert answer.json["error"] == f"{error} [invalid-params]"
    standin.register("t")


@pytest.mark.parametrize(("method", "name"), OWN)
@pytest.mark.parametrize("value", ["1", "any"])
def test_who_is_admitted(make_service, method, name, value):
    standin = make_service(LIVECHAT_STANDIN=value)

    def asks(address, **headers):
        standin.http.extra_environ["REMOTE_ADDR"] = address
        answer = standin.http.request(
            f"/standin/{name}",
            method=method,
            body=b'{"status": 500}' if method == "POST" else b"",
            headers={"Content-Type": "application/json", **headers},
            expect_errors=True,
        )
        if answer.status_int != 200:
            assert (answer.status_int, answer.json) == (403, REFUSED)
        return answer.status_int == 200

    for address in ("127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"):
        assert asks(address)
        assert not asks(address, Origin="http://127.0.0.1:3000")
        assert not asks(address, Origin="null")
    for address in ("10.0.0.1", "::2", "1.127.0.0", "", "::ffff:10.0.0.1"):
        assert asks(address) == (value == "any")
        assert not asks(address, Origin="https://example.org")
    # Who comes through a proxy on this machine is somewhere else.
    assert asks("127.0.0.1", **{"X-Forwarded-For": "10.0.0.1"}) == (value == "any")
    # The name of a web page may lead here, whose GET then has no Origin.
    for host in ("localhost", "LOCALHOST:3000", "127.8.9.10:3000", "[::1]:3000"):
        assert asks("127.0.0.1", Host=host)
    for host in ("example.org:3000", "127.0.0.1.example.org", "localhost.example.org", "a:b", ""):
        assert asks("127.0.0.1", Host=host) == (value == "any")


def test_a_preflight_of_a_web_page_is_refused(standin):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "DELETE"}
    answer = standin.http.options("/standin/visitors", headers=headers, expect_errors=True)
    assert answer.status_int == 403


def test_the_openapi_document_describes_it(standin):
    document = standin.http.get("/api/openapi.json").json
    own = {
        (method.upper(), path.removeprefix("/standin/"))
        for path, item in document["paths"].items()
        for method in item
        if path.startswith("/standin/")
    }
    assert own == set(OWN)
    content = document["paths"]["/standin/failures"]["post"]["requestBody"]["content"]
    schema = Draft202012Validator(content["application/json"]["schema"])
    assert schema.is_valid({"route": PATH, "method": "POST", "status": 429, "times": 2})
    assert not schema.is_valid({"status": 418})


def test_a_start_warns_and_the_log_holds_nothing_of_a_visitor(server):
    assert "[WARNING] LIVECHAT_STANDIN: every program on this machine can read" in server.log()
    server.register("secret token")
    ask(server, status=500)
    server.register("secret token")
    assert "secret" not in server.log()


def test_a_dropped_request_gets_no_answer_and_does_not_run(server):
    assert ask(server, drop=True, route=PATH)[0] == 200
    with pytest.raises(http.client.RemoteDisconnected):
        server.register("t")
    assert server.query("SELECT count(*) FROM visitor") == [[0]]
    assert arrived(server)["status"] is None
    assert server.register("t")[0] == 200


def test_a_delayed_request_is_answered_later_than_any_limit_and_holds_up_nobody(server):
    ask(server, delay=12, route=PATH)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(server.register("late")))
    waiting.start()
    assert arrived(server)["status"] is None
    assert server.register("early")[1]["visitor"]["username"] == "guest-2"
    assert not answers
    waiting.join()
    assert answers[0][1]["visitor"]["username"] == "guest-3"


def test_a_delayed_request_runs_though_its_client_has_given_up(server):
    ask(server, delay=1, route=PATH)
    body = b'{"visitor":{"token":"gone"}}'
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with server.connect() as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert arrived(server)["status"] is None
    wait_until(lambda: arrived(server)["status"] == 200, "it has run")
    assert server.query("SELECT token FROM visitor") == [["gone"]]


def test_under_another_server_delays_and_drops_are_a_501(make_server):
    server = make_server(
        LIVECHAT_STANDIN="1", GUNICORN_CMD_ARGS="--worker-class gthread --threads 4"
    ).wait()
    for failure in ({"delay": 1}, {"drop": True}, {"delay": 0, "status": 500}):
        status, answer = ask(server, **failure)
        assert status == 501
        assert answer == {
            "success": False,
            "error": "Only the service's own server delays and drops requests"
            " [error-not-supported]",
            "errorType": "error-not-supported",
        }
    assert ask(server, status=503)[0] == 200
    assert server.register("t")[0] == 503
    assert server.register("t")[1]["visitor"]["username"] == "guest-2"
    with contextlib.closing(server.http()) as client:
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        body = [b'{"visitor":', b'{"token":"chunks"}}']
        client.request("POST", PATH, iter(body), headers, encode_chunked=True)
        assert client.getresponse().status == 200
    kept = server.request("GET", "/standin/requests")[2]["requests"]
    assert [one["status"] for one in kept[-3:]] == [503, 200, 200]
    assert json.loads(kept[-1]["body"]) == {"visitor": {"token": "chunks"}}

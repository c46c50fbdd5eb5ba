"""The service itself (contract, section 7), and HEAD, OPTIONS and CORS (section 1)."""

import pytest

import app
from settings import VERSION, Settings
from tests.server import PATH

READABLE = ["/", "/api/info", "/livez", "/health", "/readyz", "/api/openapi.json"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "/",
            f'{{"name":"livechat-visitors","version":"{VERSION}",'
            '"register":"POST /api/v1/livechat/visitor","openapi":"/api/openapi.json","success":true}',
        ),
        (
            "/api/info",
            f'{{"version":"8.8","service":"livechat-visitors {VERSION}","success":true}}',
        ),
        ("/livez", '{"status":"ok"}'),
        ("/health", '{"status":"ok"}'),
        ("/readyz", '{"status":"ok","checks":{"database":{"status":"ok"}}}'),
    ],
)
def test_the_service_says_what_it_is(service, path, text):
    for slash in ("", "/") if path != "/" else ("",):
        answer = service.http.get(path + slash)
        assert (answer.status_int, answer.text) == (200, text)
        assert answer.headers["Cache-Control"] == "no-store"


def test_without_its_database_it_lives_but_is_not_ready(service, tmp_path):
    service.database.close()
    (tmp_path / "livechat.db").rename(tmp_path / "elsewhere")
    answer = service.http.get("/readyz", expect_errors=True)
    assert (answer.status_int, answer.text) == (
        503,
        '{"status":"unavailable","checks":{"database":{"status":"unavailable"}}}',
    )
    assert answer.headers["Retry-After"] == "5"
    assert service.http.get("/livez").json == service.http.get("/health").json == {"status": "ok"}
    (tmp_path / "elsewhere").rename(tmp_path / "livechat.db")
    assert service.http.get("/readyz").status_int == 200


@pytest.mark.parametrize("path", [*READABLE, f"{PATH}/t", "/api/v1/livechat/visitors.info"])
def test_head_answers_wherever_get_does(service, path):
    service.register("t")
    get = service.http.get(path, expect_errors=True)
    head = service.http.head(path, expect_errors=True)
    assert head.status_int == get.status_int
    assert head.headers["Content-Length"] == get.headers["Content-Length"]
    assert head.body == b""


def test_head_is_no_method_where_there_is_no_get(service):
    assert service.http.head(PATH, expect_errors=True).status_int == 405


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *[(path, {"GET", "HEAD", "OPTIONS"}) for path in READABLE],
        ("/api/v1/livechat/visitors.search", {"GET", "HEAD", "OPTIONS"}),
        (PATH, {"POST", "OPTIONS"}),
        (f"{PATH}/", {"POST", "OPTIONS"}),
        (f"{PATH}/any", {"GET", "HEAD", "DELETE", "OPTIONS"}),
        ("/api/v1/livechat/custom.field", {"POST", "OPTIONS"}),
    ],
)
def test_options_is_200_with_the_methods_that_a_405_names_too(service, path, allowed):
    answer = service.http.options(path)
    assert answer.status_int == 200
    assert set(answer.headers["Allow"].split(", ")) | {"OPTIONS"} == allowed
    refused = service.http.patch(path, expect_errors=True)
    assert refused.status_int == 405
    assert set(refused.headers["Allow"].split(", ")) == allowed


def test_options_on_an_unknown_path_is_404(service):
    assert service.http.options("/nothing", expect_errors=True).status_int == 404


def test_every_route_is_known_with_a_trailing_slash(service):
    for path in app.routes(None, Settings()):
        if path != "/" and "{" not in path:
            assert service.http.options(f"{path}/").status_int == 200


def preflight(service, path, method, origin="https://shop.example"):
    return service.http.options(
        path,
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "content-type, x-user-id",
        },
    )


@pytest.mark.parametrize(("path", "method"), [(PATH, "POST"), (f"{PATH}/t", "DELETE")])
def test_a_preflight_is_answered_with_what_was_asked_for(service, path, method):
    answer = preflight(service, path, method)
    assert answer.status_int == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert method in answer.headers["Access-Control-Allow-Methods"].split(", ")
    assert answer.headers["Access-Control-Allow-Headers"] == "content-type, x-user-id"
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_any_page_may_read_every_answer_unless_origins_are_configured(service):
    headers = {"Origin": "https://shop.example"}
    for answer in (
        service.post({"visitor": {"token": "t"}}, **headers),
        service.post({}, **headers),
        service.http.get("/nothing", headers=headers, expect_errors=True),
        service.http.get(PATH, headers=headers, expect_errors=True),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert "Vary" not in answer.headers
    assert "Access-Control-Allow-Origin" not in service.post({}).headers


def test_configured_origins_are_answered_by_name_and_strangers_get_no_header(make_service):
    service = make_service(LIVECHAT_CORS_ORIGINS="https://shop.example, http://localhost:8080")
    for origin in ("https://shop.example", "http://localhost:8080"):
        for answer in (service.post({}, Origin=origin), preflight(service, PATH, "POST", origin)):
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Vary"] == "Origin"
    for origin in (
        "https://other.example",
        "http://shop.example",
        "https://shop.example.evil",
        "null",
    ):
        for answer in (service.post({}, Origin=origin), preflight(service, PATH, "POST", origin)):
            assert not [
                name for name in answer.headers if name.lower().startswith("access-control")
            ]
            assert answer.headers["Vary"] == "Origin"
    assert service.post({}).headers["Vary"] == "Origin"

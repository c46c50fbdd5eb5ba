"""The page /inbox over HTTP (contract, section 7); what it does in a browser: make test-page."""

import base64
import hashlib
import re

import pytest

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


def ask(service, path, accept=None, **headers):
    if accept is not None:
        headers["Accept"] = accept
    return service.http.get(path, headers=headers)


def test_the_page_is_html_that_may_load_nothing_and_stand_in_no_frame(service):
    answer = ask(service, "/inbox")
    assert answer.status_int == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in answer.headers
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("img-src") == "data:"
    for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy.pop(name) == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    # Hashes, so that no style and no script but the page's own ever counts.
    for element in ("style", "script"):
        (text,) = re.findall(f"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{element}-src") == f"'sha256-{digest}'"
    assert policy == {}


def test_the_page_names_no_other_address_and_needs_no_inline_handler(service):
    text = ask(service, "/inbox").text
    assert set(re.findall(r"https?://[^/\"'`$\s]*", text)) <= {"http://www.w3.org"}  # of SVG
    assert not re.search(r"<[^>]+\s(on\w+|style)=", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)


@pytest.mark.parametrize(("agent", "said"), [(None, "unset"), ("agent:secret", "set")])
def test_the_page_knows_whether_there_is_an_agent_and_no_more(make_service, agent, said):
    service = make_service(**({"LIVECHAT_AGENT": agent} if agent else {}))
    text = ask(service, "/inbox").text
    assert f'<body data-agent="{said}">' in text
    assert "secret" not in text


@pytest.mark.parametrize("accept", [BROWSER, "text/html", "application/json;q=0.5, text/html"])
def test_a_browser_at_the_root_is_sent_to_the_page(service, accept):
    answer = ask(service, "/", accept)
    assert (answer.status_int, answer.body) == (302, b"")
    assert answer.headers["Location"].removeprefix("http://localhost") == "/inbox"
    assert answer.headers["Vary"] == "Accept"
    assert ask(service, "/inbox", accept).status_int == 200


@pytest.mark.parametrize(
    "accept",
    [
        *(None, "", "*/*", "application/json", "application/json, text/plain, */*"),
        *("application/json, text/html;q=0.9", "text/html;q=0", "nonsense;;;="),
    ],
)
def test_everyone_else_at_the_root_gets_json(service, accept):
    answer = ask(service, "/", accept)
    assert answer.status_int == 200
    assert answer.json["openapi"] == "/api/openapi.json"
    assert answer.headers["Vary"] == "Accept"


def test_with_configured_origins_the_root_varies_by_both(make_service):
    service = make_service(LIVECHAT_CORS_ORIGINS="https://shop.example")
    for accept in (BROWSER, "*/*"):
        assert ask(service, "/", accept).headers["Vary"] == "Accept, Origin"


def test_the_log_names_the_page_beside_the_address(make_server):
    server = make_server().wait()
    assert re.findall(r"shows visitors at (\S+)", server.log()) == [
        f"http://127.0.0.1:{server.port}/inbox"
    ]

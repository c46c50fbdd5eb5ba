"""GET /api/openapi.json (contract, section 7): a description that cannot lie.

Every answer that any test gets through WebTest is held against it too (tests/service.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

import app
import schemas
from settings import Settings
from tests import openapi
from tests.server import ROOT

AGENT = {"X-User-Id": "agent", "X-Auth-Token": "secret"}
OPERATIONS = list(openapi.operations())


@pytest.fixture
def service(make_service):
    return make_service(LIVECHAT_AGENT="agent:secret")


def test_the_file_is_in_its_format():
    text = openapi.FILE.read_text()
    assert text == openapi.formatted(json.loads(text)) + "\n", "run python -m tests.openapi"


def test_the_routes_and_the_described_paths_are_the_same(service):
    described = {
        path: {method for other, method, _ in OPERATIONS if other == path}
        for path in openapi.DOCUMENT["paths"]
    }
    served = {
        app.template(route): {
            method for method in openapi.METHODS if hasattr(resource, f"on_{method}")
        }
        for route, resource in app.routes(None, Settings()).items()
    }
    assert described == served
    assert service.http.get("/api/openapi.json").json == openapi.DOCUMENT


def test_request_bodies_are_the_schema_files_themselves():
    names = {
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for _, _, operation in OPERATIONS
        if "requestBody" in operation
    }
    assert names == {"visitor", "visitor.status", "custom.field", "custom.fields"}
    for name in names:
        assert openapi.DOCUMENT["components"]["schemas"][name] == schemas.load(name)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("visitors.info", "get"),
        ("visitors.info", "delete"),
        ("visitors.search", "get"),
        ("visitors.statistics", "get"),
    ],
)
def test_query_parameters_are_those_of_the_schema_files(name, method):
    operation = openapi.DOCUMENT["paths"][f"/api/v1/livechat/{name}"][method]
    schema = schemas.load(name)
    described = {parameter["name"]: parameter for parameter in operation["parameters"]}
    assert set(described) == set(schema["properties"])
    assert [key for key, one in described.items() if one.get("required")] == schema.get(
        "required", []
    )


@pytest.mark.parametrize(
    ("path", "method", "operation"), OPERATIONS, ids=[f"{m} {p}" for p, m, _ in OPERATIONS]
)
def test_every_example_is_sent_and_answered_as_described(service, path, method, operation):
    token = "867ad6a09fc4af29f6f1f2a9cf1deaba"
    known = service.register(token, name="John Doe")
    bodies = [None]
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]["application/json"]
        bodies = [example["value"] for example in content["examples"].values()]
    item = openapi.DOCUMENT["paths"][path]
    values = {}
    for parameter in item.get("parameters", []) + operation.get("parameters", []):
        content = parameter.get("content", {}).get("application/json")
        examples = (content or parameter)["examples"]
        values[parameter["name"]] = [
            json.dumps(one["value"]) if content else one["value"] for one in examples.values()
        ]
    if "visitorId" in values:
        values["visitorId"] = [known["_id"]]  # the example's is not in this database
    query = {name: found[0] for name, found in values.items() if name != "token"}
    url = path.replace("{token}", quote(token)) + (f"?{urlencode(query)}" if query else "")
    for body in bodies:
        if body is None:
            answer = service.http.request(url, method=method.upper(), headers=AGENT)
        else:
            answer = service.post(body, path=url)
        assert answer.status_int == 200
        if answer.content_type == "application/json":  # else it is the page
            openapi.check(method.upper(), path, 200, answer.headers, answer.json)


def test_every_example_of_an_answer_is_as_described():
    seen = 0
    for _, _, operation in OPERATIONS:
        for response in operation["responses"].values():
            content = openapi.resolve(response).get("content", {}).get("application/json", {})
            for example in content.get("examples", {}).values():
                openapi.validator(content["schema"]).validate(openapi.resolve(example)["value"])
                seen += 1
    assert seen > 50


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (400, "GET / HTTP/1.1"),
        (400, "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1"),
        (414, f"GET /?{'a' * 9_000} HTTP/1.1\r\nHost: x"),
        (417, "GET / HTTP/1.1\r\nHost: x\r\nExpect: y"),
        (431, f"GET / HTTP/1.1\r\nHost: x\r\nX: {'a' * 9_000}"),
        (501, "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip"),
    ],
    ids=["not HTTP", "incomplete", "URL", "Expect", "header", "Transfer-Encoding"],
)
def test_what_the_server_refuses_is_described_on_every_route(server, status, request_):
    head, body = server.raw(f"{request_}\r\n\r\n".encode())
    headers = dict(header.split(": ") for header in head.split("\r\n")[1:])
    assert head.startswith(f"HTTP/1.1 {status} ")
    for path, method, _ in OPERATIONS:
        openapi.check(method.upper(), path, status, headers, json.loads(body))


def test_schemathesis_finds_nothing(make_server, tmp_path):
    server = make_server(LIVECHAT_AGENT="agent:secret").wait()
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        f"--config-file={ROOT / 'tests' / 'schemathesis.toml'}",
        "run",
        f"http://127.0.0.1:{server.port}/api/openapi.json",
        "--checks=all",
        "--max-examples=3",
        "--seed=1",
        "--no-color",
        *[f"--header={name}: {value}" for name, value in AGENT.items()],
    ]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stdout
    assert "16 selected / 16 total" in ran.stdout
    assert " 500 " not in server.log()

"""Every property that schemas/visitor.json has goes wherever a visitor goes."""

import csv
import json
from urllib.parse import quote

import schemas
from tests.database import rows
from tests.operating import FIELD
from tests.server import PATH, Server

PROPERTIES = schemas.load("visitor")["properties"]["visitor"]["properties"]
# A new one is a text as the others; as an email has to be one, each of them looks like one.
TEXTS = {name: f"{name}@example.org" for name in PROPERTIES if name != "customFields"}


def test_every_property_goes_everywhere(run, make_service, tmp_path):
    assert "token" in TEXTS  # the schema was read
    service = make_service()
    answer = service.register(**TEXTS, customFields=[FIELD])
    values = [*TEXTS.values(), FIELD["value"]]
    assert [value for value in values if f'"{value}"' not in json.dumps(answer)] == []

    assert run("export", "-o", "out.jsonl")[0] == 0
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1]) == {
        "number": 1,
        **answer,
    }
    assert run("import", "out.jsonl", "--db", "new.db")[0] == 0
    assert rows("new.db") == service.content()[0]
    assert make_service(tmp_path / "new.db").http.get(f"{PATH}/{quote(TEXTS['token'])}").json == {
        "visitor": answer,
        "success": True,
    }

    assert run("export", "--format", "csv", "-o", "out.csv")[0] == 0
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8-sig") as file:
        columns, row = csv.reader(file)
    cells = dict(zip(columns, row, strict=True))
    assert {name: cells[name] for name in TEXTS} == TEXTS
    assert cells[f"field:{FIELD['key']}"] == FIELD["value"]

    (tmp_path / "other").mkdir()
    other = Server(tmp_path / "other").wait()
    try:
        assert run("replay", f"http://127.0.0.1:{other.port}")[0] == 0
        there = other.request("GET", f"{PATH}/{quote(TEXTS['token'])}")[2]["visitor"]
    finally:
        other.kill()
    made_there = ("_id", "ts", "_updatedAt")
    assert there == answer | {key: there[key] for key in made_there}

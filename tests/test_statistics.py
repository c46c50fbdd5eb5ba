"""The counts behind visitors.statistics, whichever program writes: manage.py beside the service."""

import json
from contextlib import closing

import pytest

from tests.database import look
from tests.operating import JOHN
from tests.server import wait_until

STATISTICS = "/api/v1/livechat/visitors.statistics?days=1"
AGENT = {"X-User-Id": "agent", "X-Auth-Token": "secret"}
OLD = 1_000_000_000_000  # milliseconds: 2001-09-09
COUNTED = "SELECT ts / 86400000, count(*) FROM visitor GROUP BY 1 ORDER BY 1"


@pytest.fixture
def server(make_server, path):
    return make_server(LIVECHAT_DB=path, LIVECHAT_AGENT="agent:secret").wait()


def ask(server):
    status, _, answer = server.request("GET", STATISTICS, headers=AGENT)
    assert status == 200, answer
    return answer


def counts(path):
    """Return the days with anybody, as they are counted and as they are."""
    return look(path, "SELECT number, registered FROM day WHERE registered ORDER BY number"), look(
        path, COUNTED
    )


def test_erase_purge_and_import_of_another_process_are_seen(fill, run, path, server, tmp_path):
    fill(*((f"old{n}", JOHN) for n in range(3)), at=OLD)
    for name in ("a", "b"):
        server.register(name, email=f"{name}@email.com")
    seen = [ask(server)]
    assert (seen[0]["total"], seen[0]["days"][0]["registered"]) == (5, 2)
    assert run("export", "-o", "all.jsonl")[0] == 0
    assert ask(server) == seen[0]  # as reading changes nothing
    for command, total, today in (
        (("erase", "a@email.com"), 4, 1),
        (("purge", "--older-than", "90d"), 1, 1),
        (("import", "all.jsonl"), 5, 2),
    ):
        assert run(*command)[0] == 0
        answer = ask(server)
        assert (answer["total"], answer["days"][0]["registered"]) == (total, today)
        assert answer["changed"] > seen[-1]["changed"]
        seen.append(answer)
    assert server.stop() == 0
    counted, there = counts(path)
    assert counted == there


def test_an_import_that_replaces_a_visitor_counts_the_new_day_instead(fill, run, path, tmp_path):
    fill(("a", JOHN), at=OLD)
    assert run("export", "-o", "one.jsonl")[0] == 0
    header, line = (tmp_path / "one.jsonl").read_text().splitlines()
    visitor = json.loads(line) | {
        "ts": "2002-01-01T00:00:00.000Z",
        "_updatedAt": "2020-01-01T00:00:00.000Z",
    }
    (tmp_path / "one.jsonl").write_text(f"{header}\n{json.dumps(visitor)}\n")
    assert "1 replaced" in run("import", "one.jsonl")[1]
    counted, there = counts(path)
    assert counted == there == [(11688, 1)]


def test_what_a_group_undoes_is_not_counted(make_service, tmp_path):
    service = make_service(LIVECHAT_AGENT="agent:secret")
    fields = [{"key": f"k{n}", "value": "x" * 4000, "overwrite": True} for n in range(15)]
    service.register("a", customFields=fields)
    more = [{"key": f"m{n}", "value": "x" * 4000, "overwrite": True} for n in range(15)]
    service.refused({"visitor": {"token": "a", "customFields": more}})
    service.database.close()
    counted, there = counts(tmp_path / "livechat.db")
    assert counted == there
    assert [count for _, count in counted] == [1]


def test_the_page_of_a_service_that_registers_all_the_time_moves_on(server):
    before = ask(server)
    with closing(server.http()) as connection:
        for n in range(20):
            body = json.dumps({"visitor": {"token": f"t{n}"}})
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/api/v1/livechat/visitor", body, headers)
            connection.getresponse().read()
            answer = ask(server)
            assert answer["total"] == before["total"] + 1
            assert answer["changed"] > before["changed"]
            before = answer
    assert wait_until(lambda: ask(server) == ask(server), "it moves with changes alone")

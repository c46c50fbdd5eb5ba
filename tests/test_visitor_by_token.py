"""GET and DELETE /api/v1/livechat/visitor/{token} (contract, section 3)."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event
from urllib.parse import quote

import apsw
import pytest

import storage
from storage.scrubber import scrub
from tests.locks import held
from tests.server import PATH, ROOT, wait_until

NOT_FOUND = (
    '{"success":false,"error":"Resource not found [error-not-found]","errorType":"error-not-found"}'
)
UNKNOWN = '{"success":false,"error":"[invalid-token]","errorType":"invalid-token"}'
TOKENS = [
    "867ad6a09fc4af29f6f1f2a9cf1deaba",
    "with space",
    " ",
    "a/b",
    "a/",
    "a//",
    "/a",
    "/",
    "//",
    "%",
    "%2F",
    "%ff",
    "a?b",
    "?",
    "a#b",
    "..",
    "../..",
    ".",
    "é",
    "e\u0301",
    "\U0001f600",
    "\ufffd",
    "\u200b",
    "\r\n",
    "\\",
    "visitor/",
    "x/livechat/visitor/y",
    "a;b=c&d+e",
]


def request(service, method, token, encoded=None):
    path = f"{PATH}/{quote(token, safe='') if encoded is None else encoded}"
    return service.http.request(path, method=method, expect_errors=True)


@pytest.mark.parametrize("token", [token for token in TOKENS if token.strip()])
def test_any_token_is_read_and_erased(service, token):
    registered = service.register(token, name="N")
    other = service.register("other")
    answer = request(service, "GET", token)
    assert answer.status_int == 200
    assert answer.json == {"visitor": registered, "success": True}
    assert answer.text.endswith(',"success":true}')
    service.now += 1000
    answer = request(service, "DELETE", token)
    id_ = registered["_id"]
    expected = f'{{"visitor":{{"_id":"{id_}","ts":"2022-06-29T06:05:02.392Z"}},"success":true}}'
    assert (answer.status_int, answer.text) == (200, expected)
    unknown = (404, NOT_FOUND) if "/" in token else (400, UNKNOWN)
    for method in ("GET", "DELETE"):
        answer = request(service, method, token)
        assert (answer.status_int, answer.text) == unknown
    assert request(service, "GET", "other").json["visitor"] == other


@pytest.mark.parametrize(
    ("token", "encoded"),
    [
        ("a/b/", "a/b/"),
        ("/", "/"),
        ("//a//", "//a//"),
        ("..", ".."),
        ("a b", "a%20b"),
        ("a", "%61"),
    ],
)
def test_slashes_may_stand_in_the_path_as_they_are(service, token, encoded):
    registered = service.register(token)
    assert request(service, "GET", token, encoded).json["visitor"] == registered


def test_a_literal_trailing_question_mark_is_harmless(service):
    registered = service.register("a")
    assert request(service, "GET", "a", "a?").json["visitor"] == registered


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
@pytest.mark.parametrize("encoded", ["unknown", "%ff", "%ed%a0%80", "a%00", "%00", "A", "%20a"])
def test_an_unknown_token_is_refused(service, method, encoded):
    service.register("a")
    service.register("\ufffd")
    before = service.content()
    answer = request(service, method, "", encoded)
    assert (answer.status_int, answer.text) == (400, "" if method == "HEAD" else UNKNOWN)
    assert service.content() == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
@pytest.mark.parametrize("encoded", ["a/", "a/room", "a%2Froom", "%ff/", "/"])
def test_an_unknown_token_with_a_slash_is_an_unknown_path(service, method, encoded):
    service.register("a")
    before = service.content()
    answer = request(service, method, "", encoded)
    assert (answer.status_int, answer.text) == (404, "" if method == "HEAD" else NOT_FOUND)
    assert service.content() == before


@pytest.mark.parametrize("encoded", ["a", "a/room"])
def test_there_is_nothing_to_post_to_below_the_path_of_registrations(service, encoded):
    service.register("a")
    answer = request(service, "POST", "", encoded)
    assert (answer.status_int, answer.text) == (404, NOT_FOUND)
    answer = request(service, "PUT", "", encoded)
    assert (answer.status_int, answer.headers["Allow"]) == (405, "DELETE, GET, HEAD, OPTIONS")


def test_an_empty_token_is_the_path_of_registrations(service):
    answer = service.http.get(f"{PATH}/", expect_errors=True)
    assert answer.status_int == 405
    assert answer.headers["Allow"] == service.http.get(PATH, expect_errors=True).headers["Allow"]


def test_a_content_type_and_a_body_are_never_looked_at(service):
    service.register("a")
    for method in ("GET", "DELETE"):
        answer = service.http.request(
            f"{PATH}/a", method=method, body=b"{", headers={"Content-Type": "x/y"}
        )
        assert answer.status_int == 200


def test_an_erased_token_registers_anew_with_a_new_id_and_a_new_number(service):
    before = service.register("a", name="N")
    request(service, "DELETE", "a")
    after = service.register("a")
    assert after["_id"] != before["_id"]
    assert (after["username"], "name" in after) == ("guest-3", False)


# What is searched for in the bytes of the files; each is in a column of its own.
SECRETS = {
    "name": "NAME-secret",
    "email": "email-secret@example.org",
    "phone": "PHONE-secret",
    "department": "DEPARTMENT-secret",
    "username": "USERNAME-secret",
    "customFields": [
        {"key": "KEY-secret", "value": "VALUE-secret", "overwrite": True},
        {"key": "LONG-secret", "value": "LONG-secret " * 300, "overwrite": True},
    ],
}


SERIES = "(WITH RECURSIVE n(value) AS (VALUES (1) UNION ALL SELECT value + 1 FROM n LIMIT 30000) SELECT value FROM n)"


def count(path, *words):
    """Return how often `words` stand in database and WAL, seen by a process of its own."""
    code = (
        "import glob, sys; "
        "data = b''.join(open(file, 'rb').read() for file in glob.glob(sys.argv[1] + '*')); "
        "print(sum(data.lower().count(word.encode()) for word in sys.argv[2:]))"
    )
    command = [sys.executable, "-c", code, str(path), *words]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("match", ["token", "token,phone,email"])
def test_erased_data_is_gone_from_the_database_and_its_wal(make_service, tmp_path, match):
    service = make_service(LIVECHAT_MATCH=match)
    path = tmp_path / "livechat.db"
    for number in range(20):
        service.register(f"other-{number}", name=f"other-{number}")
    service.register("TOKEN-secret", **SECRETS)
    service.register("TOKEN-secret", name="RENAMED-secret")
    assert count(path, "secret") > 10
    assert request(service, "DELETE", "TOKEN-secret").status_int == 200
    assert count(path, "secret") == 0
    assert count(path, "other-") >= 40


def test_searches_of_other_processes_do_not_hold_an_erasure_up(service, tmp_path):
    path = tmp_path / "livechat.db"

    def fill(connection):
        values = "value, value, value, 'u', 1, 1, hex(zeroblob(50)), '{}'"
        into = "visitor (number, id, token, username, ts, updated, search, fields)"
        return connection.execute(f"INSERT INTO {into} SELECT {values} FROM {SERIES}").get

    service.database.write(fill)
    code = (
        "import storage, sys; store = storage.VisitorStore(storage.Database(sys.argv[1])); "
        "print(flush=True); "
        "[store.search('nobody', {}, 0, 50) for _ in iter(int, 1)]"
    )
    command = [sys.executable, "-c", code, str(path)]
    searching = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    try:
        for process in searching:
            process.stdout.readline()
        for number in range(5):
            service.register(f"TOKEN-{number}", **SECRETS)
            assert request(service, "DELETE", f"TOKEN-{number}").status_int == 200
            assert count(path, "secret") == 0
    finally:
        for process in searching:
            with process:
                process.kill()


def test_no_copy_of_a_moved_row_stays_behind_in_the_file(make_service, tmp_path):
    # secure_delete alone leaves such copies in pages that SQLite has built anew.
    service = make_service(LIVECHAT_MATCH="token,phone,email")
    store = storage.VisitorStore(service.database)
    for number in range(600):
        given = {"phone": f"{number * 7919 % 10007}", "email": f"{number * 104729 % 10007}@x"}
        store.register(f"{number * 15485863 % 10007}-secret", given)
    for number in range(0, 600, 2):
        fields = [{"key": "k", "value": "v" * 700, "overwrite": True}]
        store.register(f"{number * 15485863 % 10007}-secret", {"name": "N" * 50}, fields)
    store.erase("0-secret")
    service.database.close()
    data = (tmp_path / "livechat.db").read_bytes()
    pages = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    assert len(pages) > 100
    assert [number for number, page in enumerate(pages) if scrub(page) != page] == []
    connection = apsw.Connection(str(tmp_path / "livechat.db"))
    assert connection.pragma("integrity_check") == "ok"
    connection.close()


def erase_beside(service, path, threads, use, times):
    """Erase visitors, whose bytes have to be gone, while threads use the database all the time."""
    service.register("first")
    done = Event()

    def go_on():
        while not done.is_set():
            use(done)

    with ThreadPoolExecutor(threads) as pool:
        using = [pool.submit(go_on) for _ in range(threads)]
        try:
            for number in range(times):
                service.register(f"TOKEN-{number}", **SECRETS)
                assert request(service, "DELETE", f"TOKEN-{number}").status_int == 200
                assert count(path, "secret") == 0
        finally:
            done.set()
        assert [one.result() for one in using] == [None] * threads


def test_searches_of_this_process_do_not_hold_an_erasure_up(service, tmp_path):
    sql = f"SELECT count(*), (SELECT sum(value) FROM {SERIES.replace('30000', '100000')}) FROM visitor"

    def search(_done):
        service.database.scan(lambda connection: connection.execute(sql).fetchall())

    erase_beside(service, tmp_path / "livechat.db", 4, search, 5)


def test_writes_that_take_long_do_not_hold_an_erasure_up(service, tmp_path):
    """As on a slow disk."""

    def write(done):
        def slowly(connection):
            connection.execute("UPDATE guest SET last = last")
            done.wait(0.03)

        service.database.write(slowly)

    erase_beside(service, tmp_path / "livechat.db", 2, write, 10)


def erase_under_a_reader(service, path):
    """Erase a visitor whom another process goes on reading, so that the bytes have to stay."""
    service.register("TOKEN-secret", **SECRETS)
    with held(str(path), "older state") as let_go:
        assert request(service, "DELETE", "TOKEN-secret").status_int == 200
        assert request(service, "GET", "TOKEN-secret").status_int == 400
        assert service.register("a")["username"] == "guest-2"
        assert count(path, "secret") > 0  # the reader needs it
        let_go()


def test_an_erasure_while_another_program_reads_ends_with_the_first_write_after_it(
    service, tmp_path
):
    path = tmp_path / "livechat.db"
    erase_under_a_reader(service, path)
    assert count(path, "secret") > 0
    service.register("b")
    assert count(path, "secret") == 0


def erase_and_be_killed(path):
    """Let a process erase a visitor, and end before it could take the bytes from the files."""
    code = (
        "from pathlib import Path; from tests import service as app, test_visitor_by_token as test;"
        "import os, sys; path = Path(sys.argv[1]); service = app.Service(path, {});"
        "test.erase_under_a_reader(service, path); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT)


@pytest.mark.parametrize("begins", ["a start", "a worker that is started again"])
def test_an_erasure_that_a_process_could_not_end_before_it_was_killed_is_ended_by_the_next_one(
    tmp_path, begins
):
    path = tmp_path / "livechat.db"
    erase_and_be_killed(path)
    assert count(path, "secret") > 0
    if begins == "a start":
        assert storage.prepare(str(path)) == (False, 1)
    else:
        with closing(storage.Database(str(path))) as database:
            storage.VisitorStore(database).register("b", {})
            assert count(path, "secret") == 0
    assert count(path, "secret") == 0


def test_an_erasure_ends_by_itself_where_nobody_writes_any_more(server):
    assert server.register("TOKEN-secret", **SECRETS)[0] == 200
    with held(str(server.database), "older state") as let_go:
        assert server.request("DELETE", f"{PATH}/TOKEN-secret")[0] == 200
        assert count(server.database, "secret") > 0
        let_go()
    wait_until(lambda: count(server.database, "secret") == 0, "the erased bytes are gone")


def test_an_erasure_of_another_process_that_was_killed_is_ended_by_the_service(server):
    erase_and_be_killed(server.database)
    wait_until(lambda: count(server.database, "secret") == 0, "the erased bytes are gone")


def test_an_unknown_token_makes_no_erasure_due(service, tmp_path):
    for token in "abc":
        service.register(token)
    wal = tmp_path / "livechat.db-wal"
    before = wal.stat().st_size
    assert before > 0
    request(service, "DELETE", "unknown")
    assert wal.stat().st_size == before
    request(service, "DELETE", "a")
    assert wal.stat().st_size == 0


def test_replaced_values_are_gone_after_a_checkpoint(service, tmp_path):
    service.register("a", name="NAME-secret")
    service.register("a", name="N")
    service.database.close()
    assert count(tmp_path / "livechat.db", "secret") == 0


def test_erasures_at_once_with_registrations_lose_nothing(server):
    for number in range(20):
        server.register(f"old-{number}")
    with ThreadPoolExecutor(8) as pool:
        erased = [
            pool.submit(server.request, "DELETE", f"{PATH}/old-{number}") for number in range(20)
        ]
        made = [pool.submit(server.register, f"new-{number}") for number in range(40)]
    assert [one.result()[0] for one in erased] == [200] * 20
    assert [one.result()[0] for one in made] == [200] * 40
    assert server.query("SELECT count(*) FROM visitor WHERE token LIKE 'new-%'") == [[40]]
    assert server.query("SELECT count(*) FROM visitor") == [[40]]

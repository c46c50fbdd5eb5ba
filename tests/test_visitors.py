"""The read side, for the configured agent (contract, section 6)."""

import json
import logging
import time
import urllib.parse

import pytest

from storage import visitors
from storage.fields import COLUMNS, INSERT, as_row

INFO = "/api/v1/livechat/visitors.info"
SEARCH = "/api/v1/livechat/visitors.search"
STATISTICS = "/api/v1/livechat/visitors.statistics"
AGENT = {"X-User-Id": "agent", "X-Auth-Token": "se:cret-é"}
# What an HTTP client puts on the wire for it: bytes, which WSGI hands over as Latin-1.
WIRE = {name: value.encode().decode("latin-1") for name, value in AGENT.items()}
UNAUTHORIZED = (
    '{"success":false,"error":"You must be logged in to do this.","status":"error",'
    '"message":"You must be logged in to do this."}'
)


@pytest.fixture
def service(make_service):
    return make_service(LIVECHAT_AGENT="agent:se:cret-é")


def ask(service, path, query, headers=WIRE, method="GET"):
    return service.http.request(
        f"{path}?{query}", method=method, headers=headers, expect_errors=True
    )


def search(service, **query):
    parts = [f"{key}={quote(value)}" for key, value in query.items()]
    answer = ask(service, SEARCH, "&".join(parts))
    assert answer.status_int == 200, answer.text
    return answer.json


def quote(value):
    return urllib.parse.quote(value if isinstance(value, str) else json.dumps(value), safe="")


@pytest.mark.parametrize("path", [INFO, SEARCH, STATISTICS])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-User-Id": "agent"},
        {"X-Auth-Token": WIRE["X-Auth-Token"]},
        WIRE | {"X-User-Id": "Agent"},
        WIRE | {"X-Auth-Token": "se:cret"},
        WIRE | {"X-Auth-Token": WIRE["X-Auth-Token"] + "x"},
        WIRE | {"X-Auth-Token": "\xff"},
        {"X-User-Id": "", "X-Auth-Token": ""},
    ],
)
def test_both_headers_have_to_match_before_anything_else_is_looked_at(service, path, headers):
    answer = ask(service, path, "nonsense=1", headers)
    assert (answer.status_int, answer.text) == (401, UNAUTHORIZED)


def test_only_the_agent_erases_by_id(service):
    id_ = service.register("t")["_id"]
    answer = ask(service, INFO, f"visitorId={id_}", WIRE | {"X-User-Id": "x"}, "DELETE")
    assert (answer.status_int, answer.text) == (401, UNAUTHORIZED)
    assert service.register("t")["_id"] == id_


@pytest.mark.parametrize("path", [INFO, SEARCH, STATISTICS])
@pytest.mark.parametrize("headers", [{}, {"X-User-Id": "", "X-Auth-Token": ""}, AGENT | WIRE])
def test_without_a_configured_agent_nobody_reads(make_service, path, headers):
    answer = ask(make_service(), path, "term=&visitorId=", headers)
    assert (answer.status_int, answer.text) == (401, UNAUTHORIZED)


def test_a_visitor_is_read_by_id_without_the_token(service):
    registered = service.register("secret", name="N", department="d")
    answer = ask(service, INFO, f"visitorId={registered['_id']}")
    del registered["token"]
    assert answer.json == {"visitor": registered, "success": True}
    assert list(answer.json["visitor"]) == list(registered)


def refusal(error, error_type="invalid-params"):
    return f'{{"success":false,"error":"{error}","errorType":"{error_type}"}}'


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("", "must have required property 'visitorId' [invalid-params]"),
        ("other=1", "must have required property 'visitorId' [invalid-params]"),
        ("visitorId=x&other=1", "must NOT have additional properties [invalid-params]"),
        ("visitorId=x&visitorId=y", "must be string [invalid-params]"),
    ],
)
def test_the_parameters_of_info_are_checked(service, method, query, error):
    answer = ask(service, INFO, query, method=method)
    assert (answer.status_int, answer.text) == (400, refusal(error))


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("id_", ["unknown", "", "%ff", "%00"])
def test_an_unknown_id_is_not_found(service, method, id_):
    service.register("t")
    answer = ask(service, INFO, f"visitorId={id_}", method=method)
    assert (answer.status_int, answer.text) == (
        400,
        refusal("visitor-not-found", "visitor-not-found"),
    )


BAD_NUMBERS = ["x", "1x", "0x10", "NaN", "Infinity", "1_0", "true", "null", "%5B%5D", "%2B1"]


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("", "must have required property 'term'"),
        ("count=x&other=1", "must have required property 'term'"),
        ("term=&other=1&count=x", "must NOT have additional properties"),
        *[
            (f"term=&{key}={value}", "must be number")
            for key in ("count", "offset")
            for value in BAD_NUMBERS
        ],
        ("term=&count=-1", "must be >= 0"),
        ("term=&offset=-1", "must be >= 0"),
        ("term=&offset=-0.5", "must be >= 0"),
        ("term=&offset=x&count=-1", "must be >= 0"),
        ("term=&count=1&count=2", "must be number"),
        ("term=a&term=b", "must be string"),
        ("sort=x&term=&count=x", "must be number"),
    ],
)
def test_the_parameters_of_search_are_checked(service, query, error):
    answer = ask(service, SEARCH, query)
    assert (answer.status_int, answer.text) == (400, refusal(f"{error} [invalid-params]"))


@pytest.mark.parametrize(
    "sort",
    [
        "name",
        "1",
        "[]",
        "null",
        '"name"',
        '{"token":"1"}',
        '{"name":2}',
        '{"name":0}',
        '{"name":"1"}',
        '{"name":true}',
        '{"name":null}',
        '{"name":1,"x":0}',
        '{"name":NaN}',
        "é" * 100,
        "[" * 5000,
    ],
)
def test_a_bad_sort_is_quoted_up_to_64_characters(service, sort):
    answer = ask(service, SEARCH, f"term=&sort={quote(sort)}")
    assert answer.status_int == 400
    quoted = json.dumps(
        f'Invalid sort parameter provided: "{sort[:64]}" [error-invalid-sort]', ensure_ascii=False
    )
    assert answer.text == (
        f'{{"success":false,"error":{quoted},"errorType":"error-invalid-sort",'
        '"details":{"helperMethod":"parseJsonQuery"}}'
    )


def names(found):
    return [visitor.get("name") for visitor in found["visitors"]]


@pytest.fixture
def people(service):
    service.register(
        "t1", name="Émile Zola", email="emile@example.org", phone="+33 1", username="ez"
    )
    service.now += 1
    service.register("t2", name="100% _sure_", email="sure@example.org", phone="+33 12")
    service.now += 1
    fields = [{"key": "city", "value": 'Straße "x" O\'Neil \\', "overwrite": True}]
    service.register("t3", name="Bob", customFields=fields, department="Émile")
    service.register("t4")
    return service


@pytest.mark.parametrize(
    ("term", "found"),
    [
        ("", [None, "Bob", "100% _sure_", "Émile Zola"]),
        ("ÉMILE", ["Émile Zola"]),
        ("émile z", ["Émile Zola"]),
        ("EZ", ["Émile Zola"]),
        ("guest-", [None, "Bob", "100% _sure_"]),
        ("emile@example.org", ["Émile Zola"]),
        ("EMILE@Example.org", ["Émile Zola"]),
        ("emile@", []),
        ("+33 1", ["Émile Zola"]),
        ("+33 12", ["100% _sure_"]),
        ("33", []),
        ("%", ["100% _sure_"]),
        ("_", ["100% _sure_"]),
        ("0%", ["100% _sure_"]),
        ('"X"', ["Bob"]),
        ("o'neil \\", ["Bob"]),
        ("STRASSE", ["Bob"]),
        ("Straße", ["Bob"]),
        ("city", []),
        ("t1", []),
        ("Bobguest", []),
        ("\0", []),
        ("bob\0", []),
        (" ", ["Bob", "100% _sure_", "Émile Zola"]),
        ("' OR 1=1 --", []),
    ],
)
def test_a_term_is_a_whole_email_or_phone_or_a_part_of_a_text(people, term, found):
    answer = search(people, term=term)
    assert names(answer) == found
    assert answer["total"] == answer["count"] == len(found)


def test_an_answer_has_the_contracts_keys_in_their_order(people):
    answer = ask(people, SEARCH, f"term={quote('Émile')}&count=1")
    id_ = answer.json["visitors"][0]["_id"]
    assert answer.text == (
        '{"visitors":[{"_id":"' + id_ + '","username":"ez","name":"Émile Zola",'
        '"phone":[{"phoneNumber":"+33 1"}],"visitorEmails":[{"address":"emile@example.org"}],'
        '"ts":"2022-06-29T06:05:01.392Z","_updatedAt":"2022-06-29T06:05:01.392Z"}],'
        '"count":1,"offset":0,"total":1,"success":true}'
    )
    (bob,) = search(people, term="bob")["visitors"]
    shown = ["_id", "username", "name", "livechatData", "department", "ts", "_updatedAt"]
    assert list(bob) == shown
    assert (bob["department"], bob["ts"]) == ("Émile", "2022-06-29T06:05:01.394Z")


@pytest.mark.parametrize(
    ("term", "found"),
    [
        ("jose\u0301", ["jose\u0301", "JOS\u00c9"]),
        ("jos\u00e9", ["jose\u0301", "JOS\u00c9"]),
        ("istanbul", ["\u0130STANBUL", "istanbul"]),
        ("\u0130stanbul", ["\u0130STANBUL", "istanbul"]),
        ("strasse", ["Stra\u00dfe"]),
        ("STRA\u00dfE", ["Stra\u00dfe"]),
        ("\uff21\uff22", ["ab"]),
        ("ab", ["ab"]),
    ],
)
def test_texts_that_look_alike_are_found(service, term, found):
    names = ["jose\u0301", "JOS\u00c9", "\u0130STANBUL", "istanbul", "Stra\u00dfe", "ab"]
    for name in names:
        service.register(name, name=name)
    assert sorted(v["name"] for v in search(service, term=term)["visitors"]) == sorted(found)


@pytest.mark.parametrize("marks", ["\u0300\u0316", "\u0f73", "\uff9e\u0300"])
def test_combining_marks_cost_no_more_than_other_signs(service, marks):
    def seconds(text):
        value = (2048 * text)[:4096]
        fields = [{"key": key, "value": value, "overwrite": True} for key in "ab"]
        start = time.thread_time()
        service.register(text, customFields=fields)
        return time.thread_time() - start

    usual = min(seconds("\u0416\u0438") for _ in range(3))
    assert min(seconds(marks) for _ in range(3)) < 10 * usual
    assert search(service, term=10 * marks)["total"] == 1


@pytest.mark.parametrize(
    ("term", "found"),
    [
        ("+37265783468", 2),
        ("37265783468", 2),
        ("+372 (6578) 34-68", 2),
        ("\uff13\uff17\uff12 65783468", 2),
        ("3726578346", 0),
        ("x37265783468", 0),
        ("call 1", 1),
        ("1", 0),
    ],
)
def test_a_phone_is_found_by_its_digits_however_it_is_written(service, term, found):
    for phone in ("+37265783468", "00 1", "+372 6578-3468", "call 1"):
        service.register(phone, phone=phone, username="kim.jane")
    assert search(service, term=term)["total"] == found


SORTED = [None, "100% _sure_", "Bob", "Émile Zola"]  # by name


@pytest.mark.parametrize(
    ("sort", "found"),
    [
        ({"name": 1}, SORTED),
        ({"name": -1}, ["Émile Zola", "Bob", "100% _sure_", None]),
        ({"username": 1}, ["Émile Zola", "100% _sure_", "Bob", None]),
        ({"ts": 1}, ["Émile Zola", "100% _sure_", None, "Bob"]),
        ({"ts": -1, "name": 1}, [None, "Bob", "100% _sure_", "Émile Zola"]),
        ({"_updatedAt": -1}, [None, "Bob", "100% _sure_", "Émile Zola"]),
        ({"name": 1.0}, [None, "100% _sure_", "Bob", "Émile Zola"]),
        ({}, [None, "Bob", "100% _sure_", "Émile Zola"]),
        ({"lastChat.ts": -1}, [None, "Bob", "100% _sure_", "Émile Zola"]),
        ({"token": 1, "name": 1, "name; DROP TABLE visitor": -1}, SORTED),
        ("", [None, "Bob", "100% _sure_", "Émile Zola"]),
    ],
)
def test_a_page_is_sorted_and_of_equals_the_later_created_comes_first(people, sort, found):
    assert names(search(people, term="", sort=sort)) == found


def test_pages_of_50_unless_asked_of_100_at_most(service):
    for number in range(120):
        service.register(f"t{number}", name=f"{number}")
    newest = [f"{number}" for number in reversed(range(120))]
    for query, start, length in [
        ({}, 0, 50),
        ({"count": "0"}, 0, 50),
        ({"count": "", "offset": ""}, 0, 50),
        ({"count": "0.9"}, 0, 50),
        ({"count": "7"}, 0, 7),
        ({"count": "7.9"}, 0, 7),
        ({"count": "100"}, 0, 100),
        ({"count": "1000"}, 0, 100),
        ({"count": "1e999"}, 0, 100),
        ({"count": "100", "offset": "50"}, 50, 70),
        ({"offset": "119"}, 119, 1),
        ({"offset": "120"}, 120, 0),
    ]:
        answer = search(service, term="", **query)
        assert names(answer) == newest[start : start + length]
        assert (answer["count"], answer["offset"], answer["total"]) == (length, start, 120)
    for offset in ("1e999", "9" * 30, "1e18"):
        assert search(service, term="", offset=offset)["visitors"] == []


def large(service, token, value, fields):
    """Write a visitor with so many custom fields as they could be before their size had a limit."""
    held = {f"k{number}": value for number in range(fields)}
    visitor = dict.fromkeys(COLUMNS) | {"id": visitors.random_id(), "token": token}
    visitor |= {"name": token, "username": token, "ts": service.now, "updated": service.now}
    visitor["fields"] = held
    row = as_row(visitor)
    service.database.write(lambda connection: connection.execute(INSERT, row) and None)


@pytest.mark.parametrize(
    ("value", "fields", "everybody", "first"),
    [
        ("x" * 4000, 16, 100, range(55, 65)),  # 64 kB each: as large as it may be
        ("\U0001f600" * 1000, 16, 100, range(55, 65)),  # that are 4 bytes each
        ("x" * 4096, 256, 8, [3]),  # 1 MB each
        ("\U0001f600" * 4096, 256, 3, [1]),  # 4 MB each
    ],
    ids=["ASCII", "emojis", "large", "larger than a page"],
)
def test_a_page_ends_before_it_has_more_than_4_mb(service, value, fields, everybody, first):
    for number in range(everybody):
        large(service, f"{number}", value, fields)
    found = []
    while len(found) < everybody:
        query = f"term=&count=100&offset={len(found)}"
        answer = ask(service, SEARCH, query)
        page = answer.json
        assert page["total"] == everybody
        assert page["count"] == len(page["visitors"]) > 0
        assert len(answer.body) < 4_100_000 or page["count"] == 1
        if not found:
            assert page["count"] in first
        found += names(page)
    assert found == [f"{number}" for number in reversed(range(everybody))]


def test_a_search_follows_what_is_written(people):
    people.register("t3", name="Robert")
    people.post(
        {"token": "t3", "key": "city", "value": "Oslo", "overwrite": True},
        path="/api/v1/livechat/custom.field",
    )
    assert names(search(people, term="bob")) == []
    assert names(search(people, term="strasse")) == []
    assert names(search(people, term="oslo")) == names(search(people, term="ROBERT")) == ["Robert"]
    people.http.delete("/api/v1/livechat/visitor/t3")
    assert names(search(people, term="oslo")) == []


@pytest.mark.parametrize("path", [INFO, SEARCH, STATISTICS])
def test_other_methods_are_not_allowed(service, path):
    assert service.post({}, path=path).status_int == 405


def test_an_erasure_by_id_answers_and_erases_as_one_by_token_does(service, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    erased = service.register("secret-token", name="Erased Name")
    service.register("other", name="Other")
    service.now += 5
    answer = ask(service, INFO, f"visitorId={erased['_id']}", method="DELETE")
    assert (answer.status_int, answer.text) == (
        200,
        f'{{"visitor":{{"_id":"{erased["_id"]}","ts":"2022-06-29T06:05:01.397Z"}},"success":true}}',
    )
    assert f"Erased the visitor {erased['_id']}" in caplog.messages
    assert "secret" not in caplog.text
    assert names(search(service, term="")) == ["Other"]
    held = b"".join(file.read_bytes() for file in tmp_path.glob("livechat.db*"))
    assert b"Other" in held
    assert b"Erased Name" not in held
    assert b"secret-token" not in held
    again = ask(service, INFO, f"visitorId={erased['_id']}", method="DELETE")
    assert (again.status_int, again.json["errorType"]) == (400, "visitor-not-found")


def statistics(service, query=""):
    answer = ask(service, STATISTICS, query)
    assert answer.status_int == 200, answer.text
    return answer.json


DAY = 86_400_000


def test_the_statistics_count_the_visitors_of_each_day_of_utc(service):
    assert statistics(service)["total"] == 0
    service.register("a")
    service.now += DAY
    service.register("b")
    service.register("c")
    service.register("a", name="changed, but not of today")
    service.now -= service.now % DAY  # the first millisecond of that day
    service.register("d")
    service.now -= 1  # the last of the day before
    service.register("e")
    service.now += DAY
    answer = ask(service, STATISTICS, "days=3")
    changed = answer.json["changed"]
    assert answer.text == (
        f'{{"total":5,"changed":"{changed}","days":[{{"date":"2022-06-30","registered":3}},'
        '{"date":"2022-06-29","registered":2},{"date":"2022-06-28","registered":0}],'
        '"success":true}'
    )
    service.http.delete("/api/v1/livechat/visitor/b")
    after = statistics(service, "days=1")
    assert (after["total"], after["days"]) == (4, [{"date": "2022-06-30", "registered": 2}])


@pytest.mark.parametrize(
    ("query", "days"),
    [
        ("", 30),
        ("days=0", 30),
        ("days=0.9", 30),
        ("days=1", 1),
        ("days=7.9", 7),
        ("days=366", 366),
        ("days=367", 366),
        ("days=1e999", 366),
    ],
)
def test_the_statistics_are_of_30_days_unless_asked_of_366_at_most(service, query, days):
    answer = statistics(service, query)["days"]
    assert len(answer) == days
    assert answer[0]["date"] == "2022-06-29"
    assert [day["date"] for day in answer] == sorted((day["date"] for day in answer), reverse=True)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("days=x&other=1", "must NOT have additional properties"),
        *[(f"days={value}", "must be number") for value in BAD_NUMBERS],
        ("days=1&days=2", "must be number"),
        ("days=-1", "must be >= 0"),
    ],
)
def test_the_parameters_of_the_statistics_are_checked(service, query, error):
    answer = ask(service, STATISTICS, query)
    assert (answer.status_int, answer.text) == (400, refusal(f"{error} [invalid-params]"))


def test_changed_moves_with_each_registration_change_and_erasure_alone(service):
    id_ = service.register("a")["_id"]  # and the clock stands still
    field = {"token": "a", "key": "k", "value": "v", "overwrite": True}
    seen = [statistics(service)["changed"]]
    for change in (
        lambda: service.register("b"),
        lambda: service.register("b", name="B"),
        lambda: service.register("b", name="B"),
        lambda: service.post(field, path="/api/v1/livechat/custom.field"),
        lambda: service.http.delete("/api/v1/livechat/visitor/b"),
        lambda: ask(service, INFO, f"visitorId={id_}", method="DELETE"),
    ):
        change()
        seen.append(statistics(service)["changed"])
        service.post({"visitor": {}})
        search(service, term="")
        assert statistics(service, "days=7")["changed"] == seen[-1]
    assert seen == sorted(set(seen))


def test_changed_moves_although_connections_were_opened_anew_in_between(service):
    seen = [statistics(service)["changed"]]
    for number in range(5):
        service.register(f"t{number}")
        service.database.close()
        seen.append(statistics(service)["changed"])
    assert seen == sorted(set(seen))
    assert statistics(service)["total"] == 5

"""The rate limit (contract, section 1): exact, bounded in memory, and for the right client."""

import json
import resource
import signal
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resources.rate_limit import MOST_KEYS, Calls
from tests.server import PATH, wait_until

REFUSED = (
    '{"success":false,"error":"Error, too many requests. Please slow down. You must wait %d seconds'
    ' before trying this endpoint again. [error-too-many-requests]",'
    '"errorType":"error-too-many-requests"}'
)
START = 1_656_482_701_392  # the clock of the service: 58.608 seconds before the end of its minute
END = 1_656_482_760_000
BODY = {"visitor": {"token": "t"}}
ROUTES = [
    ("POST", PATH),
    ("GET", f"{PATH}/t"),
    ("HEAD", f"{PATH}/t"),
    ("DELETE", f"{PATH}/t"),
    ("POST", f"{PATH}.status"),
    ("POST", "/api/v1/livechat/custom.field"),
    ("POST", "/api/v1/livechat/custom.fields"),
    ("GET", "/api/v1/livechat/visitors.info"),
    ("DELETE", "/api/v1/livechat/visitors.info"),
    ("GET", "/api/v1/livechat/visitors.search"),
    ("GET", "/api/v1/livechat/visitors.statistics"),
]


@pytest.fixture
def service(make_service):
    return make_service(LIVECHAT_RATE_LIMIT="2")


def ask(service, method="POST", path=PATH, address="192.0.2.1", headers=None):
    """Return the answer to a call from an address; a good body where one is needed."""
    body = json.dumps(BODY).encode() if method == "POST" else b""
    return service.http.request(
        path,
        method=method,
        body=body,
        headers={"Content-Type": "application/json", **(headers or {})},
        environ={"REMOTE_ADDR": address},
        expect_errors=True,
    )


def limits(answer):
    names = ("Limit", "Remaining", "Reset")
    return [answer.headers.get(f"X-RateLimit-{name}") for name in names]


def test_a_call_beyond_the_limit_is_the_literal_429(service):
    assert limits(ask(service)) == ["2", "1", str(END)]
    assert limits(ask(service)) == ["2", "0", str(END)]
    before = service.content()
    answer = ask(service, headers={"Origin": "https://example.org"})
    assert (answer.status_int, answer.text) == (429, REFUSED % 59)
    assert answer.headers["Retry-After"] == "59"
    assert limits(answer) == ["2", "0", str(END)]
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert service.content() == before


def test_the_next_minute_begins_at_none(service):
    assert [ask(service).status_int for _ in range(3)] == [200, 200, 429]
    service.now = END - 1
    answer = ask(service)
    assert (answer.status_int, answer.headers["Retry-After"]) == (429, "1")
    service.now = END
    answer = ask(service)
    assert (answer.status_int, limits(answer)) == (200, ["2", "1", str(END + 60_000)])


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_and_method_counts_by_itself(service, method, path):
    for other_method, other_path in ROUTES:
        if (other_method, other_path) != (method, path):
            for _ in range(3):
                ask(service, other_method, other_path)
    for expected in ("1", "0"):
        answer = ask(service, method, path)
        assert answer.status_int != 429
        assert limits(answer) == ["2", expected, str(END)]
    assert ask(service, method, path).status_int == 429


def test_a_trailing_slash_is_the_same_route_and_a_token_no_part_of_it(service):
    assert [ask(service, path=path).status_int for path in (PATH, f"{PATH}/", PATH)] == [
        200,
        200,
        429,
    ]
    tokens = ("a", "b/", "c")
    statuses = [ask(service, "GET", f"{PATH}/{token}").status_int for token in tokens]
    assert statuses == [400, 404, 429]


def test_what_is_no_call_of_a_route_does_not_count(service):
    preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    for _ in range(3):
        for answer in (
            ask(service, "OPTIONS"),
            ask(service, "OPTIONS", headers=preflight),
            ask(service, "PUT"),
            ask(service, "GET"),
            ask(service, path="/api/v1/livechat/unknown"),
            ask(service, "GET", "/livez"),
            ask(service, "GET", "/api/openapi.json"),
        ):
            assert answer.status_int in (200, 404, 405)
            assert limits(answer) == [None, None, None]
    assert ask(service).status_int == 200


def test_a_call_counts_before_its_body_or_its_agent_is_looked_at(service):
    for body in (b"{", b"x" * 70_000):
        answer = service.post(body)
        assert answer.status_int in (400, 413)
        assert limits(answer)[0] == "2"
    assert service.post(b"{").status_int == 429
    path = "/api/v1/livechat/visitors.info"
    statuses = [service.http.get(path, expect_errors=True).status_int for _ in range(3)]
    assert statuses == [401, 401, 429]


def test_one_client_does_not_use_up_what_another_has(service):
    assert [ask(service).status_int for _ in range(3)] == [200, 200, 429]
    assert ask(service, address="192.0.2.2").status_int == 200


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("192.0.2.1", "192.0.2.11", False),
    ],
)
def test_an_ipv6_address_counts_by_its_64_bits(service, one, other, same):
    assert [ask(service, address=one).status_int for _ in range(2)] == [200, 200]
    assert ask(service, address=other).status_int == (429 if same else 200)


@pytest.mark.parametrize(
    ("proxies", "forwarded", "whose"),
    [
        ("0", "198.51.100.1", "connection"),
        ("1", "198.51.100.1", "198.51.100.1"),
        ("1", "203.0.113.9, 198.51.100.1", "198.51.100.1"),  # the first one is a lie
        ("2", "203.0.113.9, 198.51.100.1, 10.0.0.1", "198.51.100.1"),
        ("2", "198.51.100.1,10.0.0.1", "198.51.100.1"),
        ("2", "198.51.100.1", "connection"),  # it has come past a proxy
        ("1", None, "connection"),
        ("1", "", "connection"),
        ("1", "198.51.100.1:4711", "198.51.100.1"),
        ("1", "[2001:db8::1]:4711", "2001:db8::2"),
        ("1", "2001:db8::1", "2001:db8::2"),
        ("1", "unknown", "unknown"),
        ("1", "\xff", "\xff"),
    ],
)
def test_the_client_is_whom_the_trusted_proxies_name(make_service, proxies, forwarded, whose):
    service = make_service(LIVECHAT_RATE_LIMIT="2", LIVECHAT_TRUSTED_PROXIES=proxies)
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    assert [ask(service, headers=headers).status_int for _ in range(2)] == [200, 200]
    lies = {"Forwarded": "for=203.0.113.7", "X-Real-Ip": "203.0.113.7"}
    if whose == "connection":
        again = ask(service, headers={**headers, **lies})
        other = ask(service, address="192.0.2.2", headers=headers)
    else:
        # Another connection, and more lies at the left: it is the same client.
        hops = ["203.0.113.7", whose, *["10.0.0.7"] * (int(proxies) - 1)]
        again = ask(
            service,
            address="192.0.2.2",
            headers={"X-Forwarded-For": ", ".join(hops), **lies},
        )
        hops[1] = "198.51.100.2"
        other = ask(service, headers={"X-Forwarded-For": ", ".join(hops)})
    assert again.status_int == 429
    assert other.status_int == 200


def test_nothing_is_counted_or_said_without_a_limit(make_service):
    service = make_service()
    for _ in range(10):
        answer = ask(service)
        assert (answer.status_int, limits(answer)) == (200, [None, None, None])


def test_a_request_that_does_not_come_whole_is_not_counted(make_server):
    server = make_server(LIVECHAT_RATE_LIMIT="5").wait()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nOrigin: https://example.org\r\n"
    for body in ("Content-Length: 9\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\nZ"):
        answer, _ = server.raw((head + body).encode())
        assert answer.startswith("HTTP/1.1 400 ")
        assert "ratelimit" not in answer.lower()
        assert "access-control" not in answer.lower()
    _, headers, _ = server.request("POST", PATH, b"{}")
    assert headers["X-RateLimit-Remaining"] == "4"


def test_100_of_1000_calls_pass_in_a_minute(make_server):
    server = make_server(LIVECHAT_RATE_LIMIT="100").wait()

    def call(_):
        status, headers, _ = server.request("GET", f"{PATH}/unknown")
        return headers["X-RateLimit-Reset"], headers["X-RateLimit-Remaining"], status

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(call, range(1000)))
    windows = defaultdict(list)
    for reset, remaining, status in answers:
        windows[reset].append((status, int(remaining)))
    assert len(windows) <= 2  # where the minute ends meanwhile
    for calls in windows.values():
        passed = [remaining for status, remaining in calls if status == 400]
        assert Counter(passed) == Counter(range(100 - len(passed), 100))  # each number once
        assert len(passed) == min(100, len(calls))
        assert {status for status, _ in calls} <= {400, 429}


def test_no_address_reaches_the_log_or_a_file(make_server, tmp_path):
    (tmp_path / "tmp").mkdir()
    server = make_server(
        LIVECHAT_RATE_LIMIT="2", LIVECHAT_TRUSTED_PROXIES="1", TMPDIR=str(tmp_path / "tmp")
    ).wait()
    for _ in range(4):
        server.request("GET", f"{PATH}/t", headers={"X-Forwarded-For": "198.51.100.77"})
    server.kill()  # without a chance to clean up
    for file in tmp_path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert b"198.51.100.77" not in data
            assert bytes([198, 51, 100, 77]) not in data
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGHUP, None])
def test_a_start_or_a_reload_begins_anew(make_server, number):
    server = make_server(LIVECHAT_RATE_LIMIT="9").wait()
    remaining = [calls_left(server) for _ in range(3)]
    assert remaining in ([8, 7, 6], [8, 8, 7], [8, 7, 8])  # where a minute ends
    if number:
        old = server.worker()
        server.process.send_signal(number)
        wait_until(lambda: server.workers() and old not in server.workers(), "the old one ends")
    else:
        assert server.stop() == 0
        server = make_server(LIVECHAT_RATE_LIMIT="9").wait()
    assert calls_left(server) == 8


def calls_left(server):
    _, headers, _ = server.request("GET", f"{PATH}/t")
    return int(headers["X-RateLimit-Remaining"])


def test_half_a_million_addresses_need_no_more_memory_than_100_000(often):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    calls = Calls(clock=lambda: START)
    before = resident()
    for number in range(often(500_000, 2_000_000)):
        assert calls.count(number.to_bytes(8))[0] == 1
    assert resident() - before < 25 * 2**20


def test_beyond_so_many_addresses_in_a_minute_calls_pass_and_the_others_count_on():
    now = START
    calls = Calls(clock=lambda: now)
    keys = [number.to_bytes(8) for number in range(MOST_KEYS + 4)]
    for turn in (1, 2, 3):
        counts = [calls.count(key)[0] for key in keys]
        assert counts == [turn] * MOST_KEYS + [1] * 4
    now = END
    assert [calls.count(key)[0] for key in reversed(keys)] == [1] * len(keys)


def test_threads_count_exactly():
    calls = Calls(clock=lambda: START)
    key = bytes(8)
    counts = []
    threads = [
        threading.Thread(target=lambda: counts.extend(calls.count(key)[0] for _ in range(500)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == list(range(1, 4001))


@pytest.mark.parametrize("now", [-1, 0, -START, -60_000, -60_001])
def test_a_clock_before_1970_is_harmless(service, now):
    service.now = now
    end = (now // 60_000 + 1) * 60_000
    # A visitor's date is of that time too.
    assert [ask(service, "GET", f"{PATH}/t").status_int for _ in range(2)] == [400, 400]
    answer = ask(service, "GET", f"{PATH}/t")
    assert answer.status_int == 429
    assert limits(answer) == ["2", "0", str(end)]
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert [ask(service).status_int for _ in range(3)] == [200, 200, 429]

"""One token is one visitor, whole, at any concurrency (contract, 2.3)."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def at_once(clients, call, arguments):
    """Call `call` for each argument from so many clients, which all begin at one moment."""
    start = Barrier(clients)

    def client(mine):
        start.wait()
        return [call(argument) for argument in mine]

    with ThreadPoolExecutor(clients) as pool:
        shares = [arguments[number::clients] for number in range(clients)]
        return [result for results in pool.map(client, shares) for result in results]


def test_50_clients_with_one_new_token_are_one_visitor(server):
    answers = at_once(50, lambda _: server.register("t", name="N", phone="1"), range(50))
    assert [status for status, _ in answers] == [200] * 50
    assert len({answer["visitor"]["_id"] for _, answer in answers}) == 1
    assert {answer["visitor"]["username"] for _, answer in answers} == {"guest-2"}
    assert all(answer["visitor"]["name"] == "N" for _, answer in answers)
    assert server.query("SELECT count(*), min(phone) FROM visitor") == [[1, "1"]]
    assert server.query("SELECT last FROM guest") == [[2]]


def test_50_clients_that_each_add_a_custom_field_lose_none(server):
    server.register("t")
    answers = at_once(
        50,
        lambda number: server.register(
            "t", customFields=[{"key": f"k{number}", "value": "v", "overwrite": True}]
        ),
        range(50),
    )
    assert [status for status, _ in answers] == [200] * 50
    kept = server.register("t")[1]["visitor"]["livechatData"]
    assert kept == {f"k{number}": "v" for number in range(50)}


def test_640_registrations_from_32_clients_are_640_visitors_without_gaps(server):
    answers = at_once(32, lambda number: server.register(f"t{number}"), range(640))
    assert [status for status, _ in answers] == [200] * 640
    assert len({answer["visitor"]["_id"] for _, answer in answers}) == 640
    numbers = {int(answer["visitor"]["username"].removeprefix("guest-")) for _, answer in answers}
    assert numbers == set(range(2, 642))
    assert server.query("SELECT count(*), count(DISTINCT token) FROM visitor") == [[640, 640]]

"""POST /api/v1/livechat/visitor: what is accepted, stored and answered (contract, 2.1 to 2.4)."""

import re

import pytest

TOKEN = "867ad6a09fc4af29f6f1f2a9cf1deaba"
FULL = {
    "token": TOKEN,
    "name": "John Doe",
    "email": "john.doe@email.com",
    "department": "Support",
    "phone": "+37265783468",
    "username": "kim.jane",
    "customFields": [{"key": "address", "value": "Rocket.Chat street", "overwrite": True}],
}


def field(key, value, overwrite=True):
    return {"key": key, "value": value, "overwrite": overwrite}


def test_the_documents_request_gets_the_documents_answer(service):
    answer = service.post({"visitor": {"token": TOKEN}})
    id_ = answer.json["visitor"]["_id"]
    assert answer.status_int == 200
    assert answer.body.decode() == (
        '{"visitor":{"_id":"' + id_ + '","username":"guest-2","status":"online",'
        '"ts":"2022-06-29T06:05:01.392Z","_updatedAt":"2022-06-29T06:05:01.392Z",'
        '"token":"867ad6a09fc4af29f6f1f2a9cf1deaba"},"success":true}'
    )
    assert re.fullmatch("[23456789ABCDEFGHJKLMNPQRSTWXYZabcdefghijkmnopqrstuvwxyz]{17}", id_)


def test_every_field_is_kept_and_answered_in_the_contracts_order(service):
    answer = service.post({"visitor": FULL})
    id_ = answer.json["visitor"]["_id"]
    assert answer.text == (
        '{"visitor":{"_id":"' + id_ + '","username":"kim.jane","status":"online",'
        '"ts":"2022-06-29T06:05:01.392Z","_updatedAt":"2022-06-29T06:05:01.392Z",'
        '"token":"867ad6a09fc4af29f6f1f2a9cf1deaba","name":"John Doe",'
        '"phone":[{"phoneNumber":"+37265783468"}],'
        '"visitorEmails":[{"address":"john.doe@email.com"}],"department":"Support",'
        '"livechatData":{"address":"Rocket.Chat street"}},"success":true}'
    )
    service.database.close()  # and it is there for whoever opens the file next
    assert service.register(TOKEN) == answer.json["visitor"]


def test_the_same_token_is_the_same_visitor_and_what_is_given_is_replaced(service):
    first = service.register(**FULL)
    service.now += 16
    second = service.register(TOKEN, name="Jane", phone="+1", email="jane@example.org")
    assert second == first | {
        "_updatedAt": "2022-06-29T06:05:01.408Z",
        "name": "Jane",
        "phone": [{"phoneNumber": "+1"}],
        "visitorEmails": [{"address": "jane@example.org"}],
    }


def test_a_username_is_never_changed_later(service):
    service.register("a")
    service.register("b", username="bee")
    assert service.register("a", username="ann")["username"] == "guest-2"
    assert service.register("b", username="bob")["username"] == "bee"


def test_only_a_new_visitor_without_a_username_spends_a_guest_number(service):
    usernames = [
        service.register(token, **given)["username"]
        for token, given in [
            ("a", {}),
            ("a", {}),
            ("b", {"username": "bee"}),
            ("c", {"username": "guest-3"}),  # usernames need not be unique
            ("d", {"username": ""}),
            ("e", {}),
        ]
    ]
    assert usernames == ["guest-2", "guest-2", "bee", "guest-3", "guest-3", "guest-4"]


def test_guest_numbers_go_on_after_a_restart(make_service):
    make_service().register("a")
    assert make_service().register("b")["username"] == "guest-3"


def test_updated_at_never_goes_back(service):
    created = service.register("a")
    service.now -= 60_000
    updated = service.register("a", name="A")
    assert updated["_updatedAt"] == created["_updatedAt"]
    assert updated["ts"] == created["ts"]


@pytest.mark.parametrize("key", ["name", "email", "department", "phone", "username"])
def test_an_empty_string_means_not_given_and_changes_nothing(service, key):
    before = service.register(**FULL)
    assert service.register(TOKEN, **{key: ""}) == before
    assert key not in service.register("another", **{key: ""}).keys() - {"username"}


def test_the_email_is_kept_trimmed_and_in_lower_case(service):
    visitor = service.register("a", email="\ufeff\u00a0 John.DOE@Email.COM\n\u2029")
    assert visitor["visitorEmails"] == [{"address": "john.doe@email.com"}]


@pytest.mark.parametrize("email", ["a@b", "a b@c d", "é@ü", "a.b+c@d", "a@b\nc", "'@\""])
def test_text_one_at_and_text_is_an_email(service, email):
    assert service.register("a", email=email)["visitorEmails"] == [{"address": email}]


def test_what_is_not_listed_is_ignored_never_stored_never_returned(service):
    extra = {
        "_id": "mine",
        "id": "mine",
        "ts": 5,
        "status": "busy",
        "connectionData": {"a": [None]},
        "__proto__": {"x": 1},
        "constructor": 1,
        "": 2,
    }
    plain = service.register("a")
    assert service.register("a", **extra) == plain
    custom = [field("k", "v") | {"extra": 1, "__proto__": {}}]
    assert service.register("a", customFields=custom)["livechatData"] == {"k": "v"}
    assert "extra" not in str(service.content())
    assert "mine" not in str(service.content())


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ([], {"old": "1", "empty": ""}),
        ([field("old", "2")], {"old": "2", "empty": ""}),
        ([field("old", "2", overwrite=False)], {"old": "1", "empty": ""}),
        ([field("empty", "2", overwrite=False)], {"old": "1", "empty": "2"}),
        ([field("new", "2", overwrite=False)], {"old": "1", "empty": "", "new": "2"}),
        ([field("old", "")], {"old": "", "empty": ""}),
        ([field("n", "1"), field("n", "2", overwrite=False)], {"old": "1", "empty": "", "n": "1"}),
        ([field("n", "1"), field("n", "2")], {"old": "1", "empty": "", "n": "2"}),
        (
            [field("a.b", "1"), field("$set", "2")],
            {"old": "1", "empty": "", "a.b": "1", "$set": "2"},
        ),
        ([field("__proto__", "1")], {"old": "1", "empty": "", "__proto__": "1"}),
    ],
)
def test_custom_fields_follow_their_overwrite_in_order(service, fields, kept):
    service.register("a", customFields=[field("old", "1"), field("empty", "")])
    assert service.register("a", customFields=fields)["livechatData"] == kept
    assert service.register("a")["livechatData"] == kept


def test_an_empty_list_of_custom_fields_is_none(service):
    assert "livechatData" not in service.register("a", customFields=[])


def test_only_configured_custom_fields_are_kept_others_are_skipped(make_service):
    service = make_service(LIVECHAT_CUSTOM_FIELDS="plan, seat")
    fields = [field("plan", "pro"), field("Plan", "x"), field("other", "y"), field("seat", "1")]
    assert service.register("a", customFields=fields)["livechatData"] == {
        "plan": "pro",
        "seat": "1",
    }
    assert "livechatData" not in service.register("b", customFields=[field("other", "y")])


def test_any_department_is_kept_as_given_until_they_are_configured(service):
    assert service.register("a", department=" Support ")["department"] == " Support "


@pytest.mark.parametrize(
    ("given", "kept"), [("d1", "d1"), ("Support", "d1"), ("sales", "sales"), ("d3", "d3")]
)
def test_a_configured_department_is_answered_as_its_id(make_service, given, kept):
    # The id d3 wins over the department that is named d3.
    service = make_service(LIVECHAT_DEPARTMENTS="d1:Support, sales, d2:d3, d3:Other")
    assert service.register("a", department=given)["department"] == kept


def test_the_limits_count_code_points_and_are_reached(service):
    longest = {
        "token": "\U0001f600" * 256,
        "name": "n" * 256,
        "email": " " * 200 + "e" * 40 + "@" + "e" * 13,
        "department": "d" * 128,
        "phone": "p" * 64,
        "username": "u" * 128,
        "customFields": [field(f"{number:0128}", "v" * 4096) for number in range(8)]
        + [field(f"{number}", "") for number in range(56)],
    }
    visitor = service.register(**longest)
    assert visitor["token"] == longest["token"]
    assert len(visitor["livechatData"]) == 64


def test_a_visitor_holds_256_custom_fields_and_no_more(service):
    for start in range(0, 256, 64):
        fields = [field(f"k{number}", "v") for number in range(start, start + 64)]
        visitor = service.register("a", customFields=fields)
    assert len(visitor["livechatData"]) == 256
    assert service.refused({"visitor": {"token": "a", "customFields": [field("one", "more")]}}) == (
        '{"success":false,"error":"Match error: Expected at most 256 items'
        ' in field visitor.customFields","errorType":"invalid-params"}'
    )
    assert len(service.register("a", customFields=[field("k0", "w")])["livechatData"]) == 256


def test_of_a_key_that_stands_twice_the_last_value_counts(service):
    answer = service.post(b'{"visitor":{"token":"a","token":"b","name":5,"name":"N"}}')
    assert (answer.json["visitor"]["token"], answer.json["visitor"]["name"]) == ("b", "N")


def test_a_trailing_slash_is_the_same_path(service):
    answer = service.post({"visitor": {"token": "a"}}, path="/api/v1/livechat/visitor/")
    assert answer.json["visitor"] == service.register("a")
